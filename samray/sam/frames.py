"""How an image gets into the model's square, how points go in and how masks come out.

A frame alone knows sizes. Frames of coordinates: *original* (the image or crop as given, H x W pixels), *input* (the
part (h, w) of the model's S x S square that shows it) and *low-res* (the decoder's logits, a quarter of the embedding's
stride).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from samray.sam import resizing

Resized = NDArray[np.uint8] | NDArray[np.float32] | Tensor
"""An image in the model's square, (h, w, 3) RGB in [0, 255]; a tensor is on the model's device."""


def input_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """(h, w) after scaling the longest side to `image_size`, rounded half up as the reference, at least one pixel."""
    scale = image_size / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


@dataclass(frozen=True, slots=True)
class Frame:
    """The square of side `size`. Subclasses say which part of it shows an image."""

    size: int
    is_padded: ClassVar[bool]
    """Whether a part of the square may show nothing."""

    def input_hw(self, original_hw: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the image within the square, from its top left corner; the rest is zero."""
        raise NotImplementedError

    def mask_steps(self, low_res: int, original_hw: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        """How low-res logits, `low_res` a side, become masks: they are interpolated to a square of the first side, and
        the part (h, w) of it at the top left to the image."""
        raise NotImplementedError

    def resize(self, image: NDArray[np.uint8], device: torch.device) -> Resized:
        """image: (H, W, 3) uint8 RGB. Returns it as large as it is in the square, by Pillow's bilinear filter.

        device: the model's, which resizes if it is not a CPU.
        """
        return resizing.resize(image, self.input_hw((image.shape[0], image.shape[1])), device)

    def scale_xy(self, original_hw: tuple[int, int]) -> NDArray[np.float64]:
        """(2,) factors of x and y from the original to the input frame."""
        # The ratio of the rounded sizes, as in the reference: the two sides may differ slightly.
        return np.array(self.input_hw(original_hw)[::-1]) / np.array(original_hw[::-1])

    def points_in(self, xy: NDArray[np.float64], original_hw: tuple[int, int]) -> NDArray[np.float64]:
        """xy: (..., 2), original frame. Returns them in the input frame."""
        return xy * self.scale_xy(original_hw)

    def masks_out(self, logits: Tensor, original_hw: tuple[int, int]) -> Tensor:
        """logits: (K, 4h, 4w), low-res. Returns (K, H, W) of the same dtype, unthresholded."""
        return interpolate(logits, *self.mask_steps(logits.shape[-1], original_hw), original_hw)


class PadFrame(Frame):
    """SAM: the longest side is scaled to S, and the rest of the square is padded."""

    __slots__ = ()
    is_padded = True

    def input_hw(self, original_hw: tuple[int, int]) -> tuple[int, int]:
        return input_size(*original_hw, self.size)

    def mask_steps(self, low_res: int, original_hw: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        return self.size, self.input_hw(original_hw)


class SquareFrame(Frame):
    """SAM 2 and 3: both sides are scaled to S, and low-res logits straight to the image.

    Source: `sam2.utils.transforms.SAM2Transforms`.
    """

    __slots__ = ()
    is_padded = False

    def input_hw(self, original_hw: tuple[int, int]) -> tuple[int, int]:
        return self.size, self.size

    def mask_steps(self, low_res: int, original_hw: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        return low_res, (low_res, low_res)  # the first interpolation changes nothing

    def resize(self, image: NDArray[np.uint8], device: torch.device) -> Resized:
        """image: (H, W, 3) uint8 RGB. Returns (S, S, 3) float32 in [0, 255], by torch's antialiased bilinear filter.

        Not rounded, because SAM 2 resizes after the conversion to float. On the host: a GPU would round differently.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
        size = (self.size, self.size)
        resized = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)[0]
        return resized.permute(1, 2, 0).contiguous().numpy()


FRAMES: Final[dict[str, type[Frame]]] = {"pad": PadFrame, "square": SquareFrame}
"""The values of `ModelSpec.frame`."""


def frame_of(model: Any) -> Frame:
    """A model's frame; SAM's, of its `image_size`, for a model that names none."""
    # Stand-ins for models, as in the tests, have only an image_size.
    frame: Frame = getattr(model, "frame", None) or PadFrame(model.image_size)
    return frame


def interpolate(logits: Tensor, side: int, inside_hw: tuple[int, int], original_hw: tuple[int, int]) -> Tensor:
    """Low-res logits to the original frame, by the reference's two bilinear steps.

    logits: (K, 4h, 4w). side, inside_hw: as `Frame.mask_steps` gives them. Returns (K, H, W) of the same dtype.
    """
    # Two steps, not one: the padding is cut off between them, and one step would give other numbers.
    square = F.interpolate(logits[None], (side, side), mode="bilinear", align_corners=False)
    cut = square[..., : inside_hw[0], : inside_hw[1]]
    return F.interpolate(cut, original_hw, mode="bilinear", align_corners=False)[0]
