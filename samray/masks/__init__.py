"""Automatic mask generation: grid prompts, filters, non-maximum suppression, run-length encoding. torch and numpy."""

from samray.masks.generator import MaskGenerator

__all__ = ["MaskGenerator"]
