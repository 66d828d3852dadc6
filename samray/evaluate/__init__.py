"""How good a model is on images whose regions are known: single clicks, and the masks of the whole image."""

from __future__ import annotations

from typing import Final

MIN_AREA: Final = 500
"""Pixels of the smallest region that is clicked on, unless said otherwise. Here, for `--help` loads no torch."""
