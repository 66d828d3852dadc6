"""Settings from presets, YAML files and `section.key=value` overrides, applied over the defaults in that order.

Nothing is guessed: an unknown key, a wrong type or a value out of range raises ConfigError before anything starts. The
error names all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from samray.config.base import OneOf, Settings, SettingsError, allowed_values, as_typed, did_you_mean
from samray.config.labels import LabelsConfig
from samray.config.models import MODELS, model_names
from samray.config.presets import preset_path
from samray.config.sections import (
    ClusterConfig,
    Config,
    InputConfig,
    MaskConfig,
    ModelConfig,
    OutputConfig,
    StorageConfig,
    model_masks,
)
from samray.config.yaml import load_yaml_file, parse_value
from samray.errors import ConfigError

Sections = Mapping[str, type[Settings]]

SECTIONS: Sections = {
    cls.section: cls
    for cls in (InputConfig, ModelConfig, MaskConfig, LabelsConfig, OutputConfig, ClusterConfig, StorageConfig)
}
"""The sections of `samray label`. `samray train` has its own (`samray.train.settings`)."""


class SettingRow(NamedTuple):
    """One setting as listed by `--help` and the docs."""

    name: str
    """Section and key, as typed on the command line."""
    default: Any
    allowed: str
    description: str
    default_of: Mapping[str, Any] = {}
    """Model name -> default, for the models with their own default."""
    is_name: bool = False
    """Whether `allowed` lists the names of a table."""

    def default_of_preset(self) -> dict[str, Any]:
        """`default_of`, with models that share a preset as one: name of the preset -> default."""
        return {MODELS[name].masks_preset or name: default for name, default in self.default_of.items()}


def setting_rows(section: str, sections: Sections = SECTIONS) -> list[SettingRow]:
    """The settings of one section, in declaration order."""
    rows = []
    for key, field in sections[section].model_fields.items():
        description = " ".join((field.description or "").rstrip(".").split())
        default_of_preset = {}
        if sections[section] is MaskConfig:
            default_of_preset = {name: model_masks(name).get(key, field.default) for name in model_names()}
            default_of_preset = {
                name: default for name, default in default_of_preset.items() if default != field.default
            }
        is_name = any(isinstance(limit, OneOf) for limit in field.metadata)
        allowed = allowed_values(field)
        rows.append(SettingRow(f"{section}.{key}", field.default, allowed, description, default_of_preset, is_name))
    return rows


def load_config(preset: str | None = None, file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Load the settings of a run: defaults, then the preset, then the file, then the overrides.

    overrides: `section.key=value`. Mask settings that none of these give follow the model.
    Raises ConfigError that names every bad setting, its value, what is allowed and the closest valid name.
    """
    of_user, problems = user_settings(SECTIONS, file, overrides)
    values: dict[str, dict[str, Any]] = {}
    if preset is not None:
        values, more_problems = _lay_over(values, load_yaml_file(preset_path(preset)), SECTIONS)
        problems += more_problems
        if of_user.get("model", {}).get("name", preset) == preset == values.get("model", {}).get("name"):
            values.pop("masks", None)  # these are the model's defaults; as not given, they can follow an older run
    values, more_problems = _lay_over(values, of_user, SECTIONS)
    return Config(**make_sections(SECTIONS, values, problems + more_problems))


def user_settings(
    sections: Sections, file: str | Path | None, overrides: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Settings from a file and from `section.key=value` overrides, by section; and the list of problems found.

    Overrides win over the file. Raises ConfigError if the file cannot be read.
    """
    if isinstance(overrides, str | Mapping) or not all(isinstance(override, str) for override in overrides):
        raise ConfigError(
            f"overrides takes a list of strings, such as {_as_overrides(overrides)}; got {type(overrides).__name__}"
        )
    values, problems = _lay_over({}, {} if file is None else load_yaml_file(Path(file)), sections)
    for override in overrides:
        try:
            values, more_problems = _lay_over(values, _parse_override(override, sections), sections)
            problems += more_problems
        except ConfigError as error:
            problems.append(str(error))
    return values, problems


def _as_overrides(overrides: Any) -> list[str]:
    """Guess what was meant by overrides that are not a list of strings."""
    if isinstance(overrides, str):
        return [overrides]
    if not isinstance(overrides, Mapping) or not overrides:
        return ["masks.points_per_side=16"]
    texts = []
    for name, value in overrides.items():
        values = {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
        texts += [f"{key}={as_typed(part)}" for key, part in values.items()]
    return texts


def make_sections(
    sections: Sections, values: Mapping[str, Mapping[str, Any]], problems: Sequence[str]
) -> dict[str, Any]:
    """Build the sections from these values, by name. Raises SettingsError with `problems` and any new ones."""
    made: dict[str, Any] = {}
    all_problems = list(problems)
    # All sections are tried, so that one message names every problem.
    for section, cls in sections.items():
        try:
            made[section] = cls(**values.get(section, {}))
        except SettingsError as error:
            all_problems += error.problems
    if all_problems:
        raise SettingsError(all_problems)
    return made


def _parse_override(override: str, sections: Sections) -> dict[str, Any]:
    """Parse `masks.points_per_side=16` into {"masks": {"points_per_side": 16}}."""
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and key):
        every = {row.name.partition(".")[2]: row.name for s in sections for row in setting_rows(s, sections)}
        bare = name.strip().rpartition(".")[2]  # a missing section is the most likely mistake
        near = f"; did you mean {every[bare]}?" if bare in every else did_you_mean(bare, every.values())
        raise ConfigError(f"{override!r} is not of the form section.key=value{near}")
    try:
        return {section: {key: parse_value(text)}}
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _lay_over(
    values: dict[str, dict[str, Any]], more: dict[str, Any], sections: Sections
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """`values` with the settings of `more` on top, section by section; and the problems found in `more`."""
    merged, problems = dict(values), []
    for section, settings in more.items():
        if section not in sections:
            near = did_you_mean(section, sections)
            problems.append(f"unknown section {section}{near}; sections are {', '.join(sections)}")
        elif settings is not None and not isinstance(settings, dict):
            problems.append(f"{section} = {settings!r} is not allowed; it takes settings, one per line below it")
        else:
            # Key by key: what `more` does not name stays.
            merged[section] = {**values.get(section, {}), **(settings or {})}
    return merged, problems
