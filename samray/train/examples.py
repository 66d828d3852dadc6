"""Training examples: an image of the input size, N of its masks, and prompts for them.

Two kinds of DATA provide them: labelled images (an OUTPUT of `samray label` or `samray import`), and synthetic scenes.
Both are picklable and created once, by the driver. An example depends only on its number and the seed.

Shape letters as in `samray.sam.spec`: N prompts of an image, S the square input side, R = 4h = 4w the side of the
decoder's low-res logits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from samray import storage
from samray.errors import ConfigError, StorageError
from samray.evaluate.scenes import heldout_scenes
from samray.output.mask_dataset import MaskDataset
from samray.rle.runs import checked_runs, pixels
from samray.scenes.paint import Source
from samray.scenes.scene import Bool, Scene, make_scene
from samray.text import abridged
from samray.train.augment import View, draw_view, jitter_colour, whole_view
from samray.train.clicks import first_prompts
from samray.train.order import EpochOrder
from samray.train.settings import DataConfig

KIND_WEIGHTS = {"object": 0.8, "part": 0.14, "region": 0.06}
"""Weights of the kinds of masks in a scene, among those it has. A click on a part is also a click on its whole: with
more parts than this the model would score a part above the whole, which is usually meant."""
SHAPES = (1.0, 1.0, 3 / 4, 2 / 3, 9 / 16)
"""Ratio of short to long side of scenes: photographs are rarely square, and training must include padding."""
MIN_VISIBLE_PIXELS = 16
"""Minimum visible pixels of a mask in a view; smaller ones are ignored."""
_TRIES = 8
"""Unreadable images in a row before an example fails."""
_VALIDATION_MASKS = 16

Arrays = dict[str, npt.NDArray[Any]]
"""An example: image (S, S, 3) uint8, zero padded; input_hw (2,) int64; points (N, 2) and boxes_xyxy (N, 4) float32,
input frame; targets (N, R, R) uint8, 255 times the covered fraction; from_labels () bool, False for a synthetic
scene."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The sizes that a model needs in an example."""

    image_size: int
    """S."""
    low_res: int
    """R."""
    is_padded: bool = True
    """As `samray.sam.frames.Frame.is_padded`; without padding a view is stretched to the whole square."""

    def placed(self, view: View) -> View:
        """The view as it gets into the square."""
        return view if self.is_padded else replace(view, size_hw=(self.image_size, self.image_size))


def pack(
    image: npt.NDArray[np.uint8],
    masks: Bool,
    frame: Frame,
    config: DataConfig,
    rng: np.random.Generator,
    *,
    from_labels: bool = False,
) -> Arrays:
    """Make an example of a view that fits the input: sample prompts and pad.

    image: (h, w, 3), at most S x S. masks: (N, h, w), none empty.
    """
    (h, w), size = image.shape[:2], frame.image_size
    # Pixels of the view are pixels of the input, because padding is only on the right and at the bottom.
    points, boxes = first_prompts(masks, config.centre_fraction, rng)
    # (N, S, S) and (S, S, 3), zero outside of the view.
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
    """masks: (N, S, S). Returns (N, side, side) uint8, 255 times the covered fraction."""
    n, size, _ = masks.shape
    # A cell of 3.5 pixels, as SAM 3 has them, has 7 halves of pixels.
    parts = math.lcm(size, side) // size
    if parts > 1:
        masks, size = masks.repeat(parts, axis=1).repeat(parts, axis=2), size * parts
    cell = size // side
    # (N, side, cell, side, cell). 255 times the pixels of a cell fits into 16 bits up to cells of 16 x 16.
    cells = masks.reshape(n, side, cell, side, cell).sum(axis=(2, 4), dtype=np.uint16)
    share: npt.NDArray[np.uint8] = (cells * 255 // (cell * cell)).astype(np.uint8)
    return share


# --- synthetic scenes ------------------------------------------------------------------------------------------------


class SceneExamples:
    """Draw i is generated from scene seed i on the fly: training never repeats a scene."""

    num_images: int | None = None

    def __init__(self, source: Source | None, config: DataConfig, seed: int) -> None:
        # Draws stay far below 2^40, so runs with other seeds see other scenes.
        self.source, self.config, self.first_seed = source, config, seed * 2**40

    def example(self, draw: int, frame: Frame) -> Arrays:
        seed = self.first_seed + draw
        rng = np.random.default_rng([seed, 1])
        short = int(rng.choice(SHAPES) * frame.image_size)
        size = (short, frame.image_size) if rng.random() < 0.65 else (frame.image_size, short)
        size = size if frame.is_padded else (frame.image_size, frame.image_size)
        scene = make_scene(seed, size, self.source)
        retry = 0
        while not scene.kinds:  # rare: everything is hidden or too small
            retry += 1
            # A seed that no other draw of this run has.
            scene = make_scene(seed + (retry << 48), size, self.source)
        # Each kind has its weight, however many masks of it there are.
        weights = np.array([KIND_WEIGHTS[kind] / scene.kinds.count(kind) for kind in scene.kinds])
        chosen = rng.choice(len(scene.kinds), self.config.prompts_per_image, p=weights / weights.sum())
        return pack(scene.image, scene.masks[chosen], frame, self.config, rng)

    def validation(self, limit: int, frame: Frame) -> Iterator[Scene]:
        """Scenes of the split that is not used for training."""
        return heldout_scenes(limit, frame.image_size, self.source)


# --- labelled images -------------------------------------------------------------------------------------------------


class MaskExamples:
    """The labelled images of an OUTPUT that have masks, without the held-out ones.

    Each epoch has its own order; draw i is image i % n of epoch i // n. An unreadable image, or one without suitable
    masks, is replaced by the next.
    Raises: ConfigError if there is nothing to train on, or if `data.image_root` fits only some URIs; StorageError.
    """

    def __init__(self, output: str, config: DataConfig, seed: int, index: int = 0) -> None:
        self.config, self.seed, self.index = config, seed, index
        self.dataset = MaskDataset(
            output,
            masks="rle",
            min_predicted_iou=config.min_predicted_iou,
            min_area=config.min_area,
            where=config.where,
            keep_empty=False,
            image_root=config.image_root,
        )
        self.chosen = None if config.labels is None else self._classes_of(config.labels)
        uris = self.dataset.uris()
        self.is_moved = config.image_root is not None and _are_below(config.image_root[0], uris)
        # With several DATA, image_root may be meant for another one.
        if not self.is_moved:
            self.dataset.image_root = None
        is_held_out = held_out(uris, config.validation_fraction)
        self.train, self.heldout = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
        where = storage.redact(output)
        if len(self.train) == 0:
            raise ConfigError(f"all {len(is_held_out)} images of {where} are held out; lower data.validation_fraction")
        self.order = EpochOrder(self.train, [seed, index])

    def _classes_of(self, labels: Sequence[str]) -> list[int]:
        """Raises: ConfigError if the output has none of these names."""
        names = self.dataset.classes
        chosen = [index for index, name in enumerate(names) if index > 0 and name in labels]
        if not chosen:
            raise ConfigError(
                f"data.labels: {storage.redact(self.dataset.output)} has none of these names; its names are "
                f"{abridged(names[1:], 20)}"
            )
        return chosen

    @property
    def num_images(self) -> int:
        return len(self.train)

    def example(self, draw: int, frame: Frame) -> Arrays:
        rng = np.random.default_rng([self.seed, self.index, draw])
        config, where = self.config, storage.redact(self.dataset.output)
        faults: list[StorageError] = []
        # The next image in place of an unusable one; at most all of them once.
        for attempt in range(len(self.train)):
            try:
                arrays = self._try(self.order[draw + attempt], frame, rng)
            except StorageError as error:
                faults.append(error)
                # Only unreadable images count; those without a fitting mask are passed over, however many there are.
                if len(faults) == _TRIES:
                    break
            else:
                if arrays is not None:
                    return arrays
        if faults:
            raise StorageError(f"{len(faults)} images of {where} cannot be used, the last: {faults[-1]}") from faults[
                -1
            ]
        raise ConfigError(
            f"none of the {len(self.train)} images of {where} has a mask to train on: lower data.min_area"
            f" ({config.min_area}) or data.min_predicted_iou ({config.min_predicted_iou})"
            f"{'' if config.labels is None else ', or add names to data.labels'}"
            f"{'' if config.where is None else ', or select more masks by data.where'}"
        )

    def _try(self, index: int, frame: Frame, rng: np.random.Generator) -> Arrays | None:
        """An example from an image; None if no mask is suitable or visible. Raises: StorageError."""
        # Masks first: an image without any need not be read.
        masks_of = self._masks(index)
        if masks_of is None:
            return None
        rles, weights = masks_of
        image = self._image(index)
        (h, w), config = image.shape[:2], self.config
        view = frame.placed(draw_view(h, w, frame.image_size, config.scale_jitter, config.flip_fraction, rng))
        masks = self._draw_masks(rles, weights, view, rng)
        # The random part shows none of the masks, so take the whole image.
        if len(masks) == 0:
            view = frame.placed(whole_view(h, w, frame.image_size))
            masks = self._draw_masks(rles, weights, view, rng)
        if len(masks) == 0:
            return None
        return pack(
            jitter_colour(view.of_image(image), config.colour_jitter, rng), masks, frame, config, rng, from_labels=True
        )

    def _image(self, index: int) -> npt.NDArray[np.uint8]:
        """(H, W, 3). Raises: StorageError."""
        return np.ascontiguousarray(self.dataset.image(index).permute(1, 2, 0).numpy())

    def _masks(self, index: int) -> tuple[list[dict[str, Any]], npt.NDArray[np.float64]] | None:
        """An image's masks and their sampling weights; None if there are none."""
        target = self.dataset.target(index)
        rles = target["segmentation"]
        # Positions of the masks to use; without data.labels all of them.
        kept = np.arange(len(rles)) if self.chosen is None else np.flatnonzero(np.isin(target["labels"], self.chosen))
        if len(kept) == 0:
            return None
        # (N,): by area, if data.area_power is above 0; masks with low scores less often, if asked for.
        weights = target["area"].numpy().astype(np.float64) ** self.config.area_power
        if self.config.weigh_by_score:
            weights *= (target["predicted_iou"] * target["stability_score"]).numpy()
        return [rles[i] for i in kept], weights[kept]

    def _draw_masks(
        self, rles: list[dict[str, Any]], weights: npt.NDArray[np.float64], view: View, rng: np.random.Generator
    ) -> Bool:
        """(N, h, w) random masks as visible in the view, with repetitions if it shows too few; or (0, h, w)."""
        number = self.config.prompts_per_image
        seen: list[Bool] = []
        # Weighted sampling without replacement: the smallest of exponential waiting times.
        for index in np.argsort(rng.exponential(size=len(rles)) / np.maximum(weights, 1e-9), kind="stable"):
            mask = view.of_mask(_decode(rles[index]))
            if np.count_nonzero(mask) >= MIN_VISIBLE_PIXELS:
                seen.append(mask)
            if len(seen) == number:
                break
        if not seen:
            return np.zeros((0, *view.size_hw), bool)
        return np.stack([seen[i % len(seen)] for i in range(number)])

    def validation(self, limit: int, frame: Frame) -> Iterator[Scene]:
        """Whole held-out images, longest side at most S, with at most _VALIDATION_MASKS masks each."""
        num_seen = 0
        for index in self.heldout[np.random.default_rng(0).permutation(len(self.heldout))]:
            if num_seen == limit:
                return
            try:
                masks_of = self._masks(int(index))
                image = self._image(int(index)) if masks_of is not None else None
            except StorageError:
                continue
            if masks_of is None or image is None:
                continue
            rles, _ = masks_of
            view = whole_view(image.shape[0], image.shape[1], frame.image_size)
            # By the image's index: the same masks in every validation.
            chosen = np.random.default_rng([0, int(index)]).permutation(len(rles))[:_VALIDATION_MASKS]
            seen = [view.of_mask(_decode(rles[i])) for i in chosen]
            masks = [mask for mask in seen if np.count_nonzero(mask) >= MIN_VISIBLE_PIXELS]
            if masks:
                num_seen += 1
                yield Scene(image=view.of_image(image), masks=np.stack(masks), kinds=["object"] * len(masks))


def _decode(rle: dict[str, Any]) -> Bool:
    """(H, W) bool from COCO run lengths that `MaskDataset` has checked."""
    return pixels(checked_runs(rle["counts"], rle["size"]), rle["size"])


def held_out(uris: list[str], fraction: float) -> npt.NDArray[np.bool_]:
    """(N,): the images that are held out from training: this fraction, at least one if it is not 0.

    By a hash of the URI: the same in every run, on any data. Only if that selects none is it the image with the
    smallest hash, which depends on the dataset.
    """
    # Not Python's hash, which differs between processes.
    hashes = (int.from_bytes(hashlib.blake2b(uri.encode(), digest_size=4).digest(), "big") for uri in uris)
    values = np.fromiter(hashes, np.int64, len(uris))
    is_held_out: npt.NDArray[np.bool_] = values < int(fraction * 2**32)
    if fraction > 0 and not is_held_out.any():
        is_held_out[values.argmin()] = True
    return is_held_out


def _are_below(root: str, uris: list[str]) -> bool:
    """Whether all URIs start with `root`, or none. Raises: ConfigError if only some do."""
    prefix = storage.join(storage.normalize(root), "")
    others = [uri for uri in uris if not uri.startswith(prefix)]
    if others and len(others) < len(uris):
        raise ConfigError(
            f"data.image_root: {len(others)} of {len(uris)} images are not below {storage.redact(root)}, for example"
            f" {storage.redact(others[0])}"
        )
    return not others
