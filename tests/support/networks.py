"""Small random networks of text in the official layout: config.json, model.safetensors, tokenizer, preprocessor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from samray import storage
from samray.labels.networks import WEIGHTS
from samray.sam.checkpoints import load_model
from samray.sam.fetch import file_sha256
from samray.sam.text_projection import TextProjection
from tests.support.tiny_clip import write_tokenizer as write_clip_tokenizer

WORDS: Final = ("cat", "dog", "fire", "hydrant", "red", "square", "green", "blue", "car", "tree", "house", "##s", "st")
_FULL_STOP: Final = 1012
"""Its id in BERT's vocabulary, which Grounding DINO knows as the end of a phrase; [CLS] is 101, [SEP] 102."""


def write_tokenizer(folder: Path) -> None:
    """BERT's tokenizer with the words above, and 100 names `n0` to `n99`."""
    from transformers import BertTokenizerFast

    vocabulary = [f"[unused{i}]" for i in range(_FULL_STOP + 200)]
    for word, index in {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": _FULL_STOP}.items():
        vocabulary[index] = word
    words = [*WORDS, *(f"n{i}" for i in range(100))]
    vocabulary[_FULL_STOP + 1 : _FULL_STOP + 1 + len(words)] = words
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)


def write_grounding_dino(folder: Path, seed: int = 0, max_text_len: int = 256) -> Path:
    """A Grounding DINO of about 100,000 parameters, that looks at images of 64 pixels and finds 20 boxes."""
    from transformers import (
        BertConfig,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        SwinConfig,
    )

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 2], window_size=4,
            out_features=["stage2", "stage3"],
        ),
        text_config=BertConfig(
            vocab_size=_FULL_STOP + 200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=512,
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=4, decoder_attention_heads=4, num_queries=20, num_feature_levels=3,
        max_text_len=max_text_len,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = GroundingDinoForObjectDetection(config).eval()
    with torch.no_grad():
        # At the start all boxes and scores are nearly equal: spread them, so that thresholds and NMS have work.
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.15)
        model.model.text_backbone.embeddings.word_embeddings.weight.mul_(20)
    model.save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 107}).save_pretrained(folder)
    return folder


SAM3_SIZE: Final = 56
"""Side of the square at which `write_sam3`'s network looks; its masks have 32 x 32 pixels."""


def write_sam3(folder: Path, seed: int = 0, texts: int = 32) -> Path:
    """A SAM 3 of about 100,000 parameters, with 20 queries, laid out as facebook/sam3: the detector inside a network
    for videos, whose tracker is not used here. texts: the most tokens of a phrase."""
    from safetensors.torch import save_file
    from transformers import Sam3Config, Sam3Model

    vocab = write_clip_tokenizer(folder, tuple(word for word in WORDS if word.isalpha()), SAM3_SIZE)
    (folder / "preprocessor_config.json").unlink()
    config = Sam3Config(**_sam3_config(len(vocab), texts))
    torch.manual_seed(seed)
    model = Sam3Model(config).eval()
    with torch.no_grad():
        # At the start all boxes, scores and masks are nearly equal: spread them, so that thresholds have work.
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.text_projection.weight.mul_(5)
        model.text_encoder.text_model.embeddings.token_embedding.weight.mul_(5)
    tensors = {f"detector_model.{key}": value.contiguous() for key, value in model.state_dict().items()}
    save_file({**tensors, "tracker_neck.unused.weight": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    whole = {"model_type": "sam3_video", "detector_config": config.to_dict(), "tracker_config": {}}
    (folder / "config.json").write_text(json.dumps(whole))
    side = {"height": SAM3_SIZE, "width": SAM3_SIZE}
    pixels = {
        "image_processor_type": "Sam3ImageProcessor", "size": side, "mask_size": {"height": 32, "width": 32},
        "resample": 2, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "do_convert_rgb": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    processor = {"image_processor": pixels, "processor_class": "Sam3Processor", "target_size": SAM3_SIZE}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def _sam3_config(vocab_size: int, texts: int) -> dict[str, Any]:
    small = {"hidden_size": 16, "num_attention_heads": 2}
    layers = {**small, "num_layers": 1, "intermediate_size": 32}
    backbone = {
        "model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": SAM3_SIZE, "patch_size": 7, "window_size": 4,
        "global_attn_indexes": [1], "pretrain_image_size": 28,
    }  # fmt: skip
    text = {
        "model_type": "clip_text_model", "vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 32,
        "projection_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": texts,
        "hidden_act": "gelu", "bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1,
        "pad_token_id": vocab_size - 1,
    }  # fmt: skip
    return {
        "vision_config": {
            "backbone_config": backbone, "fpn_hidden_size": 16,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        "text_config": text,
        "geometry_encoder_config": layers,
        "detr_encoder_config": layers,
        "detr_decoder_config": {**layers, "num_layers": 2, "num_queries": 20},
        "mask_decoder_config": small,
    }  # fmt: skip


def write_hashed(folder: str, kind: str) -> str:
    """A folder, on any storage, that looks like a network of this kind, where it is hashed and not loaded."""
    storage.put(storage.join(folder, "config.json"), json.dumps({"model_type": kind}).encode())
    for name in ("preprocessor_config.json", "tokenizer.json"):
        storage.put(storage.join(folder, name), json.dumps(name).encode())
    storage.put(storage.join(folder, WEIGHTS), (2).to_bytes(8, "little") + b"{}")  # safetensors without a tensor
    return folder


def write_text_weights(path: Path, *, clip: Path) -> Path:
    """The embedded model with a random text projection for that CLIP, whose embeddings have 16 numbers."""
    model = load_model("tiny")
    sha256 = bytes.fromhex(file_sha256(clip / WEIGHTS))
    model.prompt_encoder.text_projection = TextProjection(16, model.spec.embed_dim, sha256)
    save_file(model.state_dict(), path)
    return path
