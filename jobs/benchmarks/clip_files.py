"""The small files of a CLIP in the official layout: its tokenizer and how images get into it. For jobs and tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def write_tokenizer(folder: Path, words: Sequence[str], image_size: int) -> dict[str, int]:
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
        "image_processor_type": "CLIPImageProcessor", "crop_size": {"height": image_size, "width": image_size},
        "size": {"shortest_edge": image_size}, "resample": 3, "do_resize": True, "do_center_crop": True,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(numbers))
    return vocab
