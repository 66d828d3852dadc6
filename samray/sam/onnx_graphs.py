"""The networks as ONNX graphs see them: fixed sizes, plain tensors in and out, no branches.

A padded frame (SAM) has the names of segment-anything's own exporter, and an encoder that normalises and pads. A square
frame (SAM 2) has the names that annotation tools use for it: high-resolution features apart, pixels normalised by the
caller. `tests/unit/test_onnx_export.py` compares each with torch in onnxruntime.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samray.sam.encoder import Features, packed
from samray.sam.sam import Sam

OPSET: Final = 20
"""The newest that torch's tracing exporter writes, and torch's default. Its other exporter needs onnxscript."""


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph."""

    name: str
    shape: tuple[int | str, ...]
    """A word is a size that may change from call to call."""
    meaning: str
    dtype: str = "float32"

    @property
    def dynamic_axes(self) -> dict[int, str]:
        return {axis: size for axis, size in enumerate(self.shape) if isinstance(size, str)}


class Graph(nn.Module):
    """A module with named ports, and example inputs to trace it with."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.sam = sam
        # torch.onnx.export gives every part of a module the module's own mode back.
        self.eval()

    def example(self) -> tuple[Tensor, ...]:
        """Inputs of all the right shapes; sizes that may change are small."""
        return tuple(
            torch.ones([size if isinstance(size, int) else _EXAMPLE_SIZES[size] for size in port.shape])
            for port in self.inputs
        )


_EXAMPLE_SIZES = {"height": 40, "width": 50, "num_prompts": 2, "num_points": 3}


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes of what goes from the encoder to the decoder."""

    side: int
    """Input side, pixels."""
    embedding: tuple[int, ...]
    """(1, C, h, w), without and with what `packed` appends."""
    packed: tuple[int, ...]
    high_res: tuple[tuple[int, ...], ...] = field(default=())
    low_res: int = 0
    """Side of low-resolution logits."""

    @classmethod
    def of(cls, sam: Sam, features: Features) -> Shapes:
        """features: of one image."""
        high_res = () if features.high_res is None else tuple(tuple(feature.shape) for feature in features.high_res)
        return cls(
            sam.image_size, tuple(features.embedding.shape), tuple(packed(features).shape), high_res, 4 * sam.spec.grid
        )


# --- padded frames: SAM ----------------------------------------------------------------------------------------------


class PaddedEncoder(Graph):
    """An image in the input frame -> `image_embeddings`, with high-resolution features packed into its channels."""

    def __init__(self, sam: Sam, shapes: Shapes) -> None:
        super().__init__(sam)
        meaning = f"RGB, 0 to 255; resized so that the longer side is {shapes.side}; a longer one is an error"
        self.inputs = (Port("input_image", ("height", "width", 3), meaning),)
        self.outputs = (Port("image_embeddings", shapes.packed, "for the decoder"),)

    def forward(self, image: Tensor) -> Tensor:
        pixels = ((image.permute(2, 0, 1) - self.sam.pixel_mean) / self.sam.pixel_std)[None]
        side = self.sam.image_size
        # Zeros after the normalisation, as in `Sam.normalize`. A side that is too long becomes longer still, not cut.
        padded = F.pad(pixels, (0, abs(side - image.shape[1]), 0, abs(side - image.shape[0])))
        # The sizes are known from here on; fails if a side was too long.
        return self.sam.image_encoder(padded.reshape(1, 3, side, side))


class PaddedDecoder(Graph):
    """Clicks, box corners and a mask -> masks in the original frame. Source: `segment_anything.utils.onnx`."""

    def __init__(self, sam: Sam, shapes: Shapes, *, single_mask: bool) -> None:
        super().__init__(sam)
        self.single_mask = single_mask
        num_masks = 1 if single_mask else 4
        self.inputs = (Port("image_embeddings", shapes.packed, "from the encoder"), *_prompts(shapes),
                       Port("orig_im_size", (2,), "height and width of the original image"))  # fmt: skip
        self.outputs = (
            Port("masks", ("num_prompts", num_masks, "height", "width"), "logits in the original frame; above 0: mask"),
            Port("iou_predictions", ("num_prompts", num_masks), "predicted IoU of each mask"),
            Port("low_res_masks", ("num_prompts", num_masks, shapes.low_res, shapes.low_res), "for mask_input"),
        )

    def forward(
        self, embeddings: Tensor, points: Tensor, labels: Tensor, mask: Tensor, has_mask: Tensor, original_hw: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The caller appends the "not a point" if there is no box, as for segment-anything's graph.
        tokens = self.sam.prompt_encoder.encode_points(points, labels, pad=False, corners=True)
        logits, iou = self.sam.decode_tokens(
            self.sam.prepare_decoder(embeddings, mask, has_mask), tokens[None], slice(None)
        )
        if self.single_mask:
            logits, iou = _one_by_points(logits, iou, points.shape[1])
        return self._in_original_frame(logits, original_hw), iou, logits

    def _in_original_frame(self, logits: Tensor, original_hw: Tensor) -> Tensor:
        """As `interpolate`, with sizes that the graph computes: numbers of Python would be those of the example."""
        side = self.sam.image_size
        size = original_hw.double()
        inside = torch.floor(side / size.max() * size + 0.5).long().clamp(min=1)
        square = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
        cut = square[..., : inside[0], : inside[1]]
        height, width = size.long().unbind()
        # Sizes may be tensors while a graph is traced.
        return F.interpolate(cut, (height, width), mode="bilinear", align_corners=False)  # type: ignore[arg-type]


def _one_by_points(logits: Tensor, iou: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """The single mask if there are three points or more, padding included; else the best of the other three.

    Source: `segment_anything.utils.onnx.SamOnnxModel.select_masks`.
    """
    first = torch.tensor([[1000.0, 0.0, 0.0, 0.0]])
    best = (iou + (num_points - 2.5) * first).argmax(dim=1, keepdim=True)
    chosen = best[:, :, None, None].expand(-1, 1, logits.shape[2], logits.shape[3])
    return logits.gather(1, chosen), iou.gather(1, best)


# --- square frames: SAM 2 --------------------------------------------------------------------------------------------


class SquareEncoder(Graph):
    """Normalised pixels -> high-resolution features and embedding."""

    def __init__(self, sam: Sam, shapes: Shapes) -> None:
        super().__init__(sam)
        meaning = f"RGB, stretched to {shapes.side} x {shapes.side}, (value - mean) / std"
        self.inputs = (Port("image", (1, 3, shapes.side, shapes.side), meaning),)
        self.outputs = _feature_ports(shapes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        features = self.sam.image_encoder.features(pixels)
        return (*(features.high_res or ()), features.embedding)


class SquareDecoder(Graph):
    """Clicks, box corners and a mask -> low-resolution masks, which are resized straight to the image."""

    def __init__(self, sam: Sam, shapes: Shapes, *, single_mask: bool) -> None:
        super().__init__(sam)
        self.single_mask = single_mask
        num_masks, low_res = 1 if single_mask else 3, shapes.low_res
        *high_res, embedding = _feature_ports(shapes)
        self.inputs = (embedding, *high_res, *_prompts(shapes))
        self.outputs = (
            Port("masks", ("num_prompts", num_masks, low_res, low_res), "logits; resize to the image; above 0: mask"),
            Port("iou_predictions", ("num_prompts", num_masks), "predicted IoU of each mask"),
        )

    def forward(self, embedding: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        *high_res, points, labels, mask, has_mask = others
        features = Features(embedding, (high_res[0], high_res[1]) if high_res else None)
        # Always with a "not a point", as in `sam2`'s predictor.
        tokens = self.sam.prompt_encoder.encode_points(points, labels, corners=True)
        context = self.sam.prepare_decoder(packed(features), mask, has_mask)
        logits, iou = self.sam.decode_tokens(context, tokens[None], slice(None if self.single_mask else 1, None))
        return self.sam.mask_decoder.single(logits, iou) if self.single_mask else (logits, iou)


def _feature_ports(shapes: Shapes) -> tuple[Port, ...]:
    names = [f"high_res_feats_{i}" for i in range(len(shapes.high_res))]
    return (
        *(Port(name, shape, "for the decoder") for name, shape in zip(names, shapes.high_res, strict=True)),
        Port("image_embed", shapes.embedding, "for the decoder"),
    )


def _prompts(shapes: Shapes) -> tuple[Port, ...]:
    low_res = shapes.low_res
    return (
        Port("point_coords", ("num_prompts", "num_points", 2), "x and y in the input frame, pixels"),
        Port(
            "point_labels", ("num_prompts", "num_points"),
            "1 object, 0 not, 2 and 3 the top-left and bottom-right corner of a box, -1 no point",
        ),
        Port(
            "mask_input", (1, 1, low_res, low_res),
            "low-resolution logits of an earlier mask, or zeros; one mask for all prompts of a call",
        ),
        Port("has_mask_input", (1,), "1 to use mask_input, else 0"),
    )  # fmt: skip


def graphs_of(sam: Sam, *, single_mask: bool = False) -> tuple[Graph, Graph]:
    """Encoder and decoder of a model, which is in float32 on the CPU.

    single_mask: the decoder gives one mask per prompt, else four (padded frames) or three (square ones).
    """
    with torch.no_grad():
        features = sam.image_encoder.features(torch.zeros(1, 3, sam.image_size, sam.image_size))
    shapes = Shapes.of(sam, features)
    if sam.frame.is_padded:
        return PaddedEncoder(sam, shapes), PaddedDecoder(sam, shapes, single_mask=single_mask)
    return SquareEncoder(sam, shapes), SquareDecoder(sam, shapes, single_mask=single_mask)
