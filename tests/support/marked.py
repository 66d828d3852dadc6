"""Images with known regions, and a model that answers clicks with given masks, for tests of `samray evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from samray.evaluate.regions import RegionImage, Rle
from tests.support import standin
from tests.support.handmade import annotation

HEIGHT, WIDTH = 40, 60


def box(top: int, bottom: int, left: int, right: int, hw: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    mask = np.zeros(hw, bool)
    mask[top:bottom, left:right] = True
    return mask


def rle(mask: np.ndarray) -> Rle:
    return annotation(mask)["segmentation"]


def bsds_row(name: str, annotators: list[list[np.ndarray]], data: bytes | None = None) -> dict[str, Any]:
    """A row as BSDS500's Parquet has it, of an image of WIDTH x HEIGHT."""
    regions = [[rle(mask)["counts"] for mask in masks] for masks in annotators]
    return {
        "image_id": len(name),
        "file_name": name,
        "width": WIDTH,
        "height": HEIGHT,
        "jpeg": standin.make_image(1, (WIDTH, HEIGHT)) if data is None else data,
        "annotators": [
            {"annotator": i, "boundary": "", "regions": regions_of_annotator}
            for i, regions_of_annotator in enumerate(regions)
        ],
    }


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def region_image(annotators: list[list[np.ndarray]]) -> RegionImage:
    pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    return RegionImage("an image", pixels, [[rle(mask) for mask in masks] for masks in annotators])


class KnownSam:
    """Answers a click as a Sam of a square of 120 pixels would: with the masks that it was given, click by click."""

    device = torch.device("cpu")
    image_size = 120

    def __init__(self, answers: list[list[np.ndarray]], scores: list[list[float]]) -> None:
        self.answers, self.scores = answers, scores
        self.num_encoded = 0
        self.clicks: list[list[float]] = []

    def preprocess(self, images: list[np.ndarray]) -> Any:
        height, width = images[0].shape[:2]
        return torch.zeros(1), [(2 * height, 2 * width)]

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        self.num_encoded += 1
        return pixels

    def prepare_decoder(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings

    def decode_points(self, context: Any, points: torch.Tensor, labels: torch.Tensor) -> Any:
        assert labels.shape == points.shape[:2] == (len(points), 1)
        assert (labels == 1).all()
        chunk = slice(len(self.clicks), len(self.clicks) + len(points))
        self.clicks += points[:, 0].tolist()
        logits = torch.tensor(np.array(self.answers[chunk])).float().flatten(0, 1) - 0.5
        return type("Decoded", (), {"logits": logits, "all_iou": torch.tensor(self.scores[chunk])})()

    def postprocess(self, logits: torch.Tensor, input_hw: Any, original_hw: Any) -> torch.Tensor:
        assert input_hw == (2 * original_hw[0], 2 * original_hw[1])
        return logits


TALL, WIDE, SMALL = box(0, 40, 0, 21), box(10, 31, 22, 60), box(0, 3, 30, 33)
NOTHING, HALF = box(0, 0, 0, 0), box(0, 20, 0, 21)
QUARTER = box(10, 31, 22, 60) & (np.arange(WIDTH) < 22 + 38 // 2)


def known_sam() -> KnownSam:
    """IoUs 1, 0.5, 0 with TALL, of which 0.5 is scored best; 0, 0, 0.5 with WIDE, and 0.5 is scored best."""
    return KnownSam(
        [[TALL, HALF, NOTHING], [NOTHING, TALL, QUARTER]],
        [[0.2, 0.9, 0.1], [0.3, 0.2, 0.4]],
    )
