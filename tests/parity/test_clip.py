"""Names by CLIP against plain `transformers` with the same random network: embeddings, probabilities, names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from samray.config import Config
from samray.config.labels import CROPS
from samray.errors import ConfigError
from samray.labels.clip import build_generator, load_namer, read_inputs
from samray.labels.pixels import Pixels
from samray.labels.zero_shot import ClipNetwork, Namer, cut_out, phrase_embeddings
from samray.masks.generator import MaskGenerator
from samray.sam.sam import Sam
from tests.parity.common import randomize
from tests.support.micro import MICRO
from tests.support.tiny_clip import IMAGE_SIZE, write_clip

PHRASES = ("red square", "green thing", "a large blue dog", "cat")
TEMPLATES = ("a photo of a {}.", "a large {}.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[Any, Any, Any]:
    """The network, tokenizer and image processor of transformers."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPModel.from_pretrained(folder).eval()
    return model, CLIPTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)


@pytest.fixture
def network(folder: Path, plain: tuple[Any, Any, Any]) -> ClipNetwork:
    numbers = Pixels.from_json(json.loads((folder / "preprocessor_config.json").read_text()), IMAGE_SIZE)
    return ClipNetwork(plain[0], plain[1], numbers)


def picture() -> tuple[np.ndarray, list[dict[str, Any]]]:
    """An image, and masks of several shapes: a disc, a bar, one at the border, all of the image."""
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    y, x = np.ogrid[:60, :90]
    masks = [
        (y - 30) ** 2 + (x - 40) ** 2 < 200,
        (abs(y - 12) < 3) & (x > 20) & (x < 70),
        (y > 40) & (x + y > 120),
        np.ones((60, 90), bool) & (x >= 0),
    ]
    return image, [record(mask) for mask in masks]


def record(mask: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()}}


def unit(features: Any) -> torch.Tensor:
    return torch.nn.functional.normalize(features.pooler_output.detach(), dim=-1)


def plain_crop(image: np.ndarray, mask: np.ndarray, crop: str) -> Image.Image:
    """The same cut-outs, written with Pillow alone."""
    ys, xs = np.nonzero(mask)
    left, top, right, bottom = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
    width, height = right - left, bottom - top
    if crop == "boxed":
        shown = Image.new("RGB", (image.shape[1], image.shape[0]), "white")
        shown.paste(Image.fromarray(image).crop((left, top, right, bottom)), (left, top))
        square = Image.new("RGB", (max(shown.size),) * 2, "white")
        square.paste(shown, ((square.width - shown.width) // 2, (square.width - shown.height) // 2))
        return square
    if crop == "blanked":
        image = image * mask[..., None].astype(np.uint8)
    side = round((1.5 if crop == "enlarged" else 1) * max(width, height))
    x, y = left + (width - side) // 2, top + (height - side) // 2
    return Image.fromarray(image).crop((x, y, x + side, y + side))  # Pillow pads with black


def test_phrases_are_embedded_as_by_transformers(plain: tuple[Any, Any, Any], network: ClipNetwork) -> None:
    model, tokenizer, _ = plain
    got = phrase_embeddings(network, PHRASES, TEMPLATES)
    for phrase, vector in zip(PHRASES, got, strict=True):
        texts = [template.format(phrase) for template in TEMPLATES]
        each = [unit(model.get_text_features(**tokenizer([text], return_tensors="pt"))) for text in texts]
        mean = torch.cat(each).mean(dim=0)
        assert torch.allclose(vector, mean / mean.norm(), atol=1e-4)


@pytest.mark.parametrize("crop", CROPS)
def test_a_cut_out_is_embedded_as_by_transformers(crop: str, plain: tuple[Any, Any, Any], network: ClipNetwork) -> None:
    model, _, processor = plain
    image, masks = picture()
    for mask in masks:
        inside = coco_mask.decode(mask["segmentation"]).astype(bool)
        wanted = plain_crop(image, inside, crop)
        square = cut_out(image, inside, coco_mask.toBbox(mask["segmentation"]).tolist(), crop)
        assert square.shape == (wanted.height, wanted.width, 3)
        assert np.array_equal(square, np.asarray(wanted))
        got = network.embed_squares(network.pixels.prepare(square)[None])
        pixels = processor(wanted, return_tensors="pt")["pixel_values"]
        assert torch.allclose(network.pixels.prepare(square), pixels[0], atol=1e-5)
        assert torch.allclose(got, unit(model.get_image_features(pixel_values=pixels)), atol=1e-4)


def test_with_one_crop_and_template_it_is_zero_shot_classification(
    plain: tuple[Any, Any, Any], network: ClipNetwork
) -> None:
    model, tokenizer, processor = plain
    image, masks = picture()
    namer = Namer(network, PHRASES, phrase_embeddings(network, PHRASES, ["a photo of a {}."]), ("plain",), 0.0)
    got = namer.probabilities(image, masks)
    crops = [plain_crop(image, coco_mask.decode(mask["segmentation"]).astype(bool), "plain") for mask in masks]
    texts = tokenizer([f"a photo of a {phrase}." for phrase in PHRASES], padding=True, return_tensors="pt")
    pixels = torch.cat([processor(crop, return_tensors="pt")["pixel_values"] for crop in crops])
    with torch.no_grad():
        wanted = model(**texts, pixel_values=pixels).logits_per_image.softmax(dim=1)
    assert torch.allclose(got, wanted, atol=1e-4)
    named = namer.name(image, masks)
    assert [mask["label"] for mask in named] == [PHRASES[i] for i in wanted.argmax(dim=1).tolist()]
    assert len({mask["label"] for mask in named}) > 1, "the random network tells the masks apart"
    assert [mask["label_score"] for mask in named] == pytest.approx(wanted.max(dim=1).values.tolist(), abs=1e-4)


def test_several_crops_are_averaged(plain: tuple[Any, Any, Any], network: ClipNetwork) -> None:
    model, _, processor = plain
    image, masks = picture()
    vectors = phrase_embeddings(network, PHRASES, TEMPLATES)
    crops = ("plain", "blanked", "enlarged")
    # Three at once: batches end within a mask.
    got = Namer(network, PHRASES, vectors, crops, 0.0, crops_at_once=4).probabilities(image, masks)
    for mask, row in zip(masks, got, strict=True):
        inside = coco_mask.decode(mask["segmentation"]).astype(bool)
        each = []
        for crop in crops:
            pixels = processor(plain_crop(image, inside, crop), return_tensors="pt")["pixel_values"]
            each.append(unit(model.get_image_features(pixel_values=pixels)))
        mean = torch.cat(each).mean(dim=0)
        logits = model.logit_scale.exp() * (vectors @ (mean / mean.norm()))
        assert torch.allclose(row, logits.softmax(dim=0), atol=1e-4)


def test_an_unlikely_name_is_left_out(network: ClipNetwork) -> None:
    image, masks = picture()
    vectors = phrase_embeddings(network, PHRASES, TEMPLATES)
    best = Namer(network, PHRASES, vectors, ("plain",), 0.0).probabilities(image, masks).max(dim=1).values
    middle = float(best.sort().values[1:3].mean())
    named = Namer(network, PHRASES, vectors, ("plain",), middle).name(image, masks)
    assert [mask["label"] is not None for mask in named] == [score >= middle for score in best.tolist()]
    assert [mask["label_score"] is None for mask in named] == [mask["label"] is None for mask in named]
    assert any(mask["label"] is None for mask in named)
    assert Namer(network, PHRASES, vectors, ("plain",)).name(image, []) == []


def settings(folder: Path, phrases: tuple[str, ...] = PHRASES, **changes: Any) -> Config:
    labels = {"by": "clip", "phrases": phrases, "checkpoint": str(folder), **changes}
    masks = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "points_per_side": 3}
    return Config(labels=labels, masks=masks)


@pytest.mark.parametrize("num_phrases", [1, 10, 100])
def test_all_masks_of_sam_are_named_with_one_pass_per_image(
    folder: Path, num_phrases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Sam(MICRO).eval()
    randomize(model, 0)
    with torch.no_grad():
        model.mask_decoder.iou_prediction_head.layers[-1].bias.fill_(20.0)
    phrases = tuple(f"thing {i}" for i in range(num_phrases))
    config = settings(folder, phrases, score_thresh=0.0)
    inputs = read_inputs(config)
    assert inputs.categories == list(phrases)
    images = [np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8) for seed in range(2)]
    wanted = MaskGenerator(model, config.masks).generate(images)
    make = build_generator(model, config, inputs)
    generator = make(None)
    num_encoded = []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels: num_encoded.append(len(pixels)) or encode(pixels))
    got = generator.generate(images)
    assert sum(num_encoded) == len(images), "SAM's encoder, once per image"
    assert generator.namer.network.num_crops == 3 * sum(map(len, wanted)), "CLIP's, once per cut-out"
    assert [[{k: v for k, v in mask.items() if not k.startswith("label")} for mask in masks] for masks in got] == wanted
    assert all(mask["label"] in phrases for masks in got for mask in masks)
    in_fours = [[mask["label"] for mask in masks] for masks in make(4).generate(images)]
    assert in_fours == [[mask["label"] for mask in masks] for masks in got], "the same in small batches"


@pytest.mark.parametrize("negatives", [(), (PHRASES[2], "wall")])
def test_phrases_of_an_image_are_as_if_asked_of_all(
    folder: Path, negatives: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(folder, score_thresh=0.0, negatives=negatives)
    namer = load_namer(config, read_inputs(config), "cpu")
    image, masks = picture()
    wanted = namer.name(image, masks)
    for num_common in (2, 0):
        config_of_common = settings(folder, PHRASES[:num_common] or None, score_thresh=0.0, negatives=negatives)
        namer_of_common = load_namer(config_of_common, read_inputs(config_of_common), "cpu")
        embed = Mock(side_effect=namer_of_common.network.embed_texts)
        monkeypatch.setattr(namer_of_common.network, "embed_texts", embed)
        for _ in range(2):
            got = namer_of_common.name(image, masks, PHRASES[num_common:])
            assert [mask["label"] for mask in got] == [mask["label"] for mask in wanted]
            scores = [mask["label_score"] for mask in wanted]
            assert [mask["label_score"] for mask in got] == pytest.approx(scores, abs=1e-4)
        texts = [f"a photo of a {phrase}." for phrase in PHRASES[num_common:]]
        assert embed.call_args_list == [call([text]) for text in texts], "each once"
    assert {mask["label"] for mask in namer_of_common.name(image, masks)} == {None}, "nothing is asked"


def test_a_network_that_is_not_the_runs_or_is_no_clip_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "clip"))
    config = settings(copy)
    inputs = read_inputs(config)
    assert load_namer(config, inputs, "cpu").phrases == PHRASES
    numbers = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps({**numbers, "crop_size": 64, "size": 64}))
    with pytest.raises(ConfigError, match="is not this run's network"):
        load_namer(config, inputs, "cpu")
    with pytest.raises(ConfigError, match="crops of 64 pixels out of 64, but the network takes 32"):
        load_namer(config, read_inputs(config), "cpu")
    (copy / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"cannot be loaded: preprocessor_config\.json has no image_mean"):
        load_namer(config, read_inputs(config), "cpu")
    settings_file = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings_file, "model_type": "siglip"}))
    with pytest.raises(ConfigError, match="needs 'clip'"):
        read_inputs(config)
