"""Measure the quality of a model on images with known regions: single clicks, and all masks of an image."""

from __future__ import annotations

from typing import Final

MIN_AREA: Final = 500
"""Default minimum area of a region in pixels. Defined here because `--help` must not import torch."""
