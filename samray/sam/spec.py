"""The table of models as the networks see it; the rows are in `samray.config.models`, which settings read, too.

Shape letters used throughout `samray.sam`: B images, N prompts of an image, P points of a prompt, T decoder tokens,
M masks of a prompt, K kept masks, C embedding channels, (h, w) the embedding grid, L = h * w, S the square input side.
"""

from __future__ import annotations

from samray.config.model_specs import (
    DecoderVariant,
    EncoderSpec,
    HieraSpec,
    ModelSpec,
    RepVitSpec,
    RopeVitSpec,
    TinyVitSpec,
    VitSpec,
)
from samray.config.models import MODELS

__all__ = [
    "MODELS",
    "DecoderVariant",
    "EncoderSpec",
    "HieraSpec",
    "ModelSpec",
    "RepVitSpec",
    "RopeVitSpec",
    "TinyVitSpec",
    "VitSpec",
]
