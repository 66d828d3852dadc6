"""What NAME.json says of an export to ONNX: the model, the files, and the steps from an image to a mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from samray import __version__
from samray.sam import fetch
from samray.sam.onnx_graphs import OPSET, Graph, Port
from samray.sam.sam import Sam

_PADDED_STEPS: Final = (
    "Scale the RGB image so that its longer side is image_size: scale = image_size / max(width, height), new_width ="
    " floor(width * scale + 0.5), new_height = floor(height * scale + 0.5), each at least 1. Use the bilinear filter of"
    " Pillow on bytes, which has antialiasing. Give the encoder these values as float32, without padding.",
    "Multiply x of clicks and boxes by new_width / width, and y by new_height / height. Pixels are numbered from"
    " 0; do not add half a pixel, the decoder does. A box is two points, with labels 2 and 3.",
    "Without a box, append the point (0, 0) with label -1 to each prompt.",
    "Run the decoder for each prompt. Its masks are in the original frame; a mask is where masks > 0.",
)
_SQUARE_STEPS: Final = (
    "Scale the RGB image, as float32, to image_size x image_size: bilinear with antialiasing, corners not aligned"
    " (torch: interpolate with mode='bilinear', antialias=True), without rounding. Subtract mean, divide by std, put"
    " channels first.",
    "Multiply x of clicks and boxes by image_size / width, and y by image_size / height. Pixels are numbered from"
    " 0; do not add half a pixel, the decoder does. A box is two points, with labels 2 and 3.",
    "Run the decoder for each prompt, and resize masks to height x width: bilinear without antialiasing, corners not"
    " aligned (torch: interpolate with mode='bilinear', align_corners=False). A mask is where they are > 0.",
)
_CHOICES: Final = {
    4: "Of the four masks of a prompt take mask 0 for a box or several points; for one click, the one of masks 1 to 3"
    " with the highest iou_predictions.",
    3: "Of the three masks of a prompt take the one with the highest iou_predictions.",
    1: "There is one mask for each prompt.",
}
"""Which mask to take, by the number of masks of a prompt."""


def description(sam: Sam, digests: Mapping[str, str], *, single_mask: bool = False) -> dict[str, Any]:
    """The content of NAME.json about the model. digests: `WeightsFile.identity`. single_mask: see `graphs_of`."""
    spec = sam.spec
    steps, num_masks = (_PADDED_STEPS, 4) if sam.frame.is_padded else (_SQUARE_STEPS, 3)
    return {
        "model": spec.name,
        "family": spec.family,
        "licence": spec.licence,
        **digests,
        "samray": __version__,
        "torch": torch.__version__,
        "opset": OPSET,
        "image_size": spec.image_size,
        "frame": spec.frame,
        "colours": "RGB",
        "mean": list(spec.pixel_mean),
        "std": list(spec.pixel_std),
        "normalised_by": "the encoder" if sam.frame.is_padded else "the caller",
        "steps": [*steps, _CHOICES[1 if single_mask else num_masks]],
    }


def describe(graph: Graph, path: Path) -> dict[str, Any]:
    """A file, the file of its weights if there is one, and its ports."""

    def ports(all_ports: tuple[Port, ...]) -> list[dict[str, Any]]:
        return [
            {"name": port.name, "shape": list(port.shape), "dtype": port.dtype, "meaning": port.meaning}
            for port in all_ports
        ]

    data = path.with_name(f"{path.name}.data")
    weights = {"data": {"file": data.name, "sha256": fetch.file_sha256(data)}} if data.exists() else {}
    return {
        "file": path.name,
        "sha256": fetch.file_sha256(path),
        **weights,
        "inputs": ports(graph.inputs),
        "outputs": ports(graph.outputs),
    }
