"""Short runs of a model in training, without Ray: that it learns, stops and goes on, and what it leaves in OUTPUT."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from samray import storage
from samray.errors import ConfigError
from samray.sam.sam import Sam
from samray.storage.redaction import redact_json
from samray.train import masks, run, scores
from samray.train.data import open_data
from samray.train.interaction import draw_course
from samray.train.learner import Learner, frame_of, size_due
from samray.train.loop import Worker, run_leg, save_all
from samray.train.run import full_identity
from samray.train.settings import TrainConfig
from samray.train.store import METRICS_FILE, WEIGHTS_FILE, Position, Store
from tests.support.micro import CPU, FRAME, MICRO, MICRO_SAM2, batches_of, learner_of, settings_of

pytestmark = pytest.mark.usefixtures("micro_model")


# --- a leg ------------------------------------------------------------------------------------------------------------


def run_to_end(output: Path, *overrides: str, stop_at: int | None = None) -> Store:
    """Legs as the driver makes them, without Ray; stop_at: ask for a stop after so many steps."""
    settings, store = settings_of(*overrides), Store(str(output))
    mixture = open_data(["scenes"], settings)
    while (position := store.read_position()).progress(settings.train) < 1:
        size, until = size_due(settings.train, MICRO, position)
        learner = Learner(settings, MICRO, image_size=size, device=CPU, state=store.read_state())
        worker = Worker(
            config=settings.train,
            store=store,
            validation=lambda: mixture.validation(2, FRAME),
            until=until,
            report=lambda line: line["step"] == stop_at,
        )
        run_leg(learner, batches_of(settings, frame_of(MICRO, size), position.step), worker)
        if stop_at is not None:
            break
    return store


@pytest.mark.slow
def test_repeating_one_batch_drives_its_loss_down():
    """Real learning: on the same few clicks the best-scored mask must come to fit."""
    learner = learner_of("train.steps=10000", "train.warmup_steps=5")
    batch = next(batches_of(settings_of()))
    history = []
    for _ in range(60):
        metrics = learner.step(batch)
        history.append((metrics["mask_loss"], metrics["iou_scored"]))
    assert np.mean(history[-5:], axis=0)[0] < 0.5 * history[0][0]
    assert np.mean(history[-5:], axis=0)[1] > history[0][1] + 0.15


@pytest.mark.parametrize("prompts", ["box", "refine"])
def test_boxes_and_corrective_clicks_train_their_parts_of_the_prompt_encoder(prompts: str):
    overrides = ["train.box_fraction=1"] if prompts == "box" else ["train.interaction_steps=2"]
    learner = learner_of(*overrides)
    learner.step(next(batches_of(settings_of())))
    encoder = learner.sam.prompt_encoder
    corner, mask = encoder.point_embeddings[2].weight.grad, encoder.mask_downscaling[0].weight.grad
    assert (corner is not None) == (prompts == "box")
    assert (mask is not None) == (prompts == "refine")


@pytest.mark.slow
def test_the_head_of_ious_learns_to_rank_masks_that_stay_as_they_are():
    learner = learner_of("train.trainable=iou_head", "train.warmup_steps=1", "train.interaction_steps=3")
    batch = next(batches_of(settings_of()))
    history = [learner.step(batch) for _ in range(40)]
    assert history[-1]["score_loss"] < 0.5 * history[0]["score_loss"]
    assert history[-1]["iou_scored"] >= history[0]["iou_scored"]
    assert len({metrics["iou_oracle"] for metrics in history}) == 1
    assert learner.step_loss is not None
    assert learner.step_loss.memory["ious"].shape == (40 * 3 * 2 * 4, 4)  # steps, rounds, images, prompts


def test_the_head_of_ious_learns_scores_as_the_decoder_gives_them():
    """Those of SAM 2 go through a sigmoid."""
    learner = learner_of("train.trainable=iou_head", spec=MICRO_SAM2)
    last = learner.sam.mask_decoder.iou_prediction_head.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(2.0)
    batch = next(batches_of(settings_of()))
    # Nothing has an IoU above 0 with an empty mask.
    batch["targets"] = torch.zeros_like(batch["targets"])
    assert learner.step(batch)["score_loss"] == pytest.approx(4 * torch.tensor(2.0).sigmoid().item() ** 2)


def test_what_the_head_of_ious_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scores, "MEMORY_PROMPTS", 12)
    learner = learner_of("train.trainable=iou_head")
    batches = batches_of(settings_of())
    for _ in range(2):
        learner.step(next(batches))
    assert learner.step_loss is not None
    before = learner.step_loss.memory["tokens"]
    learner.step(next(batches))
    after = learner.step_loss.memory["tokens"]
    assert len(before) == len(after) == 12
    assert torch.equal(before[8:], after[:4])  # eight new ones; the oldest go


def test_a_run_writes_weights_that_load_and_metrics(tmp_path: Path):
    store = run_to_end(tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata()["model"] == "micro"
    Sam(MICRO).load_state_dict(weights, strict=True)
    assert weights["mask_decoder.iou_token.weight"].dtype == torch.float16
    assert all(torch.isfinite(w.float()).all() for w in weights.values())
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["validation", *["train"] * 4, "validation"]
    assert lines[-1]["step"] == 4
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"]
    assert [p.name for p in tmp_path.glob("state-*")] == ["state-00000004.pt"]
    assert store.read_position().step == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [(), ("train.interaction_steps=4", "train.drop_path=0.3", "train.log_every=2"), ("train.trainable=iou_head",)],
)
def test_a_stopped_run_goes_on_where_it_was_and_ends_as_an_undisturbed_one(tmp_path: Path, extra: tuple[str, ...]):
    whole = run_to_end(tmp_path / "whole", *extra)
    parts = run_to_end(tmp_path / "parts", *extra, stop_at=1)
    assert parts.read_position().step == 1
    run_to_end(tmp_path / "parts", *extra)
    expected, restored = whole.read_state(), parts.read_state()
    assert expected is not None
    assert restored is not None
    for name, value in expected["model"].items():
        torch.testing.assert_close(restored["model"][name], value, rtol=0, atol=0, msg=name)
    timing = ("minutes", "examples_per_s")
    without = [
        [{k: v for k, v in line.items() if k not in timing} for line in s.read_metrics()] for s in (whole, parts)
    ]
    assert without[0] == without[1]


@pytest.mark.slow
def test_small_images_come_first_and_what_they_taught_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = []
    step = Learner.step
    monkeypatch.setattr(Learner, "step", lambda self, b, p: (sizes.append(b["image"].shape[1]), step(self, b, p))[1])
    overrides = ("train.first_image_size=32", "train.first_fraction=0.5", "train.learning_rate=1e-9")
    before = learner_of(*overrides).sam.mask_decoder.iou_token.weight.detach().clone()
    store = run_to_end(tmp_path, *overrides)
    assert sizes == [32, 32, 64, 64]
    state = store.read_state()
    assert state is not None
    # A learning rate of nearly nothing: had the second part started from the beginning, these numbers would differ.
    torch.testing.assert_close(state["model"]["mask_decoder.iou_token.weight"], before, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_validation_is_at_the_size_that_the_model_is_used_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = []
    evaluate = masks.evaluate_clicks
    monkeypatch.setattr(
        masks, "evaluate_clicks", lambda sam, scenes: (sizes.append(sam.image_size), evaluate(sam, scenes))[1]
    )
    run_to_end(tmp_path, "train.first_image_size=32", "train.first_fraction=0.5", "train.validate_every=1")
    assert sizes == [64] * 5


def test_a_claim_that_nothing_came_of_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuses(one: object) -> None:
        Store(str(tmp_path)).write_metrics([{"kind": "validation", "step": 0}])
        raise ConfigError("train.batch_size = 4 cannot be divided among 3 workers")

    monkeypatch.setattr(run, "_run_on_ray", refuses)
    for batch_size in (4, 6):  # the advice is followed
        with pytest.raises(ConfigError, match="cannot be divided"):
            run.train("scenes", tmp_path, settings_of(f"train.batch_size={batch_size}"), progress=False)
        assert list(tmp_path.iterdir()) == []
    store = Store(str(tmp_path))
    assert store.claim(settings_of().identity(), {})
    assert not store.claim(settings_of().identity(), {})
    for lines in ([{"kind": "validation", "step": 0}, {"kind": "train", "step": 1}], []):
        store.write_metrics(lines)
        storage.put(store.uri("weights.safetensors"), b"of a run that failed as it was saved")
        store.give_back()
        assert (tmp_path / "train.json").exists(), "something came of it"


@pytest.mark.slow
def test_a_run_can_begin_with_weights(tmp_path: Path):
    store = run_to_end(tmp_path)
    settings = settings_of("train.from_scratch=false", "train.seed=1")
    model = settings.model.model_copy(update={"checkpoint": store.uri(WEIGHTS_FILE)})
    learner = Learner(settings.model_copy(update={"model": model}), MICRO, image_size=64, device=CPU)
    begun = store.read_state()
    assert begun is not None
    for name, value in learner.sam.state_dict().items():
        torch.testing.assert_close(value, begun["ema"][name], rtol=1e-3, atol=1e-5, msg=name)  # in half precision
    assert learner.position.step == 0


def test_a_distilled_encoder_learns_its_teachers_embeddings(monkeypatch: pytest.MonkeyPatch):
    teacher = Sam(replace(MICRO, encoder=replace(MICRO.encoder, dims=(16, 16, 32)))).eval().requires_grad_(False)
    monkeypatch.setattr("samray.train.learner.load_model", lambda *args, **options: teacher)
    overrides = ("train.distill_from=vit_h", "train.steps=10000", "train.warmup_steps=1")
    learner = learner_of(*overrides)
    batch = next(batches_of(settings_of()))
    losses = [learner.step(batch)["distill_loss"] for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    for name, value in teacher.mask_decoder.state_dict().items():
        assert torch.equal(learner.sam.mask_decoder.state_dict()[name], value), name


def test_progress_follows_whichever_budget_is_used_up_faster():
    config = TrainConfig(minutes=10.0, steps=100)
    assert Position(20, 300.0).progress(config) == 0.5
    assert Position(80, 300.0).progress(config) == 0.8
    assert Position(80, 1e6).progress(config) == 1.0
    assert Position(80, 300.0).progress(TrainConfig(minutes=10.0, steps=None)) == 0.5
    assert Position(80, 300.0).progress(TrainConfig(steps=160)) == 0.5


@pytest.mark.slow
def test_each_step_is_validated_once(tmp_path: Path):
    """Also where a run died before its first save, and where the last step falls on `validate_every`."""
    settings = settings_of("train.minutes=1", "train.steps=null", "train.validate_every=2")
    store, mixture = Store(str(tmp_path)), open_data(["scenes"], settings)
    for _ in range(2):
        learner = Learner(settings, MICRO, image_size=64, device=CPU, state=store.read_state())
        assert learner.position.step == 0

        def use_up(learner: Learner, line: dict[str, Any]) -> bool:
            if line["step"] == 2:
                learner.position.elapsed_s = 60.0
            return False

        worker = Worker(
            config=settings.train,
            store=store,
            validation=lambda: mixture.validation(2, FRAME),
            report=partial(use_up, learner),
        )
        run_leg(learner, batches_of(settings, count=4), worker)
        steps = [line["step"] for line in store.read_metrics() if line["kind"] == "validation"]
        assert steps == [0, 2]
        (tmp_path / "position.json").unlink()  # as a death before any save leaves it


@pytest.mark.parametrize("parallel", [False, True])
def test_what_has_no_part_in_a_step_does_not_move(tmp_path: Path, parallel: bool):
    """A box's corners in steps of clicks: data parallel training gives gradients of zero, and AdamW would move them."""
    if parallel:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrap: Any = torch.nn.parallel.DistributedDataParallel if parallel else (lambda module: module)
        learner = learner_of("train.steps=1000", "train.box_fraction=0.5", "train.weight_decay=0.1", wrap=wrap)
        corner = learner.sam.prompt_encoder.point_embeddings[2].weight
        moved = []
        for step, batch in zip(range(8), batches_of(settings_of()), strict=False):
            before = corner.detach().clone()
            learner.step(batch)
            uses_boxes = draw_course(learner.config, step).use_boxes
            moved.append((uses_boxes, not torch.equal(before, corner)))
        assert {uses_boxes for uses_boxes, _ in moved} == {True, False}
        assert all(uses_boxes == has_moved for uses_boxes, has_moved in moved)
    finally:
        if parallel:
            torch.distributed.destroy_process_group()


def test_what_is_frozen_is_written_as_it_was(tmp_path: Path):
    learner = learner_of("train.trainable=decoder")
    before = {name: value.clone() for name, value in learner.sam.state_dict().items()}
    learner.step(next(batches_of(settings_of())))
    written = learner.weights()
    for name, value in written.items():
        learns = name.startswith("mask_decoder.")
        assert learns or torch.equal(value.float(), before[name].float()), name
        assert not learns or value.dtype == torch.float16 or not value.is_floating_point()


# --- files in OUTPUT ------------------------------------------------------------------------------------------------


def test_files_of_a_run_on_any_storage(output_root: str):
    """A save that dies before its position is written leaves the save before it in force."""
    store, learner = Store(output_root), learner_of()
    assert store.read_state() is None
    learner.position.step = 3
    save_all(learner, store)
    assert store.read_position() == Position(3, 0.0)
    store._put("state-00000007.pt", lambda path: path.write_bytes(b"of a save that died"))
    state = store.read_state()
    assert state is not None
    assert state["position"].step == 3
    learner.position.step = 8
    save_all(learner, store)
    names = storage.list_names(output_root)
    assert {name for name in names if name.startswith("state")} == {"state-00000008.pt"}
    store.write_metrics([{"kind": "train", "step": s} for s in (5, 8, 9)])
    assert [line["step"] for line in store.read_metrics(8)] == [5, 8]


def test_another_config_is_refused_with_the_difference(tmp_path: Path):
    store = Store(str(tmp_path))
    store.claim(settings_of().identity(), {})
    store.claim(settings_of("cluster.num_workers=2", "train.save_every_minutes=1").identity(), {})
    store.claim(settings_of("data.image_root=[s3://old,/new]", "data.cache=/elsewhere").identity(), {})
    run = json.loads((tmp_path / "train.json").read_text())
    run["identity"]["data"]["image_root"] = None  # as the first trainers wrote it
    (tmp_path / "train.json").write_text(json.dumps(run))
    store.claim(settings_of().identity(), {})
    with pytest.raises(ConfigError, match=r"train.seed: 0 there, 1 now[^$]*choose another OUTPUT"):
        store.claim(settings_of("train.seed=1").identity(), {})
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not valid"):
        store.claim(settings_of().identity(), {})
    (tmp_path / "train.json").unlink()
    (tmp_path / "position.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has position.json, but no train.json"):
        store.claim(settings_of().identity(), {})


def test_a_run_is_known_by_its_data_in_their_order_and_by_no_credential(tmp_path: Path):
    """`data.shares` goes by the order of DATA, and a DATA may stand there twice."""
    settings = settings_of()
    store = Store(str(tmp_path))
    pair = [("s3://KEY:SECRET@bucket/a", 3), ("s3://bucket/b", None)]
    store.claim(full_identity(settings, "micro", pair), {})
    store.claim(full_identity(settings, "micro", pair), {})
    for other in (pair[::-1], [pair[0], *pair], [(pair[0][0], 4), pair[1]]):
        with pytest.raises(ConfigError, match=r"data.uris: ") as refused:
            store.claim(full_identity(settings, "micro", other), {})
        assert "SECRET" not in str(refused.value)
    assert "SECRET" not in (tmp_path / "train.json").read_text()
    assert "SECRET" not in json.dumps(redact_json({"s3://KEY:SECRET@bucket": 1})), "nor as a key"


def test_a_teacher_is_known_by_its_content(tmp_path: Path):
    settings = [settings_of("train.distill_from=vit_t", f"train.distill_checkpoint={tmp_path / name}") for name in "ab"]
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"one")
    same = [full_identity(each, "micro", []) for each in settings]
    assert same[0] == same[1]
    (tmp_path / "b").write_bytes(b"another")
    assert full_identity(settings[1], "micro", []) != same[0]
