"""Stored embeddings without Ray: values, files, faults, and masks made from them.

The file is long because its cases share their helpers.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import samray
from samray import storage
from samray.cli.embed import print_from_plan
from samray.cli.main import main
from samray.config import Config, load_config
from samray.config.edges import load_edges_config
from samray.config.embed import EmbedConfig, load_embed_config
from samray.errors import ConfigError, ImageError, StorageError
from samray.inputs.decode import decode_image
from samray.masks.generator import MaskGenerator
from samray.output import embedding_files, embeddings
from samray.output.compact import compact
from samray.output.embeddings import IMAGES_PER_FILE, embedding_of, file_uri, make_row, maps_of, read_file
from samray.output.manifests import Generation, create_generation
from samray.output.plan import Plan, load_plan, make_plan
from samray.output.schema import records_to_table
from samray.output.shards import commit_shard, done_shards, mark_success, read_shard
from samray.output.verify import verify
from samray.pipeline import label_from as relabelling
from samray.pipeline.isolated import answer_with
from samray.pipeline.kept import packed_embedding, with_embedding
from samray.pipeline.label_from import StoredLabelers, plan_label_from
from samray.pipeline.labeler import build_labeler
from samray.pipeline.plan_run import run_identity
from samray.sam.encoder import Features, packed, unpacked
from samray.sam.onnx_graphs import PaddedDecoder, Shapes, SquareDecoder
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, ModelSpec
from tests.support.embedded import begin, config_of, do_shard, finish, images_of, labeler_of, write_weights
from tests.support.labelled import BLACK, BROKEN, image_bytes
from tests.support.micro import MICRO, MICRO_HQ, MICRO_HQ_TINY, MICRO_SAM2
from tests.support.standin import make_image


@pytest.fixture(autouse=True)
def micro_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for spec in (MICRO, MICRO_FINE, MICRO_SAM2, MICRO_HQ, MICRO_HQ_TINY):
        monkeypatch.setitem(MODELS, spec.name, spec)
    monkeypatch.setattr(relabelling, "check_ray", lambda *_, **__: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Config]:
    """settings("output.embeddings=int8", spec=MICRO_SAM2)"""
    made: dict[str, str] = {}

    def make(*overrides: str, spec: ModelSpec = MICRO) -> Config:
        if spec.name not in made:
            made[spec.name] = write_weights(spec, tmp_path / f"{spec.name}.safetensors")
        return config_of(spec, made[spec.name], *overrides)

    return make


def model_of(config: Config) -> Sam:
    return samray.load_model(config.model.name, config.model.checkpoint, "cpu")


def rows_in(plan: Plan) -> list[dict[str, Any]]:
    return [row for shard in range(plan.num_shards) for row in read_shard(plan.output, shard).to_pylist()]


def relabel(source: Plan, dest: Path, config: Config) -> Plan:
    """`samray label --from` without Ray."""
    planned, source, _ = plan_label_from(source.output, str(dest), config)
    plan = planned.plan
    labeler = StoredLabelers(source, plan.generations[0].images_per_shard)(planned.config, 1)
    for shard in range(plan.num_shards):
        rows = plan.read_shard(shard)
        images = images_of(rows, shard, planned.config)
        if planned.prompts:
            of_shard = planned.prompts.by_shard(plan, [shard])[shard]
            images = [replace(image, prompts=of_shard.get(i, [])) for i, image in enumerate(images)]
        table = records_to_table(labeler.label(images).records, plan.run)
        assert commit_shard(plan.output, shard, table)
    mark_success(plan.output)
    return plan


# --- values ---------------------------------------------------------------------------------------------------------


def test_high_resolution_features_are_separated_as_they_were_packed() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 32, 4, 6), (2, 4, 16, 24), (2, 8, 8, 12))
    embedding, s0, s1 = (torch.randn(shape, generator=generator) for shape in shapes)
    again = unpacked(packed(Features(embedding, (s0, s1))), 32)
    assert torch.equal(again.embedding, embedding)
    assert again.high_res is not None
    assert torch.equal(again.high_res[0], s0)
    assert torch.equal(again.high_res[1], s1)
    assert unpacked(embedding, 32) == Features(embedding)


@pytest.mark.parametrize("spec", [MICRO_HQ, MICRO_HQ_TINY], ids=lambda spec: spec.name)
def test_sam_hqs_early_features_are_stored_with_the_embedding(spec: ModelSpec) -> None:
    torch.manual_seed(0)
    sam, image = Sam(spec).eval().requires_grad_(False), decode_image(make_image(1, (40, 16)), 10**6)
    (encoded,) = MaskGenerator(sam).encode([image])
    kept = with_embedding(sam, image, [], encoded, "float32")
    row = make_row(7, (16, 40), kept.input_hw, kept.maps, kept.dtype)
    assert {one["name"]: one["shape"][0] for one in row["features"]} == {
        "image_embeddings": spec.embed_dim,
        "early_features": spec.decoder.hq_dim,
    }
    assert torch.equal(packed_embedding(maps_of(row)), encoded)
    embedding = embedding_of(row, {"model": {"name": spec.name, "checkpoint_sha256": "0" * 64}}, "file")
    assert np.array_equal(embedding.onnx_inputs["image_embeddings"][0], encoded.numpy())


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_values_are_kept_to_the_precision_of_their_type(dtype: str) -> None:
    rng = np.random.default_rng(2)
    values = (rng.normal(size=(5, 3, 4)) * np.array([0.01, 1, 100, 0, 1e5])[:, None, None]).astype(np.float32)
    row = make_row(7, (30, 40), (48, 64), {"image_embeddings": values}, dtype)
    restored = maps_of(row)["image_embeddings"]
    assert restored.dtype == np.float32
    largest = np.abs(values).max(axis=(1, 2), keepdims=True)
    if dtype == "float32":
        assert np.array_equal(restored, values)
    elif dtype == "float16":
        wanted = np.clip(values, -65504, 65504)
        assert (np.abs(restored - wanted) <= np.abs(wanted) * 2**-11 + 2**-25).all()
    else:
        assert (np.abs(restored - values) <= largest / 127 * 0.5001).all()
    feature = row["features"][0]
    assert len(feature["data"]) == values.size * {"float32": 4, "float16": 2, "int8": 1}[dtype]
    assert (feature["scale"] is not None) == (dtype == "int8")


MICRO_FINE = replace(MICRO, name="micro_fine", encoder=replace(MICRO.encoder, fine_features=True))
"""As the embedded model: SAM's frame, and high-resolution features."""


@pytest.mark.parametrize("spec", [MICRO, MICRO_FINE, MICRO_SAM2], ids=lambda spec: spec.name)
def test_an_embedding_is_what_the_encoder_made(
    tmp_path: Path, settings: Callable[..., Config], spec: ModelSpec
) -> None:
    config = settings("output.embeddings=float32", spec=spec)
    plan = finish(begin(str(tmp_path), config), config)
    model = model_of(config)
    for row in rows_in(plan):
        image_id = row["image"]["image_id"]
        if image_id == BROKEN:
            with pytest.raises(ConfigError, match="has no embedding: it failed"):
                samray.read_embedding(plan.output, image_id)
            continue
        pixels, (input_hw,) = model.preprocess([decode_image(image_bytes(image_id), 10**6)])
        with torch.inference_mode():
            wanted = unpacked(model.encode_images(pixels), spec.embed_dim)
        embedding = samray.read_embedding(plan.output, image_id)
        assert np.array_equal(embedding.image_embeddings, wanted.embedding.numpy())
        if wanted.high_res is None:
            assert list(embedding.features) == ["image_embeddings"]
        else:
            for name, value in zip(("high_res_feats_0", "high_res_feats_1"), wanted.high_res, strict=True):
                assert np.array_equal(embedding.features[name], value.numpy())
        if spec.frame == "pad":
            assert np.array_equal(embedding.onnx_inputs["image_embeddings"], packed(wanted).numpy())
        shapes = Shapes.of(model, wanted)
        decoder = (PaddedDecoder if spec.frame == "pad" else SquareDecoder)(model, shapes, single_mask=False)
        ports = {port.name: port.shape for port in decoder.inputs}
        assert {name: value.shape for name, value in embedding.onnx_inputs.items()}.items() <= ports.items()
        assert embedding.original_hw == (row["image"]["height"], row["image"]["width"]) == (16, 24 + image_id)
        assert embedding.input_hw == input_hw
        assert embedding.scale_xy == (input_hw[1] / (24 + image_id), input_hw[0] / 16)
        assert (embedding.image_size, embedding.model, embedding.dtype) == (64, spec.name, "float32")
        assert embedding.model_sha256 == plan.run["identity"]["model"]["checkpoint_sha256"]
    with pytest.raises(ConfigError, match="has no image_id 99 among its 10 images"):
        samray.read_embedding(plan.output, 99)
    assert verify(plan.output, deep=True).problems == []


def test_embedding_adds_nothing_to_the_masks(tmp_path: Path, settings: Callable[..., Config]) -> None:
    rows = []
    for how in ("none", "int8"):
        config = settings(f"output.embeddings={how}", "masks.crop_n_layers=1")
        rows.append(rows_in(finish(begin(str(tmp_path / how), config), config)))
    assert [row["annotations"] for row in rows[0]] == [row["annotations"] for row in rows[1]]
    assert sum(len(row["annotations"]) for row in rows[0]) > 10
    assert not (tmp_path / "none" / "labels" / "embeddings").exists()
    embedding = samray.read_embedding(str(tmp_path / "int8" / "labels"), 0)
    assert embedding.image_embeddings.shape == (1, 32, 4, 4), "of the whole image, not of a crop"
    with pytest.raises(ConfigError, match=r"has no embeddings: it was made without output\.embeddings"):
        samray.read_embedding(str(tmp_path / "none" / "labels"), 0)


# --- masks from embeddings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [MICRO, MICRO_SAM2], ids=lambda spec: spec.name)
@pytest.mark.parametrize("per_shard", [4, 3])
def test_float32_embeddings_give_identical_masks(
    tmp_path: Path,
    settings: Callable[..., Config],
    spec: ModelSpec,
    per_shard: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = settings("output.embeddings=float32", spec=spec)
    source = finish(begin(str(tmp_path), stored), stored)
    others = ("masks.points_per_side=5", "masks.pred_iou_thresh=0.7", f"output.images_per_shard={per_shard}")
    config = settings(*others, spec=spec)
    plan = make_plan(str(tmp_path / "in"), str(tmp_path / "wanted"), config, run_identity(config))
    wanted = rows_in(finish(plan, config))
    for image in (tmp_path / "in").iterdir():
        image.write_bytes(b"")  # not read again
    monkeypatch.setattr(Sam, "encode_images", lambda *_: pytest.fail("the encoder ran"))
    # Without a model: that of the embeddings.
    changed_config = load_config(None, None, [*others, "masks.stability_score_thresh=0.5"])
    new = relabel(source, tmp_path / "new", changed_config)
    assert rows_in(new) == wanted
    assert sum(len(row["annotations"]) for row in wanted) > 10
    assert wanted[BROKEN]["status"] == "failed"
    # Random weights predict IoUs beyond what a trained model does.
    assert [p for p in verify(new.output, deep=True).problems if "score out of range" not in p] == []
    assert new.run["identity"]["from"]["embeddings"] == "float32"
    assert new.run["identity"]["masks"] == run_identity(config)["masks"]


def test_prompts_are_answered_from_embeddings(tmp_path: Path, settings: Callable[..., Config]) -> None:
    (tmp_path / "clicks.jsonl").write_text(
        '{"file_name": "img_001.png", "prompts": [{"points": [[3, 3]], "labels": [1]}, {"box": [2, 2, 12, 9]}]}\n'
        '{"file_name": "img_002.png", "prompts": [{"points": [[500, 8]], "labels": [1]}]}\n'
    )
    stored = settings("output.embeddings=float32", f"input.prompts={tmp_path}/clicks.jsonl")
    source = begin(str(tmp_path), stored)
    # Images without prompts are encoded, too.
    labeler = labeler_of(stored)
    for shard in range(source.num_shards):
        rows = source.read_shard(shard)
        images = [replace(image, prompts=[]) for image in images_of(rows, shard, stored)]
        writer = embedding_files.EmbeddingWriter(source, shard, range(len(images)), retry=False, compression_level=3)
        table = records_to_table(labeler.label(images, lambda b, w=writer: w.add(b.records)).records, source.run)
        commit_shard(source.output, shard, table)
    mark_success(source.output)
    config = settings(f"input.prompts={tmp_path}/clicks.jsonl")
    rows = rows_in(relabel(source, tmp_path / "new", config))
    generator = samray.PromptedGenerator(model_of(config), config.masks)
    prompts = [samray.Prompt(points=[(3, 3)], labels=[1]), samray.Prompt(box=(2, 2, 12, 9))]
    (wanted,) = generator.generate([decode_image(image_bytes(1), 10**6)], [prompts])
    assert [{k: v for k, v in mask.items() if k != "id"} for mask in rows[1]["annotations"]] == wanted
    assert rows[2]["error"].startswith("bad_prompt: prompts[0]")
    assert all(row["annotations"] == [] for row in rows[3:])


def test_what_needs_the_images_or_another_model_is_refused(
    tmp_path: Path, settings: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    stored = settings("output.embeddings=float16")
    source = finish(begin(str(tmp_path), stored), stored)
    other = write_weights(MICRO_SAM2, tmp_path / "other.safetensors")
    refused = {
        "masks.crop_n_layers=1": "masks.crop_n_layers needs the encoder",
        "output.embeddings=int8": "its embeddings are those of OUTPUT",
        "input.limit=2": "input.limit does not apply to --from",
        "model.name=vit_b": "model.name=vit_b cannot use the embeddings of",
        f"model.checkpoint={other}": f"model.checkpoint {other} is not the one that made the embeddings",
        f"input.prompts={tmp_path}/texts.jsonl": "has texts, which need the images",
    }
    texts = {"file_name": "000.png", "prompts": [{"text": "cat"}]}
    (tmp_path / "texts.jsonl").write_text(json.dumps(texts))
    for override, problem in refused.items():
        assert main(["label", "--from", source.output, str(tmp_path / "new"), override]) == 2
        assert problem in " ".join(capsys.readouterr().err.split())
    assert main(["label", "--from", source.output, str(tmp_path / "new"), "--append"]) == 2
    assert "--append does not go with --from" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="different folders"):
        plan_label_from(source.output, source.output, Config())
    plain = settings()
    without = finish(begin(str(tmp_path / "plain"), plain), plain)
    with pytest.raises(ConfigError, match="has no embeddings: label it with"):
        plan_label_from(without.output, str(tmp_path / "new"), Config())
    # Begun with other masks, or from other embeddings.
    relabel(source, tmp_path / "new", Config())
    with pytest.raises(ConfigError, match=r"masks\.points_per_side"):
        plan_label_from(source.output, str(tmp_path / "new"), load_config(None, None, ["masks.points_per_side=9"]))
    with pytest.raises(ConfigError, match="has another output, and not masks from"):
        plan_label_from(source.output, without.output, Config())
    do_shard(source, stored, labeler_of(stored), 0, retry=True)
    with pytest.raises(ConfigError, match="have been replaced since"):
        plan_label_from(source.output, str(tmp_path / "new"), Config())


def test_weights_that_the_output_names_are_shown_and_checked(
    tmp_path: Path, settings: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    """run.json may be somebody else's: its checkpoint was read without a word, and its dtype was not checked."""
    stored = settings("output.embeddings=float16")
    source = finish(begin(str(tmp_path), stored), stored)
    run_json = tmp_path / "labels" / "_samray" / "run.json"
    run = json.loads(run_json.read_text())
    (tmp_path / "secret").write_text("a secret")

    def refusal(part: dict[str, Any]) -> str:
        run_json.write_text(json.dumps({**run, **part}))
        assert main(["label", "--from", source.output, str(tmp_path / "new")]) == 2
        return " ".join(capsys.readouterr().err.split())

    origin = f"(model.checkpoint from the run.json of {source.output})"
    for name, said in (("secret", f"model.checkpoint {tmp_path}/secret is not the one"), ("gone", "does not exist")):
        model = {**run["config"]["model"], "checkpoint": str(tmp_path / name)}
        refused = refusal({"config": {**run["config"], "model": model}})
        assert said in refused
        assert refused.endswith(origin)
    for damaged in ({"name": {}}, {"dtype": "int7"}, {"checkpoint_sha256": 5}):
        model = {**run["identity"]["model"], **damaged}
        assert "run.json" in refusal({"identity": {**run["identity"], "model": model}})
    assert "run.json is not valid" in refusal({"identity": {**run["identity"], "masks": []}})
    assert not (tmp_path / "new").exists()
    run_json.write_text(json.dumps(run))
    planned, _, _ = plan_label_from(source.output, str(tmp_path / "new"), Config())
    for given, is_shown in ((Config().model, True), (stored.model, False)):
        print_from_plan(planned, given)
        shown = "".join(capsys.readouterr().err.split())  # long paths are cut into lines
        assert str(planned.config.model.checkpoint) in shown
        assert (f"model.checkpointfromtherun.jsonof{source.output}" in shown) == is_shown


def test_settings_that_cannot_store_embeddings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not apply with labels\.by=clip"):
        load_config(None, None, ["output.embeddings=int8", "labels.by=clip", "labels.phrases=[cat]"])
    with pytest.raises(ConfigError, match="does not apply to edges"):
        load_edges_config(None, ["output.embeddings=int8"])
    with pytest.raises(ConfigError, match=r"output\.embeddings = 'none' is not allowed"):
        load_embed_config(None, ["output.embeddings=none"])
    with pytest.raises(ConfigError, match=r"input\.prompts does not apply to samray embed"):
        load_embed_config(None, ["input.prompts=clicks.jsonl"])


# --- files ------------------------------------------------------------------------------------------------------------


def test_an_output_of_before_resumes_without_and_refuses_with_embeddings(
    tmp_path: Path, settings: Callable[..., Config]
) -> None:
    config, stored = settings(), settings("output.embeddings=int8")
    plan = begin(str(tmp_path), config)
    assert plan.run["identity"]["output"] == {"images_per_shard": 4}, "as an older samray wrote it"
    for joining in (False, True):
        again = make_plan(str(tmp_path / "in"), plan.output, config, run_identity(config), joining=joining)
        assert again.num_images == 10
        with pytest.raises(ConfigError, match=r'output\.embeddings: "none" there, "int8" now'):
            make_plan(str(tmp_path / "in"), plan.output, stored, run_identity(stored), joining=joining)


def test_embed_alone(tmp_path: Path, settings: Callable[..., Config]) -> None:
    base = settings()
    config = EmbedConfig(model=base.model)
    assert config.output.embeddings == "float16"
    plan = finish(begin(str(tmp_path), config), config)
    assert plan.num_shards == 1
    rows = rows_in(plan)
    assert [row["status"] for row in rows].count("failed") == 1
    assert all(row["annotations"] == [] for row in rows)
    assert verify(plan.output, deep=True).problems == []
    assert "masks" not in plan.run["identity"]
    for row in rows[:3]:
        embedding = samray.read_embedding(plan.output, row["image"]["image_id"])
        pixels, _ = model_of(base).preprocess([decode_image(image_bytes(embedding.image_id), 10**6)])
        with torch.inference_mode():
            wanted = model_of(base).encode_images(pixels).numpy()
        assert np.abs(embedding.image_embeddings - wanted).max() <= np.abs(wanted).max() * 2**-11
    with pytest.raises(ConfigError, match="task"):
        make_plan(str(tmp_path / "in"), plan.output, base, run_identity(base))
    new = relabel(plan, tmp_path / "new", load_config(None, None, ["masks.points_per_side=4"]))
    assert verify(new.output, deep=True).problems == []


class Killed(Exception):
    """The process dies here."""


def test_killed_at_any_write_every_image_has_one_embedding(
    tmp_path: Path, settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("output.embeddings=float32", "output.images_per_shard=20", "masks.points_per_side=1")
    put_new = storage.put_new
    undisturbed = finish(begin(str(tmp_path / "whole"), config, 17), config)
    wanted = {name: (tmp_path / "whole" / "labels" / name).read_bytes() for name in written(undisturbed)}
    assert len(wanted) == 1 + -(-17 // IMAGES_PER_FILE)
    for deaths in range(2 * len(wanted)):
        root = tmp_path / str(deaths)
        plan, labeler, left = begin(str(root), config, 17), labeler_of(config), deaths

        def dying(uri: str, data: bytes) -> bool:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            created = put_new(uri, data)
            if left == 0:  # after the write, before anyone knows
                raise Killed
            left -= 1
            return created

        monkeypatch.setattr(storage, "put_new", dying)
        with pytest.raises(Killed):
            do_shard(plan, config, labeler, 0)
        monkeypatch.setattr(storage, "put_new", put_new)
        before = {name: (root / "labels" / name).stat().st_mtime_ns for name in written(plan)}
        if not done_shards(plan.output):
            do_shard(plan, config, labeler, 0)
        mark_success(plan.output)
        assert sorted(written(plan)) == sorted(wanted)
        assert all((root / "labels" / name).stat().st_mtime_ns == at for name, at in before.items()), "created once"
        assert verify(plan.output, deep=True).problems == []
        for shard in range(plan.num_shards):
            for file in range(2):
                assert read_file(plan.output, shard, file) == read_file(undisturbed.output, shard, file)


def written(plan: Plan) -> list[str]:
    folders = ("annotations", embeddings.FOLDER)
    return [f"{folder}/{name}" for folder in folders for name in storage.list_names(f"{plan.output}/{folder}")]


def test_redone_images_get_new_embeddings_and_the_others_keep_theirs(
    tmp_path: Path, settings: Callable[..., Config]
) -> None:
    config = settings("output.embeddings=float32", "output.images_per_shard=20")
    plan = finish(begin(str(tmp_path), config, 20), config)
    before = {file: read_file(plan.output, 0, file) for file in range(2)}
    assert [row["image_id"] for row in before[0]] == [i for i in range(16) if i != BROKEN]
    (tmp_path / "in" / f"img_{BROKEN:03d}.png").write_bytes(make_image(77, (30, 16)))
    (tmp_path / "in" / "img_007.png").write_bytes(make_image(78, (33, 16)))
    changed = plan.read_shard(0).slice(7, 1)
    create_generation(
        plan.output,
        Generation(1, plan.run["identity"], 0, 20, first_shard=plan.num_shards, num_changed=1),
        changed.slice(0, 0),
        changed,
    )
    plan = load_plan(plan.output)
    do_shard(plan, config, labeler_of(config), 0, retry=True)
    mark_success(plan.output)
    after = read_file(plan.output, 0, 0)
    assert [row["image_id"] for row in after] == list(range(16)), "in the order of the plan"
    same = [row["image_id"] for row in after if row in before[0]]
    assert same == [i for i in range(16) if i not in (BROKEN, 7)]
    assert after[7]["width"] == 33
    assert read_file(plan.output, 0, 1) == before[1]
    assert verify(plan.output, deep=True).problems == []


def test_a_file_of_a_killed_run_is_replaced_if_an_image_has_changed_since(
    tmp_path: Path, settings: Callable[..., Config]
) -> None:
    config = settings("output.embeddings=float32")
    plan, labeler = begin(str(tmp_path), config, 4), labeler_of(settings("output.embeddings=float32"))
    do_shard(plan, config, labeler, 0)
    Path(storage.join(plan.output, "annotations", "shard-000000.parquet")).unlink()  # killed before its commit
    old = read_file(plan.output, 0, 0)
    (tmp_path / "in" / "img_001.png").write_bytes(make_image(78, (33, 16)))
    changed = plan.read_shard(0).slice(1, 1)
    generation = Generation(1, plan.run["identity"], 0, 4, first_shard=plan.num_shards, num_changed=1)
    create_generation(plan.output, generation, changed.slice(0, 0), changed)
    plan = load_plan(plan.output)
    do_shard(plan, config, labeler, 0)
    new = read_file(plan.output, 0, 0)
    assert [row["width"] for row in old] == [24, 25, 26]
    assert [row["width"] for row in new] == [24, 33, 26]
    mark_success(plan.output)
    assert verify(plan.output, deep=True).problems == []


def test_verify_finds_what_is_wrong_with_embeddings(tmp_path: Path, settings: Callable[..., Config]) -> None:
    config = settings("output.embeddings=int8")
    plan = finish(begin(str(tmp_path), config, 4), config)
    path = Path(file_uri(plan.output, 0, 0))
    sound, rows = path.read_bytes(), read_file(plan.output, 0, 0)

    def problems(data: bytes | None, deep: bool = False) -> str:
        path.unlink() if data is None else path.write_bytes(data)
        return "\n".join(verify(plan.output, deep=deep).problems)

    def encoded(changed: list[dict[str, Any]], run: Any = plan.run) -> bytes:
        return embeddings.file_bytes(changed, run)

    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1
    short = {**rows[0], "features": [{**rows[0]["features"][0], "data": b"x"}]}
    infinite = {**rows[0], "features": [{**rows[0]["features"][0], "scale": [float("inf")] * 32}]}
    assert problems(sound, deep=True) == ""
    assert "is missing; delete the shard" in problems(None)
    assert "its checksum does not match" in problems(bytes(flipped))
    assert "image 1 has no embedding" in problems(encoded([rows[0], rows[2]]))
    assert "has images twice" in problems(encoded([rows[0], *rows]))
    assert "another order" in problems(encoded(rows[::-1]))
    assert "by a run with other settings" in problems(encoded(rows, {"identity": {}}))
    assert "is stored as float16" in problems(encoded([{**rows[0], "dtype": "float16"}, *rows[1:]]))
    assert "its row has another size" in problems(encoded([{**rows[0], "width": 9}, *rows[1:]]))
    assert "has values that samray does not write" in problems(encoded([short, *rows[1:]]), deep=True)
    assert "not finite" in problems(encoded([infinite, *rows[1:]]), deep=True)
    path.write_bytes(sound)
    (path.parent / "more.parquet").write_bytes(sound)
    assert verify(plan.output).problems == ["embeddings/more.parquet is not in the plan"]
    # A reader says so, too.
    path.write_bytes(encoded([short, *rows[1:]]))
    with pytest.raises(StorageError, match="has values that samray does not write"):
        samray.read_embedding(plan.output, 0)
    labeler = StoredLabelers(plan, 4)(config, 1)
    with pytest.raises(StorageError, match="damaged embedding of image 0"):
        labeler.label(images_of(plan.read_shard(0), 0, config))
    path.unlink()
    with pytest.raises(StorageError, match="lacks an embedding file"):
        labeler.label(images_of(plan.read_shard(0), 0, config))
    with pytest.raises(ConfigError, match="has no embedding yet"):
        samray.read_embedding(plan.output, 0)


def test_a_compacted_output_has_no_embeddings(tmp_path: Path, settings: Callable[..., Config]) -> None:
    config = settings("output.embeddings=int8")
    plan = finish(begin(str(tmp_path), config), config)
    compact(plan.output, str(tmp_path / "compact"), 10**6)
    assert verify(str(tmp_path / "compact"), deep=True).problems == []
    with pytest.raises(ConfigError, match="has no embeddings"):
        samray.read_embedding(str(tmp_path / "compact"), 0)


def test_an_image_that_is_labelled_alone_has_its_embedding(tmp_path: Path, settings: Callable[..., Config]) -> None:
    config = settings("output.embeddings=float32")
    plan = finish(begin(str(tmp_path), config, 3), config)
    rows, stored = rows_in(plan), read_file(plan.output, 0, 0)
    images = images_of(plan.read_shard(0), 0, config)
    answer = answer_with(pickle.dumps((config, build_labeler)))
    for image, row, embedding in zip(images, rows, stored, strict=True):
        pixels = decode_image(image.data, 10**6)
        labelled = pickle.loads(answer(pickle.dumps(replace(image, data=pixels)))[0])
        assert labelled.records[0].annotations == row["annotations"]
        assert labelled.records[0].embedding == embedding
    # And so has one whose masks are made from it.
    make_labeler = StoredLabelers(plan, 4)
    answer, labeler = answer_with(pickle.dumps((settings(), make_labeler))), make_labeler(settings(), 1)
    for image, row in zip(images, rows, strict=True):
        blank = labeler.decode(replace(image, data=lambda: pytest.fail("the image was read")))
        labelled = pickle.loads(answer(pickle.dumps(replace(image, data=blank)))[0])
        assert labelled.records[0].annotations == row["annotations"]


def test_an_image_out_of_memory_is_tried_again_with_fewer_points(
    tmp_path: Path, settings: Callable[..., Config]
) -> None:
    config = settings("output.embeddings=float32")
    plan = finish(begin(str(tmp_path), config, 2), config)
    wanted = rows_in(plan)
    labeler = StoredLabelers(plan, 4)(config, 1)
    (generator,) = labeler.generators
    generate = generator.generate
    failures = iter([MemoryError()])

    def failing(*args: Any) -> Any:
        for error in failures:
            raise error
        return generate(*args)

    generator.generate = failing  # type: ignore[method-assign]
    done = labeler.label(images_of(plan.read_shard(0), 0, config))
    assert [record.annotations for record in done.records] == [row["annotations"] for row in wanted]
    assert BLACK not in [record.image_id for record in done.records]
    assert not any(isinstance(record.error, ImageError) for record in done.records)
