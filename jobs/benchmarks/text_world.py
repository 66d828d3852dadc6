"""A small world for text prompts: painted things of a colour and a shape, and a small CLIP that knows their names."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch.nn.functional import cross_entropy, normalize

from jobs.benchmarks.clip_files import write_tokenizer
from jobs.benchmarks.measuring import progress
from samray.labels.pixels import Pixels
from samray.labels.zero_shot import square_around
from samray.scenes.paint import clouds
from samray.scenes.scene import Scene
from samray.train.text_prompts import box_of

COLOURS: Final = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 215),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 180),
    "white": (240, 240, 240),
}
CLIP_SIDE: Final = 32
TEMPLATE: Final = "a photo of a {}."
"""The default of `labels.templates`."""
_BATCH: Final = 64
FIRST_CLIP_SCENE: Final = 2**40
_FIVE: Final = 2 * np.pi / 5
SHAPES: Final[dict[str, list[tuple[float, float]]]] = {
    "circle": [(np.cos(t), np.sin(t)) for t in np.linspace(0, 2 * np.pi, 48, endpoint=False)],
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0, -1), (0.95, 0.75), (-0.95, 0.75)],
    "star": [(r * np.sin(i * _FIVE / 2), -r * np.cos(i * _FIVE / 2)) for i, r in enumerate([1.05, 0.42] * 5)],
    "cross": [
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ],
    "bar": [(-1.1, -0.28), (1.1, -0.28), (1.1, 0.28), (-1.1, 0.28)],
}  # fmt: skip
"""Outlines in a square from -1 to 1, y downwards."""
PHRASES: Final = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
HELD_OUT: Final = [f"{colour} {shape}" for colour, shape in zip(COLOURS, SHAPES, strict=True)]
"""One of each colour and one of each shape: neither CLIP nor SAM ever sees these in training."""
KNOWN: Final = [phrase for phrase in PHRASES if phrase not in HELD_OUT]


def paint(seed: int, size: int, phrases: Sequence[str], num_objects: tuple[int, int] = (2, 5)) -> Scene:
    """A grey, cloudy background and some things, each of another one of the phrases; all are visible as a whole."""
    rng = np.random.default_rng(seed)
    grey = 90 + 60 * clouds(rng, size, size) + rng.uniform(-30, 30)
    canvas = Image.fromarray(np.repeat(grey[..., None], 3, axis=2).clip(0, 255).astype(np.uint8))
    names: list[str] = []
    masks: list[npt.NDArray[np.bool_]] = []
    taken = np.zeros((size, size), bool)
    for name in rng.permutation(phrases)[: rng.integers(num_objects[0], num_objects[1] + 1)].tolist():
        for _ in range(10):  # tries to find room
            alpha = _outline(rng, size, SHAPES[name.split()[1]])
            mask = np.asarray(alpha) > 127
            if not (mask & taken).any():
                colour = np.array(COLOURS[name.split()[0]]) * rng.uniform(0.8, 1.1) + rng.normal(0, 10, 3)
                canvas.paste(tuple(int(c) for c in colour.clip(0, 255)), (0, 0), alpha)
                taken |= np.asarray(alpha.filter(ImageFilter.MaxFilter(5))) > 0
                names.append(name)
                masks.append(mask)
                break
    pixels = np.asarray(canvas, np.float32) + rng.normal(0, 5, (size, size, 3))
    return Scene(
        image=pixels.clip(0, 255).astype(np.uint8),
        masks=np.stack(masks),
        kinds=["object"] * len(masks),
        names=list(names),
    )


def _outline(rng: np.random.Generator, size: int, corners: Sequence[tuple[float, float]]) -> Image.Image:
    """A shape somewhere in the image, as its antialiased alpha (size, size)."""
    radius = size * rng.uniform(0.11, 0.2)
    x, y = rng.uniform(radius, size - radius, 2)
    angle = rng.uniform(-0.35, 0.35)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    xy = np.array(corners) @ turn * radius + (x, y)
    image = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(image).polygon([(px, py) for px, py in (2 * xy).tolist()], fill=255)
    return image.reduce(2)


# --- DATA ------------------------------------------------------------------------------------------------------------


def write_coco(folder: Path, scenes: Iterator[Scene]) -> None:
    """images/ and coco.json with the masks and names, for `samray import`."""
    from pycocotools import mask as coco_mask

    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes):
        name = f"{number:05d}.png"
        (folder / "images" / name).write_bytes(png(scene.image))
        h, w = scene.image.shape[:2]
        images.append({"id": number, "file_name": name, "height": h, "width": w})
        for mask, phrase in zip(scene.masks, scene.names, strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            annotations.append({
                "id": len(annotations), "image_id": number, "category_id": PHRASES.index(str(phrase)) + 1,
                "segmentation": {"size": [h, w], "counts": rle["counts"].decode()}, "iscrowd": 0,
                "area": int(mask.sum()), "bbox": coco_mask.toBbox(rle).tolist(),
            })  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(PHRASES, start=1)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(coco))


def png(image: npt.NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


# --- a small CLIP ----------------------------------------------------------------------------------------------------


def train_clip(
    folder: Path, phrases: Sequence[str], steps: int, seed: int = 0, num_scenes: int = 600
) -> tuple[float, float]:
    """Train a small CLIP on cut-outs of painted things and their phrases, and write it in the official layout.

    Returns the share of cut-outs of unseen scenes whose nearest one of all PHRASES is their own: of KNOWN, of HELD_OUT.
    """
    from transformers import CLIPModel, CLIPTokenizer

    words = sorted({word for phrase in PHRASES for word in phrase.split()} | {"a", "photo", "of"})
    vocabulary = write_tokenizer(folder, words, CLIP_SIDE)
    torch.manual_seed(seed)
    model = CLIPModel(_clip_config(vocabulary))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    pixels = Pixels.from_json(json.loads((folder / "preprocessor_config.json").read_text()), CLIP_SIDE)
    squares, numbers = _cut_outs(phrases, range(num_scenes), pixels)
    texts = tokenizer([TEMPLATE.replace("{}", phrase) for phrase in phrases], padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in progress(range(steps), "training CLIP"):
        chosen = torch.randint(len(squares), (_BATCH,), generator=generator)
        shown = normalize(model.get_image_features(pixels.normalise(squares[chosen].numpy())).pooler_output, dim=-1)
        text_embeddings = normalize(model.get_text_features(**texts).pooler_output, dim=-1)
        logits = model.logit_scale.exp() * shown @ text_embeddings.T  # (B, phrases)
        # Both ways, as in CLIP; a phrase of several cut-outs of the batch belongs to each of them.
        is_phrase_of = torch.nn.functional.one_hot(numbers[chosen], len(phrases)).float()
        present = is_phrase_of.sum(dim=0) > 0
        by_phrase = (is_phrase_of / is_phrase_of.sum(dim=0).clamp(min=1)).T[present]
        loss = cross_entropy(logits, numbers[chosen]) + cross_entropy(logits.T[present], by_phrase)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    return _accuracy(model, tokenizer, pixels)


def _clip_config(vocabulary: dict[str, int]) -> Any:
    from transformers import CLIPConfig

    end = vocabulary["<|endoftext|>"]
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = size | {
        "vocab_size": len(vocabulary), "max_position_embeddings": 16, "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": end, "pad_token_id": end,
    }  # fmt: skip
    vision = size | {"image_size": CLIP_SIDE, "patch_size": 8}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)


def _cut_outs(phrases: Sequence[str], seeds: range, pixels: Pixels) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, size, size, 3) uint8 cut-outs of all things in these scenes, and the number of the phrase of each, (N,)."""
    squares, numbers = [], []
    for seed in seeds:
        scene, rng = paint(FIRST_CLIP_SCENE + seed, 96, phrases), np.random.default_rng(seed)
        for mask, name in zip(scene.masks, scene.names, strict=True):
            shown = scene.image if rng.random() < 0.5 else np.where(mask[..., None], scene.image, np.uint8(0))
            squares.append(pixels.resized(square_around(shown, box_of(mask), rng.uniform(1, 2))))
            numbers.append(phrases.index(str(name)))
    return torch.from_numpy(np.stack(squares)), torch.tensor(numbers)


@torch.no_grad()
def _accuracy(model: Any, tokenizer: Any, pixels: Pixels) -> tuple[float, float]:
    squares, numbers = _cut_outs(PHRASES, range(10_000, 10_100), pixels)
    texts = tokenizer([TEMPLATE.replace("{}", phrase) for phrase in PHRASES], padding=True, return_tensors="pt")
    shown = normalize(model.get_image_features(pixels.normalise(squares.numpy())).pooler_output, dim=-1)
    said = normalize(model.get_text_features(**texts).pooler_output, dim=-1)
    is_held_out = torch.tensor([PHRASES[n] in HELD_OUT for n in numbers])
    right = (shown @ said.T).argmax(dim=1) == numbers
    return float(right[~is_held_out].float().mean()), float(right[is_held_out].float().mean())
