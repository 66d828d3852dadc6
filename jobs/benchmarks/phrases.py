"""For jobs/benchmark.py: what more phrases cost, with networks in their published size and random weights."""

from __future__ import annotations

import copy
import json
import statistics
import string
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from jobs.benchmarks.weights import blobs
from samray.labels.grounding_dino import Detector
from samray.labels.networks import find_network
from samray.labels.sam3 import Segmenter

_VOCABULARY = 30_522
_SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012}


def phrases(by: str, numbers: Sequence[int], rounds: int, image_hw: tuple[int, int]) -> dict[str, Any]:
    """CPU seconds of one thread to find so many phrases of two words in one image, in turn: boxes by grounding_dino,
    masks by sam3.

    Also how often the image's encoder and the encoder that fuses image and text ran per image.
    """
    image = blobs(0, image_hw)
    finders = {"grounding_dino": _grounding_dino, "sam3": _sam3}[by](numbers)
    torch.set_num_threads(1)
    passes = {n: {"image": 0, "fusion": 0} for n in numbers}
    seconds: dict[int, list[float]] = {n: [] for n in numbers}
    for _ in range(rounds):
        for n in numbers:  # in turn, so that all see the same load
            hooks = [
                module.register_forward_hook(partial(_count, passes[n], name))
                for name, module in finders[n].modules.items()
            ]
            started = time.process_time()
            finders[n].find(image)
            seconds[n].append(time.process_time() - started)
            for hook in hooks:  # modules may be shared
                hook.remove()
    rows = {
        n: {"median_cpu_s": statistics.median(seconds[n]), **{k: v / rounds for k, v in passes[n].items()}}
        for n in numbers
    }
    first = rows[numbers[0]]["median_cpu_s"]
    return {
        "by": by,
        "image_hw": list(image_hw),
        "rounds": rounds,
        "phrases": rows,
        "times_the_first": {n: row["median_cpu_s"] / first for n, row in rows.items()},
    }


@dataclass(frozen=True)
class _Finder:
    """Finds a number of phrases in an image."""

    find: Callable[[NDArray[np.uint8]], Any]
    modules: dict[str, nn.Module]
    """The parts whose passes are counted."""


def _grounding_dino(numbers: Sequence[int]) -> dict[int, _Finder]:
    thresholds: dict[str, Any] = {"score_thresh": 0.3, "text_thresh": 0.25, "nms_thresh": 0.8}
    with tempfile.TemporaryDirectory() as folder:
        _write_grounding_dino(Path(folder))
        network = find_network(folder, ("grounding-dino",), "grounding_dino")
        detectors = {n: Detector(network, [f"red {i}" for i in range(n)], torch.device("cpu")) for n in numbers}
    return {
        n: _Finder(
            partial(detector.detect, **thresholds),
            {"image": detector.model.model.backbone.conv_encoder, "fusion": detector.model.model.encoder},
        )
        for n, detector in detectors.items()
    }


def _sam3(numbers: Sequence[int]) -> dict[int, _Finder]:
    """Random weights have no certain answer, so at 0.5 few phrases or none are found; masks are not measured."""
    with tempfile.TemporaryDirectory() as folder:
        _write_sam3(Path(folder))
        network = find_network(folder, ("sam3",), "sam3")
        most = Segmenter(network, [f"red {i}" for i in range(max(numbers))], torch.device("cpu"))

    def finder(n: int) -> _Finder:
        segmenter = copy.copy(most)  # the same network: it has 3 GB
        segmenter.phrases, segmenter.texts = most.phrases[:n], copy.copy(most.texts)
        texts, masks = most.texts.of(())
        segmenter.texts.common = [(texts[:n], masks[:n])]
        modules = {"image": most.model.vision_encoder, "fusion": most.model.detr_encoder}
        return _Finder(
            lambda image: list(segmenter.find(segmenter.encode(image), score_thresh=0.5, phrases_at_once=1)), modules
        )

    return {n: finder(n) for n in numbers}


def _count(counts: dict[str, int], name: str, *_: object) -> None:
    counts[name] += 1


def _write_grounding_dino(folder: Path) -> None:
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


def _write_sam3(folder: Path) -> None:
    """The published layout and size; the tokenizer knows letters and figures, so a phrase has a few tokens."""
    from transformers import CLIPTokenizer, Sam3Config, Sam3Model

    signs = string.ascii_lowercase + string.digits
    tokens = [*signs, *(sign + "</w>" for sign in signs), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    torch.manual_seed(0)
    Sam3Model(Sam3Config()).save_pretrained(folder)
    pixels = {"size": 1008, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
