"""The settings of `samray name`: those of `labels.by=clip`, and those of the job."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import create_model

from samray.config.base import Settings
from samray.config.labels import LabelsConfig
from samray.config.load import Sections, make_sections, user_settings
from samray.config.sections import ClusterConfig, Config, ModelConfig, OutputConfig, StorageConfig


def _part_of(section: type[Settings], doc: str, keys: Mapping[str, str | None]) -> type[Settings]:
    """A section with some of the settings of another one: the same defaults and checks.

    keys: name of a setting -> its description; None for that of the other section.
    """
    fields: dict[str, Any] = {}
    for key, description in keys.items():
        field = copy.copy(section.model_fields[key])
        field.description = description or field.description
        fields[key] = (field.annotation, field)
    part: type[Settings] = create_model(section.__name__, __base__=Settings, __doc__=doc, **fields)
    part.section = section.section
    return part


_LABELS: Final = {
    "phrases": "Names that a mask may get: a list, as in [cat,fire hydrant], or a text file with one per line",
    "checkpoint": None,
    "score_thresh": "Least probability of a name, 0 to 1; null: 0.5. A mask whose best name has less stays unnamed",
    "crops": "Ways to cut out a mask, whose embeddings are averaged: plain, blanked, enlarged, boxed. Fewer are faster",
    "negatives": "Phrases that are not names, as in [wall,background]: a mask most like one of them stays unnamed",
    "templates": "Sentences in which each name takes the place of {}; their embeddings are averaged",
}
_SECTIONS: Final = (
    _part_of(LabelsConfig, "The names, and how a mask gets one.", _LABELS),
    _part_of(ModelConfig, "Where the network runs.", {"device": None}),
    OutputConfig,
    ClusterConfig,
    StorageConfig,
)
NAME_SECTIONS: Sections = {cls.section: cls for cls in _SECTIONS}
"""The sections of `samray name`."""


def load_names_config(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Load the settings: defaults, then the file, then the overrides (`section.key=value`).

    Raises ConfigError that names every bad setting, its value, what is allowed and the closest valid name.
    """
    values, problems = user_settings(NAME_SECTIONS, file, overrides)
    # Tuples instead of YAML's lists, as LabelsConfig makes them.
    labels: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in values.get("labels", {}).items()
    }
    sections = make_sections(NAME_SECTIONS, {**values, "labels": labels}, problems)
    sections["labels"] = LabelsConfig(by="clip", **labels)
    sections["model"] = ModelConfig(**values.get("model", {}))
    return Config(**sections)
