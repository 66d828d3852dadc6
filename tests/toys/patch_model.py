"""A toy model: an encoder of one convolution, in a square frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from torch import Tensor, nn

from samray.sam.encoder import Features, ImageEncoder
from samray.sam.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchSpec:
    builder: ClassVar[str] = "tests.toys.patch_model:build_encoder"
    takes_any_size: ClassVar[bool] = True
    patch: int

    @property
    def stride(self) -> int:
        return self.patch


class PatchEncoder(ImageEncoder):
    def __init__(self, patch: int, channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, channels, patch, stride=patch)])
        self.neck = nn.Conv2d(channels, channels, 1)

    def features(self, pixels: Tensor) -> Features:
        return Features(self.neck(self.blocks[0](pixels)))

    def block_names(self) -> list[tuple[str, ...]]:
        return [("blocks.0",)]


def build_encoder(spec: ModelSpec) -> PatchEncoder:
    assert isinstance(spec.encoder, PatchSpec)
    return PatchEncoder(spec.encoder.patch, spec.embed_dim)


SPEC: Final = ModelSpec(
    name="toy",
    image_size=64,
    frame="square",
    encoder=PatchSpec(patch=16),
    embed_dim=32,
    decoder_heads=2,
    decoder_mlp_dim=32,
    iou_hidden_dim=16,
    mask_in_chans=4,
    file_name="toy.safetensors",
    licence="MIT",
    source="the tests",
)
