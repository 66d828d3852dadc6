"""samray: label whole buckets of images with Segment Anything on Ray, as Parquet in the SA-1B layout.

The public names are imported on first use: `import samray` imports neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samray.audit.run import QualityReport, quality
    from samray.config import ClusterConfig, Config, MaskConfig, ModelConfig, OutputConfig, load_config
    from samray.config.edges import EdgeConfig, EdgesConfig
    from samray.config.embed import EmbedConfig
    from samray.errors import ConfigError, ImageError, SamrayError, StorageError
    from samray.exports.export import ExportReport, export
    from samray.imports.import_ import import_
    from samray.masks.edges import EdgeGenerator
    from samray.masks.generator import MaskGenerator
    from samray.masks.prompted import PromptedGenerator
    from samray.output.embeddings import Embedding, read_embedding
    from samray.output.lookup import read_image
    from samray.output.mask_dataset import MaskDataset
    from samray.pipeline.dataset_stage import label_dataset
    from samray.pipeline.edges import detect_edges
    from samray.pipeline.embed import embed
    from samray.pipeline.label_from import label_from
    from samray.pipeline.naming import name
    from samray.pipeline.report import ImportReport, LabelReport
    from samray.pipeline.run import label
    from samray.prompts import Prompt
    from samray.sam.checkpoints import load_model

__version__ = "0.1.0"

_HOMES = {
    "Config": "samray.config",
    "MaskConfig": "samray.config",
    "ModelConfig": "samray.config",
    "OutputConfig": "samray.config",
    "ClusterConfig": "samray.config",
    "EmbedConfig": "samray.config.embed",
    "EdgeConfig": "samray.config.edges",
    "EdgesConfig": "samray.config.edges",
    "load_config": "samray.config",
    "read_image": "samray.output.lookup",
    "read_embedding": "samray.output.embeddings",
    "Embedding": "samray.output.embeddings",
    "MaskDataset": "samray.output.mask_dataset",
    "ConfigError": "samray.errors",
    "ImageError": "samray.errors",
    "SamrayError": "samray.errors",
    "StorageError": "samray.errors",
    "EdgeGenerator": "samray.masks.edges",
    "MaskGenerator": "samray.masks.generator",
    "PromptedGenerator": "samray.masks.prompted",
    "Prompt": "samray.prompts",
    "ExportReport": "samray.exports.export",
    "ImportReport": "samray.pipeline.report",
    "LabelReport": "samray.pipeline.report",
    "export": "samray.exports.export",
    "import_": "samray.imports.import_",
    "quality": "samray.audit.run",
    "QualityReport": "samray.audit.run",
    "detect_edges": "samray.pipeline.edges",
    "label": "samray.pipeline.run",
    "label_from": "samray.pipeline.label_from",
    "embed": "samray.pipeline.embed",
    "name": "samray.pipeline.naming",
    "label_dataset": "samray.pipeline.dataset_stage",
    "load_model": "samray.sam.checkpoints",
}
"""Public name -> the module it lives in."""

__all__ = [  # noqa: RUF022  (in the order one meets them; a test holds it equal to _HOMES)
    "label",
    "label_dataset",
    "LabelReport",
    "label_from",
    "embed",
    "name",
    "detect_edges",
    "export",
    "ExportReport",
    "import_",
    "ImportReport",
    "quality",
    "QualityReport",
    "MaskDataset",
    "read_image",
    "read_embedding",
    "Embedding",
    "load_model",
    "MaskGenerator",
    "PromptedGenerator",
    "Prompt",
    "EdgeGenerator",
    "Config",
    "MaskConfig",
    "ModelConfig",
    "OutputConfig",
    "ClusterConfig",
    "EdgesConfig",
    "EdgeConfig",
    "EmbedConfig",
    "load_config",
    "SamrayError",
    "ConfigError",
    "StorageError",
    "ImageError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'samray' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
