"""Edge maps from the masks of a point grid, without training on edges (SAM paper, sections 7.2 and D.2).

All masks of a 16 x 16 grid, three per point, without a filter on their scores; box NMS; the Sobel gradient of each
mask's probabilities, kept only on the mask's outer boundary; the maximum over masks, normalised to 0..1; and thinning
across the edge (NMS as in Canny).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from samray.config.edges import EdgeConfig
from samray.masks.candidates import Candidates
from samray.masks.generator import Image, MaskGenerator
from samray.masks.scores import MASK_THRESHOLD
from samray.sam.sam import Sam

EdgeMap = npt.NDArray[np.float32]
"""(H, W) float32 in 0..1: strength of the edge at each pixel."""

_SOBEL: Final = ((1.0, 2.0, 1.0), (-1.0, 0.0, 1.0))
"""Smoothing along the edge and difference across it."""

_MARGIN: Final = 2
"""Pixels around a mask's box in which its edge is computed."""

_ORIENTATION_SIGMA: Final = 2.0
"""Blur, in pixels, before the direction of an edge is measured: that of single pixels is noise."""

_TIE: Final = 1.01
"""Factor by which a neighbour must exceed a pixel to suppress it; on a plateau of two pixels both stay."""


class EdgeGenerator:
    """Detects edges with a model. Settings: `samray.EdgeConfig`. `stage_seconds`: as in `samray.MaskGenerator`."""

    def __init__(self, model: Sam, config: EdgeConfig | None = None, *, points_per_batch: int | None = None) -> None:
        """points_per_batch: points to decode at once with as little memory as possible; None for full speed."""
        self.config = config or EdgeConfig()
        # The grid's usual generator, with its filters off: only the box NMS is left.
        masks = self.config.masks().model_copy(update={"points_per_batch": points_per_batch})
        self._generator = MaskGenerator(model, masks, frugal=points_per_batch is not None)
        self.stage_seconds = self._generator.stage_seconds

    def generate(self, images: list[Image]) -> list[EdgeMap]:
        """The edge map of each image.

        images: RGB uint8 (H, W, 3), of any sizes. Returns (H, W) float32 per image, in 0..1, 0 everywhere if the image
        has no edge. Raises ValueError for invalid images.
        """
        return self._generator.finish_candidates(images, self._edges)

    @torch.inference_mode()  # the mode is per thread
    def _edges(self, candidates: Candidates, image_hw: tuple[int, int]) -> EdgeMap:
        strongest = torch.zeros(image_hw, device=candidates.logits[0].device if candidates.logits else None)
        for logits, (x0, y0, x1, y1) in zip(candidates.logits, candidates.boxes_xyxy.tolist(), strict=True):
            # A mask has nothing beyond its boundary; the gradient there reads one pixel more.
            window = slice(max(y0 - _MARGIN, 0), y1 + 1 + _MARGIN), slice(max(x0 - _MARGIN, 0), x1 + 1 + _MARGIN)
            # One mask at a time: a few hundred at full resolution would need gigabytes.
            inside = self._generator.frame.masks_out(logits[None].float(), image_hw)[0][window]
            strongest[window] = torch.maximum(strongest[window], boundary_strength(inside[None])[0])
        edges: EdgeMap = strongest.cpu().numpy()
        # Not by zero, if the image has no edge.
        edges /= max(float(edges.max()), float(np.finfo(np.float32).tiny))
        return suppress_non_maxima(edges) if self.config.thin else edges


def boundary_strength(logits: Tensor) -> Tensor:
    """Sobel gradient of each mask's probabilities, 0 except on the mask's outer boundary.

    logits: (M, H, W), unthresholded. Returns (M, H, W) float32. The outer boundary is the pixels just outside of the
    mask; the edge of the image is not a boundary.
    """
    masks = (logits > MASK_THRESHOLD).float()[:, None]  # (M, 1, H, W)
    # Grown by one pixel, minus the mask: the ring of pixels just outside.
    outside = F.max_pool2d(masks, 3, stride=1, padding=1) - masks
    along, across = (torch.tensor(weights, device=logits.device) for weights in _SOBEL)
    kernels = torch.stack([along[:, None] * across, across[:, None] * along])[:, None]  # (2, 1, 3, 3)
    # Replicated at the border: padding with zeros would make an edge of the image's own border.
    gradient = F.conv2d(F.pad(logits.sigmoid()[:, None], (1, 1, 1, 1), mode="replicate"), kernels)
    strength: Tensor = gradient.norm(dim=1, keepdim=True) * outside
    return strength[:, 0]


def suppress_non_maxima(edges: EdgeMap, sigma: float = _ORIENTATION_SIGMA) -> EdgeMap:
    """Keep the pixels that are not weaker than their neighbours across the edge; the others become 0.

    edges: (H, W). The direction across the edge is that of the strongest curvature of the blurred map (blur: sigma, in
    pixels). Source: Canny (1986), with the direction of a ridge instead of a gradient.
    """
    # Second derivatives; orders are given as (y, x).
    xx, xy, yy = (
        ndimage.gaussian_filter(edges, sigma, order=order, mode="nearest") for order in ((0, 2), (1, 1), (2, 0))
    )
    # The eigenvector of the Hessian whose eigenvalue is lowest: across the ridge, the map falls most.
    angle = 0.5 * np.arctan2(2 * xy, xx - yy) + np.pi / 2
    # The two neighbours one pixel away across the edge, interpolated between pixels.
    y, x = np.indices(edges.shape, dtype=np.float32)
    neighbours = [
        ndimage.map_coordinates(edges, [y + side * np.sin(angle), x + side * np.cos(angle)], order=1, mode="nearest")
        for side in (-1, 1)
    ]
    return np.where(edges * np.float32(_TIE) >= np.maximum(*neighbours), edges, np.float32(0))
