"""The models samray knows: one table, one row per model. Every variant is a row here, never a class.

Settings, help, `samray models`, the estimate of a run's time and the tests take names and figures from here, so this
module imports neither torch nor anything else of samray.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

APACHE = "Apache-2.0"


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
    """What the merging after stage i shrinks the grid by; one entry fewer than stages. The stem shrinks by 4."""
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


SAM2_DECODER = DecoderVariant(
    object_score_token=True, sigmoid_iou=True, high_res_before_norm=True, dynamic_multimask=True, pad_boxes=True
)
"""Source: `sam2` 1.1, `build_sam2` with its default post-processing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """One row: what builds a Sam, and where its published weights are."""

    name: str
    image_size: int
    """Side S of the square input, pixels."""
    frame: Literal["pad", "square"] = "pad"
    """How an image gets into the square, see `samray.sam.frames`."""
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
    """Digest of the file, from its publisher or a project that can be named; None: it is verified by size and keys."""
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


MOBILE_SAM_VIT = TinyVitSpec(
    dims=(64, 128, 160, 320),
    depths=(2, 2, 6, 2),
    num_heads=(2, 4, 5, 10),
    windows=(7, 7, 14, 7),
    strides=(2, 2, 1),
)
VIT_B = VitSpec(dim=768, depth=12, num_heads=12, global_blocks=(2, 5, 8, 11))
VIT_L = VitSpec(dim=1024, depth=24, num_heads=16, global_blocks=(5, 11, 17, 23))
VIT_H = VitSpec(dim=1280, depth=32, num_heads=16, global_blocks=(7, 15, 23, 31))

_HIERAS: dict[str, tuple[str, HieraSpec]] = {
    "t": ("tiny", HieraSpec(dim=96, num_heads=1, depths=(1, 2, 7, 2), global_blocks=(5, 7, 9))),
    "s": ("small", HieraSpec(dim=96, num_heads=1, depths=(1, 2, 11, 2), global_blocks=(7, 10, 13))),
    "b+": (
        "base_plus",
        HieraSpec(dim=112, num_heads=2, depths=(2, 3, 16, 3), global_blocks=(12, 16, 20), positions=14),
    ),
    "l": (
        "large",
        HieraSpec(dim=144, num_heads=2, depths=(2, 6, 36, 4), global_blocks=(23, 33, 43), windows=(8, 4, 16, 8)),
    ),
}
"""The sizes of SAM 2: suffix of the name -> word in the name of the file, encoder."""


def _sam2(version: str, size: str, megabytes: float, sha256: str) -> ModelSpec:
    """A row of SAM 2 or 2.1. Both have the same networks; their weights differ."""
    word, encoder = _HIERAS[size]
    file_name = f"sam{version}_hiera_{word}.pt"
    folder = {"2": "072824", "2.1": "092824"}[version]
    return ModelSpec(
        name=f"sam{version}_{size}",
        image_size=1024,
        frame="square",
        encoder=encoder,
        decoder=SAM2_DECODER,
        family=f"SAM {version}",
        masks_preset="sam2",
        file_name=file_name,
        url=f"https://dl.fbaipublicfiles.com/segment_anything_2/{folder}/{file_name}",
        sha256=sha256,
        size_mb=megabytes,
        source=f"Meta, SAM {version} (2024)",
    )


_HQ_ENCODERS: dict[str, EncoderSpec] = {
    "tiny": MOBILE_SAM_VIT,
    "b": VIT_B,
    "l": VIT_L,
    "h": VIT_H,
}
"""The encoders of SAM-HQ: size in the name of the file -> encoder, which is that of MobileSAM or SAM."""


def _sam_hq(size: str, hq_dim: int, megabytes: float, sha256: str | None = None) -> ModelSpec:
    """A row of SAM-HQ."""
    file_name = f"sam_hq_vit_{size}.pth"
    return ModelSpec(
        name=f"sam_hq_vit_{size[0]}",
        image_size=1024,
        encoder=_HQ_ENCODERS[size],
        decoder=DecoderVariant(hq_dim=hq_dim),
        family="SAM-HQ",
        masks_preset="sam_hq",
        file_name=file_name,
        url=f"https://huggingface.co/lkeab/hq-sam/resolve/main/{file_name}",
        sha256=sha256,
        size_mb=megabytes,
        source="SAM-HQ (Ke et al., 2023)",
    )


_SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
_SAM_SOURCE = "Meta, Segment Anything (2023)"

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="tiny",
            image_size=384,
            encoder=TinyVitSpec(
                dims=(32, 64, 160),
                depths=(2, 2, 8),
                num_heads=(1, 2, 5),
                windows=(8, 8, 24),  # the last stage attends over the whole grid
                strides=(2, 2),
                fine_features=True,
            ),
            embed_dim=128,
            decoder_heads=4,
            decoder_mlp_dim=512,
            iou_hidden_dim=128,
            file_name="tiny.safetensors",
            source="samray's own trainer, embedded in the package",
            core_seconds=(0.3, 0.004),
        ),
        ModelSpec(
            name="vit_t",
            image_size=1024,
            encoder=MOBILE_SAM_VIT,
            file_name="mobile_sam.pt",
            url="https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/master/weights/mobile_sam.pt",
            sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
            size_mb=40.7,
            source="MobileSAM (Zhang et al., 2023)",
            core_seconds=(2, 0.05),
        ),
        ModelSpec(
            name="vit_b",
            image_size=1024,
            encoder=VIT_B,
            file_name="sam_vit_b_01ec64.pth",
            url=_SAM_URL + "sam_vit_b_01ec64.pth",
            sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
            size_mb=375.0,
            source=_SAM_SOURCE,
            core_seconds=(12, 0.05),
        ),
        ModelSpec(
            name="vit_l",
            image_size=1024,
            encoder=VIT_L,
            file_name="sam_vit_l_0b3195.pth",
            url=_SAM_URL + "sam_vit_l_0b3195.pth",
            sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
            size_mb=1249.5,
            source=_SAM_SOURCE,
            core_seconds=(30, 0.05),
        ),
        ModelSpec(
            name="vit_h",
            image_size=1024,
            encoder=VIT_H,
            file_name="sam_vit_h_4b8939.pth",
            url=_SAM_URL + "sam_vit_h_4b8939.pth",
            sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
            size_mb=2564.6,
            source=_SAM_SOURCE,
            core_seconds=(55, 0.05),
        ),
        # Meta publishes no digests of SAM 2. These are those of micro-sam (computational-cell-analytics/micro-sam,
        # micro_sam/v2/util.py; those of SAM 2 in its versions before it took only 2.1).
        _sam2("2.1", "t", 156.0, "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"),
        _sam2("2.1", "s", 184.4, "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"),
        _sam2("2.1", "b+", 323.6, "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5"),
        _sam2("2.1", "l", 898.1, "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318"),
        _sam2("2", "t", 155.9, "65b50056e05bcb13694174f51bb6da89c894b57b75ccdf0ba6352c597c5d1125"),
        _sam2("2", "s", 184.3, "95949964d4e548409021d47b22712d5f1abf2564cc0c3c765ba599a24ac7dce3"),
        _sam2("2", "b+", 323.5, "d0bb7f236400a49669ffdd1be617959a8b1d1065081789d7bbff88eded3a8071"),
        _sam2("2", "l", 898.0, "7442e4e9b732a508f80e141e7c2913437a3610ee0c77381a66658c3a445df87b"),
        # The two digests are those of geti-instant-learn (open-edge-platform/geti-instant-learn,
        # library/src/instantlearn/utils/constants.py); that of ViT-H is in refiners (finegrain-ai/refiners), too.
        _sam_hq("tiny", 160, 42.5, "0f32c075ccdd870ae54db2f7630e7a0878ede5a2b06d05d6fe02c65a82fb7196"),
        _sam_hq("b", 768, 379.0),
        _sam_hq("l", 1024, 1250.0),
        _sam_hq("h", 1280, 2570.9, "a7ac14a085326d9fa6199c8c698c4f0e7280afdbb974d2c4660ec60877b45e35"),
    )
}


def model_names() -> list[str]:
    """The names of all models, in the table's order."""
    return list(MODELS)


def teacher_names() -> list[str]:
    """The models with published weights, which a smaller one can be distilled from."""
    return [name for name, spec in MODELS.items() if spec.url is not None]
