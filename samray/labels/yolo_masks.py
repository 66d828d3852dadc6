"""Masks by YOLOv8-seg, the network of FastSAM, in one pass: letterbox, boxes, non-maximum suppression, masks.

The network gives for each of A anchors a box (centre, width, height in pixels of its input), a confidence for each of
its classes (FastSAM has one) and M coefficients; and M prototypes at a quarter of its input's size. A mask's logits are
the prototypes weighted with its coefficients; a pixel in its box belongs to it if their sigmoid is above 0.5.

Sources: FastSAM (Zhao et al., arXiv 2306.12156) and YOLOv8-seg as Ultralytics publishes it, with `retina_masks`: the
logits are brought to the image's size before they are cut, without the letterbox's border.

Differences: all classes count as one. The authors' first script also moved sides of boxes within 20 pixels of the
image's border to it, which Ultralytics does for the boxes that it reports, but not for masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from samray.errors import ConfigError
from samray.labels.onnx_file import Array, OnnxNetwork
from samray.masks.nms import box_nms

MAX_MASKS: Final = 300
"""Most masks per image, as published (`max_det`)."""
INPUT_SIDE: Final = 1024
"""Longest side of the input of a network that takes any size, as published (`imgsz`)."""
_STRIDES: Final = (8, 16, 32)
_PROTOTYPE_STRIDE: Final = 4
_GREY: Final = 114
_MOST_SIDE: Final = 4096
_TRIAL_SIDE: Final = 64

_WEIGHT: Final = 2048
"""One, in the whole numbers of `resized`."""

Image = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Letterbox:
    """An image in the middle of the network's input: scaled with its proportions, on grey."""

    image_hw: tuple[int, int]
    scaled_hw: tuple[int, int]
    """The image's part of the input."""
    input_hw: tuple[int, int]

    @classmethod
    def fit(cls, image_hw: tuple[int, int], input_hw: tuple[int, int] | None) -> Letterbox:
        """input_hw: the network's; None for the smallest that takes INPUT_SIDE and whole strides."""
        room = input_hw or (INPUT_SIDE, INPUT_SIDE)
        scale = min(room_side / side for room_side, side in zip(room, image_hw, strict=True))
        height, width = (max(round(side * scale), 1) for side in image_hw)
        return cls(image_hw, (height, width), input_hw or (_whole_strides(height), _whole_strides(width)))

    @property
    def left_top(self) -> tuple[int, int]:
        """The image's first pixel in the input; an odd border is one pixel wider behind it."""
        return (self.input_hw[1] - self.scaled_hw[1]) // 2, (self.input_hw[0] - self.scaled_hw[0]) // 2

    def pixels(self, image: Image) -> Array:
        """(1, 3, *input_hw) float32 in [0, 1] of an RGB image (*image_hw, 3)."""
        left, top = self.left_top
        height, width = self.scaled_hw
        grey = np.full((*self.input_hw, 3), _GREY, np.uint8)
        grey[top : top + height, left : left + width] = resized(image, self.scaled_hw)
        return np.ascontiguousarray(grey.transpose(2, 0, 1)[None], dtype=np.float32) / np.float32(255)

    def boxes_out(self, xyxy: Array) -> Array:
        """Boxes (N, 4) of the input in pixels of the image, cut off at its border."""
        scale = np.array(
            [side / scaled_side for side, scaled_side in zip(self.image_hw, self.scaled_hw, strict=True)][::-1] * 2
        )
        inside = (xyxy - np.array(self.left_top * 2)) * scale
        boxes: Array = np.clip(inside, 0, np.array(self.image_hw[::-1] * 2)).astype(np.float32)
        return boxes

    def sampling(self, num_cells: int, axis: int) -> Tensor:
        """(side of the image, num_cells) float32: the weights of the prototypes' cells for each row (axis 0) or column
        (axis 1) of the image, bilinear.

        If the border does not end at a cell's edge, the cells are first divided by two or four, as published.
        """
        borders = [
            input_side - scaled_side for input_side, scaled_side in zip(self.input_hw, self.scaled_hw, strict=True)
        ]
        uneven = borders[0] | borders[1]
        parts = _PROTOTYPE_STRIDE // math.gcd(_PROTOTYPE_STRIDE, uneven | uneven // 2)
        cells = torch.eye(num_cells)[None]
        if parts > 1:
            cells = interpolate(cells, scale_factor=parts, mode="linear")
        start, length = (
            value * parts // _PROTOTYPE_STRIDE for value in (self.left_top[1 - axis], self.scaled_hw[axis])
        )
        return interpolate(cells[..., start : start + length], self.image_hw[axis], mode="linear")[0].T


def _whole_strides(side: int) -> int:
    return -(-side // _STRIDES[-1]) * _STRIDES[-1]


def resized(image: Image, hw: tuple[int, int]) -> Image:
    """Bilinear, without a filter for smaller sizes, in whole numbers as OpenCV's INTER_LINEAR. At most one pixel in a
    hundred differs, by one grey level."""
    if image.shape[:2] == hw:
        return image
    (top, bottom, down), (left, right, across) = (
        _neighbours(old, new) for old, new in zip(image.shape[:2], hw, strict=True)
    )
    across, down = across[None, :, None], down[:, None, None]

    def row(rows: Indices) -> Indices:
        before, after = (image[rows[:, None], columns].astype(np.int32) for columns in (left, right))
        return (before * (_WEIGHT - across) + after * across) >> 4

    # Each product is cut off before the sum, and the last two bits are rounded.
    upper, lower = (row(top) * (_WEIGHT - down)) >> 16, (row(bottom) * down) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def _neighbours(old: int, new: int) -> tuple[Indices, Indices, Indices]:
    """For each of new samples the samples before and after it out of old, and the weight of the latter, of _WEIGHT."""
    places = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1).astype(np.float32)
    before = np.floor(places).astype(np.int32)
    return before, np.minimum(before + 1, old - 1), np.rint((places - before) * _WEIGHT).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Detections:
    """The detections in one image, best confidence first."""

    boxes_xyxy: Array
    """(N, 4) in pixels of the network's input."""
    scores: Array
    """(N,) confidence in [0, 1]."""
    coefficients: Array
    """(N, M)."""


@dataclass(frozen=True, slots=True)
class Window:
    """A mask's logits in its box; the mask has no pixels outside of it."""

    logits: Tensor
    """(h, w) float32; above 0 is the mask."""
    left_top: tuple[int, int]
    """The window's first pixel in the image."""
    score: float


class YoloMasks:
    """A YOLOv8-seg network with thresholds. Several threads may use it at once."""

    def __init__(self, network: OnnxNetwork, *, conf_thresh: float, nms_thresh: float) -> None:
        """conf_thresh: masks need more confidence. nms_thresh: of two boxes with a larger IoU the better one is kept.

        Raises: ConfigError if its input is not that of such a network.
        """
        self.network, self.conf_thresh, self.nms_thresh = network, conf_thresh, nms_thresh
        self.input_hw = _input_hw(network)

    def check(self) -> None:
        """Run it once. Raises: ConfigError if its outputs are not those of such a network."""
        height, width = self.input_hw or (_TRIAL_SIDE, _TRIAL_SIDE)
        try:
            self._outputs(np.zeros((1, 3, height, width), np.float32))
        except (ValueError, RuntimeError, MemoryError) as error:
            raise ConfigError(f"{self.network.name} is not a YOLOv8-seg network: {error}") from error

    def masks(self, image: Image) -> Iterator[Window]:
        """The masks of an RGB image (H, W, 3), best confidence first, at most MAX_MASKS, none of them empty.

        Raises: ValueError if the outputs are not those of such a network; as `OnnxNetwork.run`.
        """
        frame = Letterbox.fit((image.shape[0], image.shape[1]), self.input_hw)
        anchors, prototypes = self._outputs(frame.pixels(image))
        detected = detections(anchors, len(prototypes), self.conf_thresh, self.nms_thresh)
        yield from windows(detected, prototypes, frame)

    def _outputs(self, pixels: Array) -> tuple[Array, Array]:
        """Anchors (4 + classes + M, A) and prototypes (M, h / 4, w / 4). Raises: as `masks`."""
        outputs = self.network.run(pixels)
        by_rank = {np.ndim(output): np.asarray(output) for output in outputs}
        shapes = " and ".join(str(np.shape(output)) for output in outputs)
        height, width = pixels.shape[2:]
        num_anchors = sum((height // stride) * (width // stride) for stride in _STRIDES)
        cells = (height // _PROTOTYPE_STRIDE, width // _PROTOTYPE_STRIDE)
        wanted = f"(1, 4 + classes + M, {num_anchors}) and (1, M, {cells[0]}, {cells[1]})"
        if sorted(np.ndim(output) for output in outputs) != [3, 4]:
            raise ValueError(f"expected outputs of {wanted}, got {shapes}")
        (anchors, *_), (prototypes, *_) = by_rank[3], by_rank[4]
        if anchors.shape[1] != num_anchors or prototypes.shape[1:] != cells or len(anchors) < 5 + len(prototypes):
            raise ValueError(f"expected outputs of {wanted}, got {shapes}")
        if not (np.isfinite(anchors).all() and np.isfinite(prototypes).all()):
            raise ValueError("its outputs are not finite numbers")
        return anchors.astype(np.float32, copy=False), prototypes.astype(np.float32, copy=False)


def _input_hw(network: OnnxNetwork) -> tuple[int, int] | None:
    """The size of the input; None if any will do. Raises: ConfigError if there is another kind of input."""
    inputs: list[Any] = network.inputs
    name, wanted = network.name, "expected one of (1, 3, height, width), float32"
    if len(inputs) != 1:
        raise ConfigError(f"{name} takes {len(inputs)} inputs, {wanted}")
    shape, kind = inputs[0].shape, inputs[0].type
    # A side of any size has a name, or none.
    is_one = len(shape) == 4 and (shape[0] == 1 or not isinstance(shape[0], int))
    if kind != "tensor(float)" or not is_one or shape[1] != 3:
        raise ConfigError(f"{name} takes {kind} of {tuple(shape)}, {wanted}")
    sides = [side for side in shape[2:] if isinstance(side, int)]
    if not sides:
        return None
    if len(sides) == 1 or any(side % _STRIDES[-1] or not 0 < side <= _MOST_SIDE for side in sides):
        raise ConfigError(
            f"{name} takes images of {tuple(shape[2:])}, expected both sides in steps of {_STRIDES[-1]} up to "
            f"{_MOST_SIDE}, or both of any size"
        )
    return sides[0], sides[1]


def detections(anchors: Array, num_coefficients: int, conf_thresh: float, nms_thresh: float) -> Detections:
    """The boxes to keep. anchors: (4 + classes + num_coefficients, A)."""
    scores = anchors[4:-num_coefficients].max(axis=0)
    chosen = np.flatnonzero(scores > conf_thresh)
    centre, half = anchors[:2, chosen].T, 0.5 * anchors[2:4, chosen].T
    boxes = np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)
    keep = box_nms(boxes, scores[chosen], nms_thresh)[:MAX_MASKS]
    return Detections(boxes[keep], scores[chosen[keep]], anchors[-num_coefficients:, chosen[keep]].T)


def windows(detected: Detections, prototypes: Array, frame: Letterbox) -> Iterator[Window]:
    """The masks of the detections that have a pixel, one at a time. prototypes: (M, h, w)."""
    num, *cells = prototypes.shape
    logits = torch.from_numpy(detected.coefficients @ prototypes.reshape(num, -1)).reshape(-1, *cells)
    rows, columns = frame.sampling(cells[0], 0), frame.sampling(cells[1], 1)
    for box, score, mask_logits in zip(
        frame.boxes_out(detected.boxes_xyxy), detected.scores.tolist(), logits, strict=True
    ):
        # The pixels whose number is in the box.
        x0, y0, x1, y1 = (math.ceil(side) for side in box.tolist())
        window = rows[y0:y1] @ mask_logits @ columns[x0:x1].T
        if window.numel() and window.max() > 0:
            yield Window(window, (x0, y0), score)
