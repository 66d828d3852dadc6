"""Segmentation from a single click (SAM paper, section 7.1): one click at the centre of each region.

The three masks for a click are compared with the region at the image's own resolution. `miou` uses the mask with the
highest predicted IoU, `miou_oracle` the best of the three; both are means over regions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from samray.errors import ImageError
from samray.evaluate import MIN_AREA
from samray.evaluate.failures import Failures
from samray.evaluate.regions import Bool, RegionImage, RleMasks, large_enough
from samray.inputs.decode import RGBArray
from samray.masks.scores import MASK_THRESHOLD, above, areas
from samray.sam.frames import frame_of
from samray.sam.sam import Sam

# Size limit, in floats, of the masks of one chunk of clicks, at full resolution or in the model's input, whichever is
# larger.
_CPU_CHUNK_BYTES = 32 * 2**20
_GPU_CHUNK_BYTES = 512 * 2**20


class Masks(Protocol):
    """N masks of an image; a slice gives (n, H, W) bool. An array, or run lengths decoded on demand."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Bool: ...


@dataclass(frozen=True, slots=True)
class Answers:
    """A model's answers to n clicks on an image; everything in the image's own frame."""

    regions: Bool
    """(n, H, W) the clicked regions."""
    clicks: npt.NDArray[np.int64]
    """(n, 2) xy of the clicked pixels."""
    masks: Tensor
    """(n, 3, H, W) bool, on the model's device."""
    iou: npt.NDArray[np.float64]
    """(n, 3) IoU of each mask with the region."""
    predicted_iou: npt.NDArray[np.float64]
    """(n, 3) predicted IoU."""

    @property
    def best(self) -> npt.NDArray[np.int64]:
        """(n,) index of the mask with the highest predicted IoU."""
        return np.asarray(self.predicted_iou.argmax(axis=1))

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """For each click the IoU of the mask with the highest predicted IoU, and of the best of the three."""
        scored = self.iou[np.arange(len(self.iou)), self.best]
        return list(zip(scored.tolist(), self.iou.max(axis=1).tolist(), strict=True))


def evaluate_points(
    model: Sam,
    images: Iterable[RegionImage | ImageError],
    *,
    min_area: int = MIN_AREA,
    on_image: Callable[[Failures], None] = lambda failures: None,
    on_answers: Callable[[RegionImage, Answers], None] = lambda image, answers: None,
) -> dict[str, Any]:
    """miou, miou_oracle and num_regions over the regions of at least min_area pixels, of all annotators.

    The regions of each annotator count, even if several marked the same object. num_images: images that could be used;
    num_failed and failures (reason -> number): the others. miou and miou_oracle are NaN without regions.

    on_image is called after each image, on_answers after each chunk of clicks.
    """
    failures = Failures()
    num_images = 0
    pairs: list[tuple[float, float]] = []
    for image in images:
        if isinstance(image, ImageError):
            failures.add(image)
        else:
            regions = RleMasks(large_enough(image.regions, min_area))
            with failures.out_of_memory():
                ious_of_image: list[tuple[float, float]] = []
                for answers in answer_clicks(model, image.pixels, regions):
                    on_answers(image, answers)
                    ious_of_image += answers.pairs
                pairs += ious_of_image  # if an image fails half-way, none of its regions count
                num_images += 1
        on_image(failures)
    return {**mean_ious(pairs), "num_images": num_images, **failures.figures()}


def mean_ious(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Means of single clicks from pairs (scored, oracle); NaN if there are none."""
    miou, miou_oracle = np.mean(pairs, axis=0) if pairs else (float("nan"), float("nan"))
    return {"miou": float(miou), "miou_oracle": float(miou_oracle), "num_regions": len(pairs)}


@torch.inference_mode()
def answer_clicks(model: Sam, image: RGBArray, regions: Masks) -> Iterator[Answers]:
    """Click once at the centre of each region, in chunks to bound the memory; the image is encoded once.

    image: (H, W, 3) uint8 RGB. regions: of the same size, none empty.
    """
    if len(regions) == 0:
        return
    original_hw = (image.shape[0], image.shape[1])
    pixels, [input_hw] = model.preprocess([image])
    context = model.prepare_decoder(model.encode_images(pixels))
    # (2,): input pixels per pixel of the image, in x and y.
    scale = torch.tensor(frame_of(model).scale_xy(original_hw).tolist(), device=model.device)
    size = _chunk(model, original_hw)
    for start in range(0, len(regions), size):
        wanted = regions[start : start + size]
        clicks = np.array([centre(region) for region in wanted])
        xy = torch.from_numpy(clicks).to(scale)
        # The centre of a pixel stays the centre after scaling; the prompt encoder adds the half pixel back.
        points = ((xy + 0.5) * scale - 0.5)[:, None]
        labels = torch.ones(points.shape[:2], dtype=torch.int64, device=model.device)
        decoded = model.decode_points(context, points, labels)
        masks = above(model.postprocess(decoded.logits, input_hw, original_hw), MASK_THRESHOLD)
        # (n * 3, H, W) -> (n, 3, H, W)
        masks = masks.view(*decoded.all_iou.shape, *original_hw)
        iou = _iou(masks, torch.from_numpy(wanted).to(masks.device)[:, None])
        yield Answers(wanted, clicks, masks, iou.double().cpu().numpy(), decoded.all_iou.double().cpu().numpy())


def _chunk(model: Sam, original_hw: tuple[int, int]) -> int:
    """Number of clicks per chunk."""
    chunk_bytes = _CPU_CHUNK_BYTES if model.device.type == "cpu" else _GPU_CHUNK_BYTES
    mask_bytes = 4 * max(frame_of(model).size ** 2, original_hw[0] * original_hw[1])
    return max(1, chunk_bytes // (3 * mask_bytes))


def _iou(masks: Tensor, targets: Tensor) -> Tensor:
    """(N, M, H, W) and (N, 1, H, W) bool -> (N, M)."""
    intersections, unions = (
        areas(pixels.flatten(0, 1)).view(masks.shape[:2]) for pixels in (masks & targets, masks | targets)
    )
    return intersections / unions.clamp(min=1)


def centre(mask: Bool, max_side: int | None = None) -> tuple[int, int]:
    """(x, y) of the pixel of `mask` (H, W) farthest from its boundary; the image border counts as boundary.

    max_side: first subsample the mask's box to about this side, for speed; the result is still inside the mask.
    Raises ValueError for an empty mask.
    """
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        raise ValueError("an empty mask has no centre")
    top, left = int(rows[0]), int(cols[0])
    cut = mask[top : rows[-1] + 1, left : cols[-1] + 1]
    step = 1 if max_side is None else -(-max(cut.shape) // max_side)
    thinned = cut[::step, ::step]
    # Subsampling may miss every pixel of a thin mask.
    if not thinned.any():
        step, thinned = 1, cut
    # Padded, because the border of the mask's box is a boundary, too.
    distance = ndimage.distance_transform_edt(np.pad(thinned, 1))
    y, x = np.unravel_index(int(distance[1:-1, 1:-1].argmax()), thinned.shape)
    return left + int(x) * step, top + int(y) * step
