"""The description of a model: the numbers of its encoder, how its decoder differs, where its weights are.

Imports neither torch nor anything else of samray, as `samray.config.models`, which has the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

APACHE = "Apache-2.0"
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class EncoderSpec(Protocol):
    """The numbers of an image encoder, and where it is built: frozen, so that it can be compared and hashed."""

    builder: ClassVar[str]
    """`module:function`, called with the ModelSpec; it returns a `samray.sam.encoder.ImageEncoder`."""
    takes_any_size: ClassVar[bool]
    """Whether the weights fit any input side that is a multiple of the stride."""

    @property
    def stride(self) -> int:
        """Input pixels per embedding cell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VitSpec:
    """A plain ViT with windowed attention and a few global blocks (SAM paper, appendix A, "Image encoder")."""

    builder: ClassVar[str] = "samray.sam.image_encoder:build_encoder"
    takes_any_size: ClassVar[bool] = False  # positions are learnt for one size
    dim: int
    depth: int
    num_heads: int
    global_blocks: tuple[int, ...]
    """Blocks that attend over the whole grid; all others attend within windows."""
    window: int = 14
    patch: int = 16

    @property
    def stride(self) -> int:
        return self.patch


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyVitSpec:
    """TinyViT: one convolutional stage, then stages of windowed attention with a depthwise convolution (MobileSAM)."""

    builder: ClassVar[str] = "samray.sam.tiny_vit:build_encoder"
    takes_any_size: ClassVar[bool] = True
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    windows: tuple[int, ...]
    strides: tuple[int, ...]
    """Factor by which merging after stage i shrinks the grid; one entry fewer than stages. The stem shrinks by 4."""
    fine_features: bool = False
    """Hand the first two stages' features to the decoder's upscaling, as SAM 2 does: sharp edges from a small model."""

    @property
    def stride(self) -> int:
        return 4 * math.prod(self.strides)


@dataclass(frozen=True, kw_only=True, slots=True)
class HieraSpec:
    """Hiera: stages that halve the grid and double the width, windowed attention, a few global blocks (SAM 2)."""

    builder: ClassVar[str] = "samray.sam.hiera:build_encoder"
    takes_any_size: ClassVar[bool] = False  # windows and positions fit the published size
    dim: int
    """Width of the first stage; each following stage doubles it."""
    num_heads: int
    """Attention heads of the first stage; each following stage doubles them."""
    depths: tuple[int, ...]
    global_blocks: tuple[int, ...]
    """Blocks that attend over the whole grid, counted over all stages; all others attend within windows."""
    windows: tuple[int, ...] = (8, 4, 14, 7)
    positions: int = 7
    """Side of the learned grid of positions, which is interpolated to the input's."""
    stride: ClassVar[int] = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class RepVitSpec:
    """RepViT: stages of depthwise and 1x1 convolutions that halve the grid, with squeeze and excitation (EdgeTAM)."""

    builder: ClassVar[str] = "samray.sam.repvit:build_encoder"
    takes_any_size: ClassVar[bool] = False  # the coarsest level is at twice the stride
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    stride: ClassVar[int] = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeVitSpec:
    """A plain ViT with rotary positions, windowed attention and a few global blocks (SAM 3)."""

    builder: ClassVar[str] = "samray.sam.rope_vit:build_encoder"
    takes_any_size: ClassVar[bool] = False  # the global blocks' angles follow from the published size
    dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    global_blocks: tuple[int, ...]
    """Blocks that attend over the whole grid; all others attend within windows."""
    window: int = 24
    patch: int = 14
    positions: int = 24
    """Side of the learned grid of positions, which is repeated over the input's."""

    @property
    def stride(self) -> int:
        return self.patch


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderVariant:
    """How a mask decoder differs from SAM's. The defaults are SAM's."""

    object_score_token: bool = False
    """One more output token, before the others: whether the object is in the image."""
    sigmoid_iou: bool = False
    """Predicted IoUs go through a sigmoid."""
    high_res_before_norm: bool = False
    """High-resolution features are added before the norm of the first doubling, not after it."""
    dynamic_multimask: bool = False
    """A single mask that is not stable is replaced by the best of the other three."""
    pad_boxes: bool = False
    """The "not a point" token is appended to boxes, too."""
    hq_dim: int = 0
    """Channels of the encoder's early features, of which one more token makes a mask that is added to the others; 0:
    none (SAM-HQ). Of the three masks of an ambiguous prompt only the best one is decoded, as published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """One row: how to build a Sam, and where its published weights are."""

    name: str
    image_size: int
    """Side S of the square input, pixels."""
    frame: Literal["pad", "square"] = "pad"
    """How an image gets into the square, see `samray.sam.frames`."""
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    """How pixels of 0 to 255 are normalised, R, G and B."""
    encoder: EncoderSpec
    embed_dim: int = 256
    """C: channels of the image embedding and of the decoder."""
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    iou_hidden_dim: int = 256
    mask_in_chans: int = 16
    decoder: DecoderVariant = DecoderVariant()
    family: str = "SAM"
    """The published model family, for messages."""
    masks_preset: str | None = None
    """Preset with the family's own mask settings; None is the preset named like the model, if there is one."""
    file_name: str = ""
    """The published file; for `tiny` the file inside this package."""
    url: str | None = None
    sha256: str | None = None
    """Digest of the file, from its publisher or a project that can be named; None: it is verified by size and keys. For
    `tiny` that of the file inside this package: a run with it starts without reading the file."""
    gated: str | None = None
    """Page where the user gets the file, after agreeing to its licence; samray does not download it."""
    size_mb: float = 0.0
    """As published; for a row without a digest the file's size must be within 1% of it."""
    licence: str = APACHE
    source: str = ""
    core_seconds: tuple[float, float] | None = None
    """Rough seconds of one CPU core for a pass of the image encoder and for a prompt: float32, random weights, one AMD
    EPYC core with AVX-512. For the plan's estimate only. None if they were not measured."""

    @property
    def stride(self) -> int:
        """Input pixels per embedding cell."""
        return self.encoder.stride

    @property
    def grid(self) -> int:
        """Side h = w of the embedding grid."""
        return self.image_size // self.stride

    @property
    def embedding_values(self) -> int:
        """Numbers that the encoder gives the decoder per image: (C, h, w), and the features of SAM 2 or of SAM-HQ."""
        has_high_res = self.decoder.high_res_before_norm or getattr(self.encoder, "fine_features", False)
        # (C / 8, 4h, 4w) and (C / 4, 2h, 2w) have 2 C and C values per cell.
        return self.grid**2 * (self.embed_dim * (4 if has_high_res else 1) + self.decoder.hq_dim)
