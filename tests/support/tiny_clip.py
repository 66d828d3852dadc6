"""A small random CLIP in the official layout, written by the tests: network, tokenizer and image processor."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ("a", "photo", "of", "the", "red", "green", "blue", "square", "cat", "dog", "thing", "large", "small")
IMAGE_SIZE = 32
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def write_clip(folder: Path, seed: int = 0, words: tuple[str, ...] = WORDS) -> Path:
    """Write config.json, model.safetensors, vocab.json, merges.txt, tokenizer files and preprocessor_config.json."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    vocab = write_tokenizer(folder, words)
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


def write_tokenizer(folder: Path, words: tuple[str, ...] = WORDS) -> dict[str, int]:
    """Write the files of a CLIPTokenizer that knows letters and these words. Returns its vocabulary."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,-'"]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        # Joined from the left, one letter at a time.
        while len(parts) > 1:
            if (pair := (parts[0], parts[1])) not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            parts = ["".join(pair), *parts[2:]]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    numbers = {
        "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "size": {"shortest_edge": IMAGE_SIZE}, "resample": 3, "do_resize": True, "do_center_crop": True,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))
    return vocab
