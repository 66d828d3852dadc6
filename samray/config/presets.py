"""Presets: named YAML files of settings."""

from __future__ import annotations

from pathlib import Path

from samray.config.base import did_you_mean
from samray.errors import ConfigError


def preset_names() -> list[str]:
    """Names that `--preset` takes."""
    return sorted(path.stem for path in _preset_dir().glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The preset's YAML file. Raises ConfigError that names the closest preset if there is none with this name."""
    names = preset_names()
    if name not in names:
        near = did_you_mean(name, names)
        raise ConfigError(f"unknown preset {name!r}{near}; presets are {', '.join(names)}")
    return _preset_dir() / f"{name}.yaml"


def _preset_dir() -> Path:
    """An installed wheel has the presets inside the package; a checkout has them in configs/presets."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_presets"
    return packaged if packaged.is_dir() else package.parent / "configs" / "presets"
