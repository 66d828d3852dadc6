"""Small random networks of text in the official layout: config.json, model.safetensors, tokenizer, preprocessor."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

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
