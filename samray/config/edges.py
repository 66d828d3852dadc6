"""The settings of `samray edges`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from samray.config.base import Settings
from samray.config.load import Sections, make_sections, user_settings
from samray.config.sections import (
    ClusterConfig,
    Config,
    InputConfig,
    MaskConfig,
    ModelConfig,
    OutputConfig,
    StorageConfig,
)


class EdgeConfig(Settings):
    """How edges are detected; the defaults are those of the SAM paper, section D.2."""

    section: ClassVar[str] = "edges"
    points_per_side: int = Field(default=16, ge=1, le=256)
    """Points along one side of the prompt grid; all three masks of each point are used, whatever their scores."""
    box_nms_thresh: float = Field(default=0.7, ge=0, le=1)
    """Box IoU above which two masks are duplicates; the one with the lower predicted IoU is dropped."""
    thin: bool = True
    """Thin edges to about one pixel, by non-maximum suppression across the edge."""
    bits: Literal[8, 16] = 8
    """Bits per pixel of the PNG files: 8 as other tools expect, 16 for finer steps."""

    def masks(self) -> MaskConfig:
        """The mask settings of the method: no filter on scores or sizes, no crops."""
        return MaskConfig(
            points_per_side=self.points_per_side,
            box_nms_thresh=self.box_nms_thresh,
            pred_iou_thresh=0.0,
            stability_score_thresh=0.0,
            min_mask_region_area=0,
            min_mask_area=0,
            max_mask_area_fraction=None,
            crop_n_layers=0,
        )


class EdgesConfig(Config):
    """All settings of `samray edges`. The mask settings follow from those of `edges`."""

    edges: EdgeConfig = EdgeConfig()

    @model_validator(mode="after")
    def _masks_follow_the_edges(self) -> EdgesConfig:
        if self.input.prompts is not None:
            raise ValueError("input.prompts does not apply to edges: the prompts are a grid, edges.points_per_side")
        if self.output.embeddings != "none":
            raise ValueError("output.embeddings does not apply to edges; samray embed stores embeddings")
        self.__dict__["masks"] = self.edges.masks().for_model(self.model.name)  # frozen, but not in use yet
        return self

    def identity(self) -> dict[str, Any]:
        """As in `Config`; `task` keeps `samray label` from resuming the run."""
        return {**super().identity(), "task": "edges", "edges": self.edges.model_dump(mode="json")}

    def default_identity(self) -> dict[str, Any]:
        """As in `Config`, without `task`: a run that has none is not one of `samray edges`."""
        defaults = {**super().default_identity(), "edges": EdgeConfig().model_dump(mode="json")}
        del defaults["task"]
        return defaults


EDGE_SECTIONS: Sections = {
    cls.section: cls for cls in (InputConfig, ModelConfig, EdgeConfig, OutputConfig, ClusterConfig, StorageConfig)
}
"""The sections of `samray edges`."""


def load_edges_config(
    file: str | Path | None = None, overrides: Sequence[str] = (), sections: Sections = EDGE_SECTIONS
) -> EdgesConfig:
    """Load the settings: defaults, then the file, then the overrides (`section.key=value`).

    Raises ConfigError that names every bad setting, its value, what is allowed and the closest valid name.
    """
    values, problems = user_settings(sections, file, overrides)
    return EdgesConfig(**make_sections(sections, values, problems))
