"""For jobs/benchmark.py: what more phrases cost, with Grounding DINO in its published size and random weights."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jobs.benchmarks.weights import blobs
from samray.labels.grounding_dino import Detector
from samray.labels.networks import find_network

_VOCABULARY = 30_522
_SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012}


def phrases(numbers: Sequence[int], rounds: int, image_hw: tuple[int, int]) -> dict[str, Any]:
    """CPU seconds of one thread to find the boxes of so many phrases of two words in one image, in turn.

    Also how often the image's backbone and the fusing encoder ran per image.
    """
    image = blobs(0, image_hw)
    with tempfile.TemporaryDirectory() as folder:
        _write_network(Path(folder))
        network = find_network(folder, "grounding-dino", "grounding_dino")
        detectors = {n: Detector(network, [f"red {i}" for i in range(n)], torch.device("cpu")) for n in numbers}
    torch.set_num_threads(1)
    passes = {n: {"image": 0, "fusion": 0} for n in numbers}
    for n, detector in detectors.items():
        model = detector.model.model
        for name, module in (("image", model.backbone.conv_encoder), ("fusion", model.encoder)):
            module.register_forward_hook(partial(_count, passes[n], name))
    seconds: dict[int, list[float]] = {n: [] for n in numbers}
    for _ in range(rounds):
        for n, detector in detectors.items():  # in turn, so that all see the same load
            started = time.process_time()
            detector.detect(image, score_thresh=0.3, text_thresh=0.25, nms_thresh=0.8)
            seconds[n].append(time.process_time() - started)
    rows = {
        n: {"median_cpu_s": statistics.median(seconds[n]), **{k: v / rounds for k, v in passes[n].items()}}
        for n in numbers
    }
    first = rows[numbers[0]]["median_cpu_s"]
    return {
        "image_hw": list(image_hw),
        "rounds": rounds,
        "phrases": rows,
        "times_the_first": {n: row["median_cpu_s"] / first for n, row in rows.items()},
    }


def _count(counts: dict[str, int], name: str, *_: object) -> None:
    counts[name] += 1


def _write_network(folder: Path) -> None:
    """The published layout and size; the tokenizer knows no words, so that each word is one token."""
    from transformers import (
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
    )

    words = [f"[unused{i}]" for i in range(_VOCABULARY)]
    for word, index in _SPECIAL.items():
        words[index] = word
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    torch.manual_seed(0)
    GroundingDinoForObjectDetection(GroundingDinoConfig()).save_pretrained(folder)
    GroundingDinoImageProcessorPil().save_pretrained(folder)
