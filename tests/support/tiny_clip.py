"""A small random CLIP in the official layout, written by the tests: network, tokenizer and image processor."""

from __future__ import annotations

from pathlib import Path

from jobs.benchmarks.clip_files import write_tokenizer

WORDS = ("a", "photo", "of", "the", "red", "green", "blue", "square", "cat", "dog", "thing", "large", "small")
IMAGE_SIZE = 32


def write_clip(folder: Path, seed: int = 0, words: tuple[str, ...] = WORDS) -> Path:
    """Write config.json, model.safetensors, vocab.json, merges.txt, tokenizer files and preprocessor_config.json."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    vocab = write_tokenizer(folder, words, IMAGE_SIZE)
    text = {"vocab_size": len(vocab), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": vocab["<|startoftext|>"],
            "eos_token_id": vocab["<|endoftext|>"], "pad_token_id": vocab["<|endoftext|>"]}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": IMAGE_SIZE, "patch_size": 8}  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name != "logit_scale" and "norm" not in name:
                # Wide enough that different pixels and words give different embeddings.
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder, safe_serialization=True)
    return folder
