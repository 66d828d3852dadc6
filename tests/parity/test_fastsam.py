"""`labels.by=fastsam` against a plain script: letterbox, boxes, masks and choice as published, with Pillow's, OpenCV's
and transformers' own functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.nn.functional import interpolate

from samray.config import Config
from samray.labels.fastsam import FastSamGenerator, build_generator, read_inputs
from samray.labels.yolo_masks import INPUT_SIDE, MAX_MASKS, Letterbox, resized
from samray.prompts import Prompt
from tests.support.tiny_clip import write_clip
from tests.support.tiny_yolo import NUM_COEFFICIENTS, write_yolo

CPU = torch.device("cpu")
CONF, IOU = 0.6, 0.5
SIZES = [(60, 90), (131, 200), (240, 33)]
PHRASES = ("red square", "things", "a large blue dog")
NEGATIVES = ("object", "texture")


def picture(hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(hw[::-1], Image.Resampling.BICUBIC))


def settings(network: Path, **changes: Any) -> Config:
    return Config(labels={"by": "fastsam", "onnx": str(network), "conf_thresh": CONF, "nms_thresh": IOU, **changes})


def masks_of(config: Config, image: np.ndarray) -> list[dict[str, Any]]:
    (records,) = build_generator(CPU, config, read_inputs(config))(None).generate([image])
    return records


# --- the plain script ----------------------------------------------------------------------------------------------


def plain_letterbox(image: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Ultralytics' letterbox; without size the smallest with sides in steps of 32."""
    height, width = image.shape[:2]
    room_h, room_w = size or (INPUT_SIDE, INPUT_SIDE)
    gain = min(room_h / height, room_w / width)
    new_w, new_h = max(round(width * gain), 1), max(round(height * gain), 1)
    pad_w, pad_h = room_w - new_w, room_h - new_h
    if size is None:
        pad_w, pad_h = pad_w % 32, pad_h % 32
    if (new_h, new_w) != (height, width):
        image = resized(image, (new_h, new_w))  # compared with OpenCV's in a test of its own
    top, bottom = round(pad_h / 2 - 0.1), round(pad_h / 2 + 0.1)
    left, right = round(pad_w / 2 - 0.1), round(pad_w / 2 + 0.1)
    return cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(114, 114, 114))


def plain_nms(boxes: torch.Tensor, scores: torch.Tensor) -> list[int]:
    keep: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all(iou_of(boxes[i], boxes[k]) <= IOU for k in keep):
            keep.append(i)
    return keep[:MAX_MASKS]


def iou_of(a: torch.Tensor, b: torch.Tensor) -> float:
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    both = sides.prod()
    return float(both / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - both))


def plain_masks(network: Path, image: np.ndarray, size: tuple[int, int] | None) -> list[tuple[np.ndarray, float]]:
    """Masks (H, W) bool and confidences, all at once at the image's size, as with `retina_masks`."""
    import onnxruntime

    boxed = plain_letterbox(image, size)
    pixels = torch.from_numpy(boxed).permute(2, 0, 1)[None].float() / 255
    session = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
    anchors, prototypes = (torch.from_numpy(out[0]) for out in session.run(None, {"images": pixels.numpy()}))
    anchors = anchors.T[anchors.T[:, 4] > CONF]
    centre, sides = anchors[:, :2], anchors[:, 2:4]
    boxes = torch.cat([centre - sides / 2, centre + sides / 2], dim=1)
    keep = plain_nms(boxes, anchors[:, 4])
    boxes, scores, coefficients = boxes[keep], anchors[keep, 4], anchors[keep, 5:]
    assert coefficients.shape[1] == NUM_COEFFICIENTS
    # Boxes in the image.
    (height, width), (in_h, in_w) = image.shape[:2], boxed.shape[:2]
    gain = min(in_h / height, in_w / width)
    new_h, new_w = max(round(height * gain), 1), max(round(width * gain), 1)
    left, top = round((in_w - new_w) / 2 - 0.1), round((in_h - new_h) / 2 - 0.1)
    boxes = (boxes - torch.tensor([left, top, left, top])) / torch.tensor([new_w / width, new_h / height] * 2)
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2))
    # Masks: cells are divided until the border falls between two, then the image's part is brought to its size.
    cells = (coefficients @ prototypes.flatten(1)).reshape(1, -1, *prototypes.shape[1:])
    parts = next(f for f in (1, 2, 4) if all(v * f % 4 == 0 for v in (in_w - new_w, in_h - new_h, left, top)) or f == 4)
    if parts > 1:
        cells = interpolate(cells, scale_factor=parts, mode="bilinear")
    y, x, h, w = (value * parts // 4 for value in (top, left, new_h, new_w))
    expected = interpolate(cells[..., y : y + h, x : x + w], (height, width), mode="bilinear")[0].sigmoid() > 0.5
    rows, columns = torch.arange(height)[None, :, None], torch.arange(width)[None, None, :]
    x0, y0, x1, y1 = (side[:, None, None] for side in boxes.T)
    expected &= (columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1)
    return [(mask.numpy(), float(score)) for mask, score in zip(expected, scores, strict=True) if mask.any()]


@pytest.mark.parametrize("size", [None, (96, 64)])
@pytest.mark.parametrize("hw", SIZES)
def test_all_masks_are_those_of_a_plain_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] | None, hw: tuple[int, int]
) -> None:
    if size is None:  # smaller than the published side, for the test's sake
        monkeypatch.setattr("samray.labels.yolo_masks.INPUT_SIDE", 128)
        monkeypatch.setitem(globals(), "INPUT_SIDE", 128)
    network, image = write_yolo(tmp_path / "tiny.onnx", size=size), picture(hw)
    wanted = plain_masks(network, image, size)
    got = masks_of(settings(network), image)
    assert len(wanted) > 5, "the random network finds something"
    assert [record["predicted_iou"] for record in got] == pytest.approx([score for _, score in wanted], abs=1e-4)
    for record, (mask, _) in zip(got, wanted, strict=True):
        decoded = coco_mask.decode(record["segmentation"]).astype(bool)
        # A logit of zero up to rounding may fall on either side.
        assert (decoded != mask).sum() <= 1e-4 * mask.size
        assert record["area"] == decoded.sum()
        assert "label" not in record
        assert record["point_coords"] == []
        assert 0 <= record["stability_score"] <= 1
    areas = {record["area"] for record in got}
    assert len(areas) > 3, "masks of several sizes"


@pytest.mark.parametrize(("hw", "new"), [((60, 90), (96, 144)), ((300, 410), (64, 87)), ((5, 700), (1, 96))])
def test_images_are_resized_as_by_opencv(hw: tuple[int, int], new: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*hw, 3), dtype=np.uint8)
    wanted = cv2.resize(image, new[::-1], interpolation=cv2.INTER_LINEAR)
    difference = np.abs(resized(image, new).astype(int) - wanted)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_the_letterbox_of_a_slender_image_has_a_pixel(tmp_path: Path) -> None:
    assert Letterbox.fit((1, 5000), None) == Letterbox((1, 5000), (1, 1024), (32, 1024))
    config = settings(write_yolo(tmp_path / "tiny.onnx", size=(64, 64)), conf_thresh=0.0)
    for hw in ((1, 700), (700, 1), (1, 1)):
        assert isinstance(masks_of(config, np.zeros((*hw, 3), np.uint8)), list)


# --- with phrases ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def plain_probabilities(clip: Path, image: np.ndarray, masks: list[np.ndarray], texts: list[str]) -> torch.Tensor:
    """The authors' cut-outs (white outside of the box), compared with each text by transformers."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    shown = []
    for mask in masks:
        ys, xs = np.nonzero(mask)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        side = max(image.shape[:2])
        square = Image.new("RGB", (side, side), "white")
        left, top = (
            -((length - side) // 2) for length in image.shape[1::-1]
        )  # an odd border is wider before the image
        square.paste(Image.fromarray(image).crop(box), (left + int(box[0]), top + int(box[1])))
        shown.append(square)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(shown, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = model(**tokenizer(texts, padding=True, return_tensors="pt"), pixel_values=pixels)
    return outputs.logits_per_image.softmax(dim=1)


def test_phrases_choose_as_transformers_does(tmp_path: Path, clip: Path) -> None:
    network, image = write_yolo(tmp_path / "tiny.onnx", size=(96, 96)), picture((131, 200), seed=2)
    every = [mask for mask, _ in plain_masks(network, image, (96, 96))]
    wanted = plain_probabilities(clip, image, every, [*PHRASES, *NEGATIVES])
    best = wanted.max(dim=1)
    is_name = best.indices < len(PHRASES)
    thresh = float(best.values[is_name].median())
    common = {"phrases": PHRASES, "negatives": NEGATIVES, "checkpoint": str(clip)}
    got = masks_of(settings(network, **common, score_thresh=thresh - 1e-5), image)
    chosen = [i for i in range(len(every)) if is_name[i] and best.values[i] >= thresh]
    assert 0 < len(chosen) < int(is_name.sum()), "some masks are below the threshold"
    assert not is_name.all(), "some masks are like nothing in particular"
    assert [record["label"] for record in got] == [PHRASES[best.indices[i]] for i in chosen]
    assert [record["label_score"] for record in got] == pytest.approx(best.values[chosen].tolist(), abs=1e-4)
    for record, i in zip(got, chosen, strict=True):
        assert (coco_mask.decode(record["segmentation"]).astype(bool) != every[i]).sum() <= 1e-4 * every[i].size
    assert masks_of(settings(network, **common, score_thresh=1.0), image) == [], "none of them"
    # The same with phrases of the image alone, and nothing where nothing is asked.
    config = settings(network, **{**common, "phrases": PHRASES[:1]}, score_thresh=thresh - 1e-5)
    generator = build_generator(CPU, config, read_inputs(config, PHRASES[1:]))(None)
    (same,) = generator.generate([image], [[Prompt(text=text) for text in PHRASES[1:]]])
    assert [(one["label"], one["segmentation"]) for one in same] == [(one["label"], one["segmentation"]) for one in got]
    nobody = settings(network, **{**common, "phrases": None})
    assert build_generator(CPU, nobody, read_inputs(nobody, []))(None).generate([image]) == [[]]
    without = masks_of(settings(network, **{**common, "negatives": []}, score_thresh=0.0), image)
    assert len(without) == len(every), "without negatives each mask is like a phrase"


@pytest.mark.parametrize("num_phrases", [1, 10, 100])
def test_each_network_runs_once_per_image(
    tmp_path: Path, clip: Path, num_phrases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = write_yolo(tmp_path / "tiny.onnx", size=(96, 96))
    phrases = [f"thing {i}" for i in range(num_phrases)]
    config = settings(network, phrases=phrases, checkpoint=str(clip), score_thresh=0.0)
    generator = build_generator(CPU, config, read_inputs(config))(None)
    runs = []
    run = generator.finder.network.run
    monkeypatch.setattr(generator.finder.network, "run", lambda pixels: runs.append(pixels.shape) or run(pixels))
    images = [picture((60, 90)), picture((96, 96), seed=1)]
    generator.generate(images)
    assert len(runs) == len(images), "once per image"
    every = FastSamGenerator(config, generator.finder, None).generate(images)
    assert generator.namer.network.num_crops == sum(map(len, every)), "CLIP's, once per mask"
    assert set(generator.stage_seconds) == {"detect", "name"}
