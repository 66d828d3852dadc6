"""The trainer's settings: what they are taken from, the words of every refusal, and what they make of a cluster."""

import math
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest

from samray.config.models import MODELS, teacher_names
from samray.errors import ConfigError
from samray.sam.checkpoints import _shapes as shapes_of
from samray.train.learner import check_settings
from samray.train.settings import load_train_settings
from samray.train.sizes import choose_sizes
from tests.support.micro import settings_of


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=5", "unknown setting train.step; did you mean train.steps"),
        ("steps=5", "did you mean train.steps"),
        (
            "masks.points_per_side=8",
            "sections are data, model, train, mae, text, input, cluster",
        ),
        ("train.steps=null", "both null"),
        ("train.trainable=last_blocks:0", "last_blocks:N"),
        ("train.trainable=encoder", "decoder.prompt, lora or"),
        ("model.adapter=a.safetensors", "model.adapter is not allowed in training"),
        ("train.distill_checkpoint=a.pth", "needs train.distill_from"),
        ("model.dtype=float16", "auto, float32 or bfloat16"),
        ("model.device=cpu", "Ray gives each worker its device; cluster.num_gpus_per_worker=0 trains on the CPU"),
        ("data.scale_jitter=[2,1]", "takes a range above 0"),
        ("data.scale_jitter=2", "a list of two numbers"),
        ("data.shares=[-1]", "at least 0"),
        ("data.shares=x", "a list of numbers or null"),
        ("data.flip_fraction=2", "a number from 0 to 1"),
        ("train.schedule=linear", "one of cosine, step, constant"),
    ],
)
def test_wrong_settings_are_told_in_words(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_train_settings(None, [override])


@pytest.mark.parametrize(
    ("model", "override", "message"),
    [
        ("vit_b", "train.first_fraction=0.5", "needs a model with a TinyViT"),
        ("tiny", "train.distill_from=vit_h", "have 256 channels, those of tiny 128"),
        ("vit_h", "train.distill_from=vit_h", "must differ from model.name"),
        ("vit_t", "train.distill_from=sam2.1_l", r"sam2\.1_l \(SAM 2\.1\) has another one than vit_t \(SAM\)"),
        ("sam_hq_vit_t", "train.distill_from=vit_h", r"vit_h \(SAM\) has another one than sam_hq_vit_t \(SAM-HQ\)"),
        ("sam_hq_vit_t", "train.distill_from=sam_hq_vit_h", r"sam_hq_vit_h \(SAM-HQ\) has another one than"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(model: str, override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        check_settings(load_train_settings(None, [f"model.name={model}", override]))
    with pytest.raises(ConfigError, match=r"multiple of 16"):
        check_settings(load_train_settings(None, ["train.first_fraction=0.5", "train.first_image_size=100"]))


def test_a_teacher_has_what_is_copied_from_it_and_takes_the_same_pixels():
    settings, accepted = load_train_settings(), []
    for student, teacher in product(MODELS.values(), map(MODELS.get, teacher_names())):
        assert teacher is not None
        changed = {
            "model": settings.model.model_copy(update={"name": student.name}),
            "train": settings.train.model_copy(update={"distill_from": teacher.name}),
        }
        with suppress(ConfigError):
            check_settings(settings.model_copy(update=changed))
            accepted.append((student.name, teacher.name))
            same = [(spec.frame, spec.pixel_mean, spec.pixel_std, spec.image_size) for spec in (student, teacher)]
            assert same[0] == same[1]
            copied = [
                {name: shape for name, shape in shapes_of(spec).items() if not name.startswith("image_encoder.")}
                for spec in (student, teacher)
            ]
            assert copied[0] == copied[1]
    assert {("vit_t", "vit_h"), ("edgetam", "sam2.1_l"), ("sam2.1_t", "sam2_l")} <= set(accepted)


def test_lists_are_taken_from_files_and_the_command_line(tmp_path: Path):
    file = tmp_path / "train.yaml"
    file.write_text("train:\n  decay_at: [0.5, 1]\ndata:\n  sources: [a, b]\n  shares: [1, 2.5]\n")
    settings = load_train_settings(file, ["data.scale_jitter=[1,1]", "data.image_root=[s3://a,/b]"])
    assert settings.train.decay_at == (0.5, 1.0)
    assert settings.data.sources == ("a", "b")
    assert settings.data.shares == (1.0, 2.5)
    assert settings.data.scale_jitter == (1.0, 1.0)
    assert settings.data.image_root == ("s3://a", "/b")


def test_sizes_share_out_the_cluster():
    two_cores = [{"CPU": 2.0}]
    one = choose_sizes(settings_of(), two_cores)
    assert (one.num_workers, one.num_threads, one.num_data_actors, one.worker_gpus) == (1, 2, 1, 0)
    assert one.worker_cpus + 0.25 * one.num_data_actors < 2
    pair = choose_sizes(settings_of("cluster.num_workers=2"), [{"CPU": 1.0}])
    assert 2 * pair.worker_cpus + 0.25 * pair.num_data_actors <= 1
    gpus = choose_sizes(settings_of("train.batch_size=16"), [{"CPU": 64.0, "GPU": 8.0}])
    assert (gpus.num_workers, gpus.worker_gpus, gpus.num_data_actors) == (8, 1, 56)
    with pytest.raises(ConfigError, match=r"train.batch_size = 2 cannot be divided among 8 workers"):
        choose_sizes(settings_of(), [{"CPU": 64.0, "GPU": 8.0}])
    assert math.isclose(choose_sizes(settings_of(), [{"CPU": 1.0}]).worker_cpus, 0.5)


def test_a_worker_lies_on_one_node():
    three = [{"CPU": 4.0}] * 3
    assert choose_sizes(settings_of(), three).num_threads == 4, "not the twelve of all nodes"
    pair = choose_sizes(settings_of("cluster.num_workers=2"), [{"CPU": 8.0}, {"CPU": 2.0}])
    assert (pair.num_threads, pair.num_workers) == (4, 2), "both on the larger one"
    mixed = choose_sizes(settings_of("train.batch_size=6"), [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 16.0, "GPU": 2.0}, {}])
    assert (mixed.num_workers, mixed.num_threads) == (3, 8)
    for nodes in ([{"CPU": 1.0, "GPU": 1.0}], [{"CPU": 8.0, "GPU": 8.0}]):
        sizes = choose_sizes(settings_of("train.batch_size=8"), nodes)
        assert sizes.num_workers * sizes.worker_cpus + 0.25 * sizes.num_data_actors <= nodes[0]["CPU"]


def test_a_part_of_a_gpu_is_for_one_worker():
    one = [{"CPU": 8.0, "GPU": 1.0}]
    assert choose_sizes(settings_of("cluster.num_gpus_per_worker=0.5"), one * 2).num_workers == 1
    with pytest.raises(ConfigError, match=r"cluster.num_gpus_per_worker = 0.5 is for a single worker"):
        choose_sizes(settings_of("cluster.num_gpus_per_worker=0.5", "cluster.num_workers=2"), one)


def test_workers_without_a_place_are_refused_not_waited_for():
    two = [{"CPU": 8.0, "GPU": 1.0}] * 2
    with pytest.raises(ConfigError, match=r"no room for 1 training worker of 0.5 CPUs and 2 GPUs: the nodes"):
        choose_sizes(settings_of("cluster.num_gpus_per_worker=2"), two)
    with pytest.raises(ConfigError, match=r"no room for 1 training worker of 11\.5 CPUs"):
        choose_sizes(settings_of("cluster.num_cpus_per_worker=12"), [{"CPU": 4.0}] * 3)
    with pytest.raises(ConfigError, match="no room for 1 training worker"):
        choose_sizes(settings_of(), [{"CPU": 0.0, "GPU": 1.0}])
    overrides = ("cluster.num_workers=4", "cluster.num_gpus_per_worker=1", "cluster.num_cpus_per_worker=6")
    grows = choose_sizes(settings_of("train.batch_size=4", *overrides), [{"CPU": 0.0}])
    assert (grows.num_workers, grows.worker_gpus, grows.num_threads) == (4, 1.0, 6), "nodes that are yet to come"
    with pytest.raises(
        ConfigError, match=r"or set cluster.num_workers and cluster.num_gpus_per_worker for nodes that will be added"
    ):
        choose_sizes(settings_of("train.batch_size=4", overrides[0]), [{"CPU": 0.0}])
    ask = settings_of("cluster.num_workers=4", "train.batch_size=4")
    assert choose_sizes(ask, two).num_workers == 4, "the cluster may grow"
    with pytest.raises(ConfigError, match="no room for 4 training workers"):
        choose_sizes(ask, two, can_grow=False)
