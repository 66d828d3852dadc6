"""What of a model learns, and how fast: layers, trainable parts, schedules, and branches left out."""

from typing import Any

import pytest
import torch

from samray.errors import ConfigError
from samray.sam.sam import Sam
from samray.train.optimizer import add_drop_path, layer_of, learning_rate, make_optimizer, set_trainable
from samray.train.settings import TrainConfig
from tests.support.micro import FAMILIES, MICRO, MICRO_VIT, batches_of, learner_of, settings_of

pytestmark = pytest.mark.usefixtures("micro_model")


@pytest.mark.parametrize("spec", [MICRO, MICRO_VIT], ids=["tiny_vit", "vit"])
def test_layers_learn_slower_towards_the_image(spec: Any):
    sam = Sam(spec)
    blocks_of = 4 if spec is MICRO_VIT else 3
    layers = layer_of(sam)
    assert {layers[name] for name in layers if name.startswith("mask_decoder")} == {blocks_of + 1}
    assert min(layers.values()) == 0
    optimizer = make_optimizer(sam, TrainConfig(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in sam.named_parameters():
        assert scale[id(parameter)] == 0.5 ** (blocks_of + 1 - layers[name]), name
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(sam.named_parameters())
    assert decays[id(named["mask_decoder.iou_token.weight"])] == 0
    assert decays[id(named["image_encoder.neck.0.weight"])] == 0.05
    alike = make_optimizer(sam, TrainConfig(layer_decay=1.0))
    assert len(alike.param_groups) == 2


def test_layers_of_a_tiny_vit_by_name():
    layers = layer_of(Sam(MICRO))
    assert layers["image_encoder.patch_embed.seq.0.c.weight"] == 0
    assert layers["image_encoder.layers.0.blocks.0.conv1.c.weight"] == 1
    assert layers["image_encoder.layers.0.downsample.conv1.c.weight"] == 1
    assert layers["image_encoder.layers.2.blocks.0.attn.qkv.weight"] == 3
    assert layers["image_encoder.neck.0.weight"] == layers["prompt_encoder.no_mask_embed.weight"] == 4


@pytest.mark.parametrize(
    ("trainable", "changed"),
    [
        ("all", ("image_encoder.patch_embed", "image_encoder.layers", "image_encoder.neck", "prompt", "mask_decoder")),
        ("decoder", ("mask_decoder",)),
        ("iou_head", ("mask_decoder.iou_prediction_head",)),
        ("decoder+prompt", ("prompt_encoder", "mask_decoder")),
        ("last_blocks:1", ("image_encoder.layers.2", "image_encoder.neck", "prompt", "mask_decoder")),
    ],
)
def test_only_what_is_trainable_changes_statistics_included(trainable: str, changed: tuple[str, ...]):
    overrides = (f"train.trainable={trainable}", "train.interaction_steps=2", "train.warmup_steps=1")
    learner = learner_of(*overrides)
    before = {name: value.clone() for name, value in learner.sam.state_dict().items()}
    for batch in batches_of(settings_of(*overrides), count=2):
        learner.step(batch)
    moved = {name for name, value in learner.sam.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith(changed) for name in moved), sorted(moved)
    for prefix in changed:
        assert any(name.startswith(prefix) for name in moved), prefix
    average = learner.average
    assert average is not None
    drifted = {n for n, v in average.state_dict().items() if not torch.equal(v, before[n])}
    assert drifted <= moved


def test_more_blocks_than_there_are_is_a_config_error():
    with pytest.raises(ConfigError, match="only 3 blocks"):
        set_trainable(Sam(MICRO), "last_blocks:4")


def test_the_schedules():
    cosine = TrainConfig(learning_rate=1.0, warmup_steps=10)
    assert learning_rate(cosine, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(cosine, 50, 0.5) == pytest.approx(0.5)
    assert learning_rate(cosine, 50, 1.0) == pytest.approx(0.0)
    step = TrainConfig(learning_rate=1.0, warmup_steps=1, schedule="step", decay_at=(0.5, 0.9))
    assert [learning_rate(step, 9, p) for p in (0.4, 0.5, 0.95)] == pytest.approx([1.0, 0.1, 0.01])
    assert learning_rate(TrainConfig(learning_rate=1.0, schedule="constant"), 500, 0.9) == 1.0


@pytest.mark.parametrize("spec", [MICRO, MICRO_VIT, *FAMILIES], ids=lambda spec: spec.name)
def test_drop_path_leaves_whole_branches_out_in_training_only(spec: Any):
    torch.manual_seed(0)
    sam = Sam(spec)
    pixels = torch.randn(2, 3, spec.image_size, spec.image_size)
    sam.eval()
    plain = sam.encode_images(pixels)
    add_drop_path(sam, 0.9)
    assert torch.equal(sam.encode_images(pixels), plain)
    sam.train()
    seen = []
    for module in sam.modules():
        is_attention = type(module).__name__.endswith("Attention") and hasattr(module, "qkv")
        if is_attention or type(module).__name__ == "ChannelMixer":
            module.register_forward_hook(lambda m, i, out: seen.append(out))
    for _ in range(6):
        sam.encode_images(pixels)
    per_image = torch.stack([out.unflatten(0, (2, -1)).flatten(1).abs().amax(dim=1) for out in seen])
    assert (per_image == 0).any()
    assert (per_image > 0).any()
