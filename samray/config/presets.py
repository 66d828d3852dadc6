"""The presets: YAML files under a name."""

from __future__ import annotations

from pathlib import Path

from samray.config.base import did_you_mean
from samray.errors import ConfigError


def preset_names() -> list[str]:
    """Names that `--preset` takes."""
    return sorted(path.stem for path in _preset_dir().glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The preset's YAML file. Raises ConfigError, naming the nearest preset, when there is none of that name."""
    names = preset_names()
    if name not in names:
        near = did_you_mean(name, names)
        raise ConfigError(f"there is no preset {name!r}{near}; presets are {', '.join(names)}")
    return _preset_dir() / f"{name}.yaml"


def _preset_dir() -> Path:
    """Inside an installed wheel the presets lie in the package; in a checkout in configs/presets."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "_presets"
    return packaged if packaged.is_dir() else package.parent / "configs" / "presets"
