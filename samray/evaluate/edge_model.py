"""Edge maps of a model, for `samray evaluate edges`."""

from __future__ import annotations

from typing import Any, Final

from samray import storage
from samray.config.edges import EdgesConfig
from samray.errors import ImageError
from samray.evaluate.edge_data import EdgeImage
from samray.inputs.decode_apart import decode_apart
from samray.masks.edge_png import encode_edges
from samray.masks.edges import EdgeGenerator
from samray.sam.checkpoints import load_configured
from samray.sam.weights_file import WeightsFile

_BITS: Final = 16


class ModelMaps:
    """A `MapSource` that loads the model of config once. Raises: ConfigError."""

    def __init__(self, config: EdgesConfig) -> None:
        self.config = config
        self._generator = EdgeGenerator(load_configured(config.model), config.edges)

    def __call__(self, image: EdgeImage) -> bytes:
        """PNG, 16 bits. Raises: ImageError if the image cannot be decoded or has another size than its boundaries."""
        pixels = decode_apart(image.jpeg or b"", self.config.input)
        if pixels.shape[:2] != image.hw:
            raise ImageError("unreadable", f"{image.name} has another size than its boundaries")
        (edges,) = self._generator.generate([pixels])
        return encode_edges(edges, _BITS)

    def figures(self) -> dict[str, Any]:
        """The model and the settings, for the results."""
        model = self.config.model
        return {
            "model": model.name,
            "checkpoint": None if model.checkpoint is None else storage.redact(model.checkpoint),
            "adapter": None if model.adapter is None else storage.redact(model.adapter),
            **WeightsFile(model.name, model.checkpoint, model.adapter).identity,
            "edges": self.config.edges.model_dump(mode="json"),
        }
