"""Automatic mask generation: grid prompts, filters, non-maximum suppression, run-length encoding. torch and numpy."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samray.masks.generator import MaskGenerator

__all__ = ["MaskGenerator"]


def __getattr__(name: str) -> Any:
    """Import torch only for what needs it: the driver of `samray edges` does not."""
    if name != "MaskGenerator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from samray.masks.generator import MaskGenerator

    return MaskGenerator
