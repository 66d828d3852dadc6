"""Objectives of training: each is one file and one row of `OBJECTIVES`.

This module imports no torch, because settings and help read the names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    import torch

    from samray.sam.sam import Sam
    from samray.sam.spec import ModelSpec
    from samray.scenes.scene import Scene
    from samray.train.interaction import StepLoss
    from samray.train.mixture import Mixture
    from samray.train.settings import TrainSettings

OBJECTIVES: dict[str, str] = {
    "masks": "samray.train.masks:Masks",
    "mae": "samray.train.mae:Mae",
    "text": "samray.train.text_prompts:TextPrompts",
}
"""Name of an objective -> `module:class` of its `Objective`."""


class Panel(NamedTuple):
    """A plot of curves.png."""

    title: str
    kind: str
    """Kind of line of metrics.jsonl: train or validation."""
    names: tuple[str, ...]
    is_log: bool = False


class Evaluation(NamedTuple):
    """Figures of validation."""

    figures: dict[str, Any] | None
    """For metrics.jsonl; None if nothing is held out."""
    pictures: Mapping[str, bytes] = MappingProxyType({})
    """File name in OUTPUT -> PNG; replaced by each validation."""


class Objective:
    """One objective, with the settings of a run."""

    panels: ClassVar[tuple[Panel, ...]]
    headline: ClassVar[tuple[tuple[str, str], ...]]
    """Figures of a validation to show first, and what each is."""
    columns: ClassVar[tuple[tuple[str, str], ...]]
    """Figures of a validation in the report's table, and their headings."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings

    def adjusted(self) -> TrainSettings:
        """The settings with this objective's own defaults for what the user did not set."""
        return self.settings

    def check(self, spec: ModelSpec) -> None:
        """Raises: ConfigError if settings or model do not fit the objective."""

    def location(self, uri: str) -> str:
        """DATA as the run's identity and messages name it."""
        return uri

    def open_data(self, data: Sequence[str]) -> Mixture:
        """All DATA, mixed. Raises: ConfigError, StorageError."""
        raise NotImplementedError

    def identity(self) -> dict[str, dict[str, Any]]:
        """Other inputs that determine the result, by section: files by content. Raises: ConfigError, StorageError."""
        return {}

    def extend(self, sam: Sam, identity: Mapping[str, Any]) -> None:
        """Add to a new model what is trained with it, and initialise what the objective initialises differently.

        identity: of the run; a file that is in it must have the same content here. Raises: ConfigError.
        """

    def set_trainable(self, sam: Sam) -> None:
        """Let only those weights learn that should. Raises: ConfigError if the model lacks the parts asked for."""
        raise NotImplementedError

    def make_loss(self, sam: Sam, dtype: torch.dtype, teacher: Sam | None) -> StepLoss:
        """The loss of a step. dtype: for autocast."""
        raise NotImplementedError

    def evaluate(self, sam: Sam, scenes: Iterable[Scene]) -> Evaluation:
        """Validate the running average on held-out images."""
        raise NotImplementedError

    def is_written(self, name: str) -> bool:
        """Whether a tensor belongs into weights.safetensors."""
        return True

    def in_words(self, figures: dict[str, Any]) -> str:
        """A validation in a line."""
        raise NotImplementedError

    def next_command(self, model: str, weights: str) -> str:
        """The command that uses the weights. weights: their URI, redacted."""
        raise NotImplementedError


def objective_names() -> list[str]:
    """The names of all objectives."""
    return list(OBJECTIVES)


def objective_class(name: str) -> Callable[[TrainSettings], Objective]:
    """The class of an objective, imported now."""
    module, _, attribute = OBJECTIVES[name].partition(":")
    made: Callable[[Any], Objective] = getattr(importlib.import_module(module), attribute)
    return made


def objective_of(settings: TrainSettings) -> Objective:
    """The objective of a run."""
    return objective_class(settings.train.objective)(settings)
