"""The settings: sections, presets, and the one way to load them."""

from __future__ import annotations

from samray.config.labels import LabelsConfig
from samray.config.load import (
    SECTIONS,
    Sections,
    SettingRow,
    load_config,
    make_sections,
    setting_rows,
    user_settings,
)
from samray.config.presets import preset_names, preset_path
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

__all__ = [
    "SECTIONS",
    "ClusterConfig",
    "Config",
    "InputConfig",
    "LabelsConfig",
    "MaskConfig",
    "ModelConfig",
    "OutputConfig",
    "Sections",
    "SettingRow",
    "StorageConfig",
    "load_config",
    "make_sections",
    "model_masks",
    "preset_names",
    "preset_path",
    "setting_rows",
    "user_settings",
]
