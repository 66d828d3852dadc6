"""Training examples: an image of the input size, N masks of it, and the prompts that ask for them.

Two kinds of DATA make them: images that are labelled (an OUTPUT of `samray label` or `samray import`), and painted
scenes. Both are picklable and made once, by the driver. An example is a function of its number and the seed alone.

Shape letters as in `samray.sam.spec`: N prompts of an image, S the square input side, R = 4h = 4w the side of the
decoder's low-res logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from samray import storage
from samray.dataset.mask_dataset import MaskDataset
from samray.errors import ConfigError, StorageError
from samray.evaluate.scenes import heldout_scenes
from samray.scene_paint import Source
from samray.scenes import Bool, Scene, make_scene
from samray.train.augment import View, draw_view, jitter_colour, whole_view
from samray.train.clicks import first_prompts
from samray.train.settings import DataConfig

KIND_WEIGHTS = {"object": 0.8, "part": 0.14, "region": 0.06}
"""How often a click asks for each kind of a scene's masks, where it has it. A click on a part is also one on its whole:
with more parts than these the model would score a part above the whole that is mostly meant."""
SHAPES = (1.0, 1.0, 3 / 4, 2 / 3, 9 / 16)
"""Short over long side of painted scenes: photographs are rarely square, and padding must be met in training."""
MIN_VISIBLE_PIXELS = 16
"""Of a mask, in a view of its image: what has less left is not asked for."""
_TRIES = 8
"""Images that are tried in the place of one that cannot be read or has no mask left in view."""
_VALIDATION_MASKS = 16

Arrays = dict[str, npt.NDArray[Any]]
"""An example: image (S, S, 3) uint8, zero where padded; input_hw (2,) int64; points (N, 2) and boxes_xyxy (N, 4)
float32, input frame; targets (N, R, R) uint8, 255 times the covered share; from_labels () bool, False of a painted
scene."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What a model asks of an example."""

    image_size: int
    """S."""
    low_res: int
    """R."""


def pack(
    image: npt.NDArray[np.uint8],
    masks: Bool,
    frame: Frame,
    config: DataConfig,
    rng: np.random.Generator,
    *,
    from_labels: bool = False,
) -> Arrays:
    """An example of a view that fits the input: prompts drawn, everything padded.

    image: (h, w, 3), at most S x S. masks: (N, h, w), none empty.
    """
    (h, w), size = image.shape[:2], frame.image_size
    points, boxes = first_prompts(masks, config.centre_fraction, rng)
    square = np.zeros((len(masks), size, size), bool)
    square[:, :h, :w] = masks
    padded = np.zeros((size, size, 3), np.uint8)
    padded[:h, :w] = image
    return {
        "image": padded,
        "input_hw": np.array([h, w]),
        "points": points,
        "boxes_xyxy": boxes,
        "targets": area_downsample(square, frame.low_res),
        "from_labels": np.array(from_labels),
    }


def area_downsample(masks: Bool, side: int) -> npt.NDArray[np.uint8]:
    """masks: (N, S, S) with S a multiple of `side`. Returns (N, side, side) uint8, 255 times the covered share."""
    n, size, _ = masks.shape
    cell = size // side
    assert cell * side == size, "the input side is a multiple of the low-res side"
    cells = masks.reshape(n, side, cell, side, cell).sum(axis=(2, 4), dtype=np.uint16)
    share: npt.NDArray[np.uint8] = (cells * 255 // (cell * cell)).astype(np.uint8)
    return share


# --- painted scenes --------------------------------------------------------------------------------------------------


class SceneExamples:
    """Draw number i is painted from scene seed i, on the fly: training never sees a scene twice."""

    num_images: int | None = None

    def __init__(self, source: Source | None, config: DataConfig, seed: int) -> None:
        self.source, self.config, self.first_seed = source, config, seed * 2**40

    def example(self, draw: int, frame: Frame) -> Arrays:
        seed = self.first_seed + draw
        rng = np.random.default_rng([seed, 1])
        short = int(rng.choice(SHAPES) * frame.image_size)
        size = (short, frame.image_size) if rng.random() < 0.65 else (frame.image_size, short)
        scene = make_scene(seed, size, self.source)
        retry = 0
        while not scene.kinds:  # everything hidden or too small: rare
            retry += 1
            scene = make_scene(seed + (retry << 48), size, self.source)
        weights = np.array([KIND_WEIGHTS[kind] / scene.kinds.count(kind) for kind in scene.kinds])
        chosen = rng.choice(len(scene.kinds), self.config.prompts_per_image, p=weights / weights.sum())
        return pack(scene.image, scene.masks[chosen], frame, self.config, rng)

    def validation(self, limit: int, frame: Frame) -> Iterator[Scene]:
        """Scenes of the split that training never paints."""
        return heldout_scenes(limit, frame.image_size, self.source)


# --- labelled images -------------------------------------------------------------------------------------------------


class MaskExamples:
    """The labelled images of an OUTPUT that have a mask, but for those held out.

    Epoch after epoch, each in an order of its own; draw number i is image i % n of epoch i // n. An image that cannot
    be read, or has no mask that is large enough, gives way to the next.
    Raises: ConfigError where there is none to train on or to validate on, StorageError.
    """

    def __init__(self, output: str, config: DataConfig, seed: int, place: int = 0) -> None:
        self.config, self.seed, self.place = config, seed, place
        self.dataset = MaskDataset(
            output,
            masks="rle",
            min_predicted_iou=config.min_predicted_iou,
            min_area=config.min_area,
            keep_empty=False,
            image_root=config.image_root,
        )
        held = held_out(self.dataset.uris(), config.validation_fraction)
        self.train, self.heldout = np.flatnonzero(~held), np.flatnonzero(held)
        where = storage.redact(output)
        if len(self.train) == 0:
            raise ConfigError(f"all {len(held)} images of {where} are held out; lower data.validation_fraction")
        self._why = ""
        self._order = lru_cache(2)(self._draw_order)

    @property
    def num_images(self) -> int:
        return len(self.train)

    def example(self, draw: int, frame: Frame) -> Arrays:
        rng = np.random.default_rng([self.seed, self.place, draw])
        for further in range(_TRIES):
            epoch, at = divmod(draw + further, len(self.train))
            found = self._try(int(self._order(epoch)[at]), frame, rng)
            if found is not None:
                return found
        raise StorageError(
            f"of {_TRIES} images of {storage.redact(self.dataset.output)} in a row none could be used: {self._why}"
        )

    def _try(self, index: int, frame: Frame, rng: np.random.Generator) -> Arrays | None:
        """An example of an image; None where it cannot be read, or every mask is filtered out."""
        try:
            image, rles, weights = self._read(index)
        except StorageError as error:
            self._why = str(error)
            return None
        (h, w), config = image.shape[:2], self.config
        view = draw_view(h, w, frame.image_size, config.scale_jitter, config.flip_fraction, rng)
        masks = self._draw_masks(rles, weights, view, rng)
        if len(masks) == 0:
            view = whole_view(h, w, frame.image_size)
            masks = self._draw_masks(rles, weights, view, rng)
        if len(masks) == 0:
            self._why = "no mask is large enough"
            return None
        return pack(
            jitter_colour(view.of_image(image), config.colour_jitter, rng), masks, frame, config, rng, from_labels=True
        )

    def _read(self, index: int) -> tuple[npt.NDArray[np.uint8], list[dict[str, Any]], npt.NDArray[np.float64]]:
        """An image, its masks, and how often each is asked for, beside the others."""
        image, target = self.dataset[index]
        weights = target["area"].numpy().astype(np.float64) ** self.config.area_power
        if self.config.weigh_by_score:
            weights *= (target["predicted_iou"] * target["stability_score"]).numpy()
        return np.ascontiguousarray(image.permute(1, 2, 0).numpy()), target["segmentation"], weights

    def _draw_masks(
        self, rles: list[dict[str, Any]], weights: npt.NDArray[np.float64], view: View, rng: np.random.Generator
    ) -> Bool:
        """(N, h, w) random masks as the view shows them, some of them repeatedly where it shows too few; (0, h, w)."""
        number = self.config.prompts_per_image
        seen: list[Bool] = []
        # One after the other without putting back, each by its weight: the smallest of exponential waiting times.
        for place in np.argsort(rng.exponential(size=len(rles)) / np.maximum(weights, 1e-9), kind="stable"):
            mask = view.of_mask(coco_mask.decode(rles[place]).view(bool))
            if np.count_nonzero(mask) >= MIN_VISIBLE_PIXELS:
                seen.append(mask)
            if len(seen) == number:
                break
        if not seen:
            return np.zeros((0, *view.size_hw), bool)
        return np.stack([seen[i % len(seen)] for i in range(number)])

    def validation(self, limit: int, frame: Frame) -> Iterator[Scene]:
        """Held-out images, whole, their longest side at most S, with at most _VALIDATION_MASKS masks each."""
        for index in self.heldout[np.random.default_rng(0).permutation(len(self.heldout))[:limit]]:
            try:
                image, rles, _ = self._read(int(index))
            except StorageError:
                continue
            view = whole_view(image.shape[0], image.shape[1], frame.image_size)
            chosen = np.random.default_rng([0, int(index)]).permutation(len(rles))[:_VALIDATION_MASKS]
            seen = [view.of_mask(coco_mask.decode(rles[i]).view(bool)) for i in chosen]
            masks = [mask for mask in seen if np.count_nonzero(mask) >= MIN_VISIBLE_PIXELS]
            if masks:
                yield Scene(image=view.of_image(image), masks=np.stack(masks), kinds=["object"] * len(masks))

    def _draw_order(self, epoch: int) -> npt.NDArray[np.int64]:
        order: npt.NDArray[np.int64] = np.random.default_rng([self.seed, self.place, epoch]).permutation(self.train)
        return order

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(2)(self._draw_order)


def held_out(uris: list[str], fraction: float) -> npt.NDArray[np.bool_]:
    """(N,): which images are never trained on: this part of them, at least one where it is not 0.

    By a hash of the URI alone: the same in every run, on any data.
    """
    hashes = (int.from_bytes(hashlib.blake2b(uri.encode(), digest_size=4).digest(), "big") for uri in uris)
    values = np.fromiter(hashes, np.int64, len(uris))
    held: npt.NDArray[np.bool_] = values < int(fraction * 2**32)
    if fraction > 0 and not held.any():
        held[values.argmin()] = True
    return held
