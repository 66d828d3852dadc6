"""The models samray knows: one table, one row per model. Every variant is a row here, never a class.

Settings, help, `samray models`, the estimate of a run's time and the tests take names and figures from here, so this
module imports neither torch nor anything else of samray but the specs.
"""

from __future__ import annotations

from samray.config.model_specs import (
    DecoderVariant,
    EncoderSpec,
    HieraSpec,
    ModelSpec,
    RepVitSpec,
    RopeVitSpec,
    TinyVitSpec,
    VitSpec,
)

SAM2_DECODER = DecoderVariant(
    object_score_token=True, sigmoid_iou=True, high_res_before_norm=True, dynamic_multimask=True, pad_boxes=True
)
"""Source: `sam2` 1.1, `build_sam2` with its default post-processing."""


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


_SAM2_ENCODER_SECONDS = {"t": 3.8, "s": 4.4, "b+": 8.6}
"""As `core_seconds`: `python jobs/benchmark.py core`. The large one was not measured."""


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
        core_seconds=(_SAM2_ENCODER_SECONDS[size], 0.06) if size in _SAM2_ENCODER_SECONDS else None,
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


def _sam3_tracker() -> ModelSpec:
    """The row of SAM 3's interactive part, which it calls its tracker."""
    return ModelSpec(
        name="sam3",
        image_size=1008,
        frame="square",
        pixel_mean=(127.5, 127.5, 127.5),
        pixel_std=(127.5, 127.5, 127.5),
        encoder=RopeVitSpec(dim=1024, depth=32, num_heads=16, mlp_dim=4736, global_blocks=(7, 15, 23, 31)),
        decoder=SAM2_DECODER,
        family="SAM 3",
        masks_preset="sam2",
        file_name="sam3.pt",
        gated="https://huggingface.co/facebook/sam3",
        size_mb=3450.0,
        licence="SAM License",
        source="Meta, SAM 3 (2025), its tracker",
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
            sha256="a61fb079cf42f92035d6b64d917f9868cae545525dfad497b5d0f5cca5e63946",
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
        ModelSpec(
            name="edgetam",
            image_size=1024,
            frame="square",
            encoder=RepVitSpec(dims=(48, 96, 192, 384), depths=(2, 2, 14, 2)),
            decoder=SAM2_DECODER,
            family="EdgeTAM",
            masks_preset="sam2",  # the settings of its own SAM2AutomaticMaskGenerator
            file_name="edgetam.pt",
            url="https://raw.githubusercontent.com/facebookresearch/EdgeTAM/main/checkpoints/edgetam.pt",
            # Meta publishes no digest. This is that of BoxMOT (mikel-brostrom/boxmot).
            sha256="ed2d4850b8792c239689b043c47046ec239b6e808a3d9b6ae676c803fd8780df",
            size_mb=56.1,
            source="Meta, EdgeTAM (2025)",
        ),
        _sam3_tracker(),
    )
}


def model_names() -> list[str]:
    """The names of all models, in the table's order."""
    return list(MODELS)


def teacher_names() -> list[str]:
    """The models with published weights, which a smaller one can be distilled from."""
    return [name for name, spec in MODELS.items() if spec.url is not None]
