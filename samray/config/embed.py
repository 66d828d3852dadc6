"""The settings of `samray embed`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from samray.config.load import Sections, make_sections, user_settings
from samray.config.sections import ClusterConfig, Config, InputConfig, ModelConfig, OutputConfig, StorageConfig


class EmbedOutputConfig(OutputConfig):
    """How embeddings are stored, rows grouped into shards, and when a run counts as failed."""

    embeddings: Literal["float16", "int8", "float32"] = "float16"
    """How to store values: float16 gives nearly the masks of float32 in half the bytes; int8 takes a quarter."""


class EmbedConfig(Config):
    """All settings of `samray embed`; those of masks have no effect."""

    finds_masks: ClassVar[bool] = False
    output: EmbedOutputConfig = EmbedOutputConfig()

    @model_validator(mode="after")
    def _no_masks(self) -> EmbedConfig:
        if self.input.prompts is not None or self.labels.by is not None:
            setting = "input.prompts" if self.labels.by is None else "labels.by"
            raise ValueError(
                f"{setting} does not apply to samray embed, which makes no masks; samray label --from does"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """As in `Config`, without masks; `task` keeps `samray label` from resuming the run."""
        identity = {**super().identity(), "task": "embed"}
        del identity["masks"]
        return identity

    def default_identity(self) -> dict[str, Any]:
        """As in `Config`, without `task`: a run that has none is not one of `samray embed`."""
        defaults = super().default_identity()
        del defaults["task"]
        return defaults


EMBED_SECTIONS: Sections = {
    cls.section: cls for cls in (InputConfig, ModelConfig, EmbedOutputConfig, ClusterConfig, StorageConfig)
}
"""The sections of `samray embed`."""


def load_embed_config(file: str | Path | None = None, overrides: Sequence[str] = ()) -> EmbedConfig:
    """Load the settings: defaults, then the file, then the overrides (`section.key=value`).

    Raises ConfigError that names every bad setting, its value, what is allowed and the closest valid name.
    """
    values, problems = user_settings(EMBED_SECTIONS, file, overrides)
    return EmbedConfig(**make_sections(EMBED_SECTIONS, values, problems))
