"""The ways to find masks with names (`labels.by`), from the rows of `samray.config.labels.WAYS`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from samray.config.labels import WAYS, ways_with_image_phrases
from samray.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from samray.config import Config
    from samray.sam.sam import Sam

EXAMPLE = "a list, as in 'labels.phrases=[cat,fire hydrant]', or a text file with one per line"

MakeGenerator = Callable[[int | None], Any]
"""Called with points_per_batch, as for `samray.pipeline.labeler.ShardLabeler`; returns a mask generator."""


class Inputs(Protocol):
    """Inputs of a way besides the settings. Read in the driver and sent to every actor: small and picklable."""

    @property
    def categories(self) -> list[str] | None:
        """The names asked for, in order; None if masks get no names."""

    @property
    def identity(self) -> dict[str, Any]:
        """The part that determines the output, as plain JSON values: files by content."""

    def plan_rows(self, config: Config) -> list[tuple[str, str]]:
        """Lines of the plan: `masks` (which ones will be found), and what else is used."""


def read_inputs(config: Config, texts: Sequence[str] | None = None) -> Inputs | None:
    """The inputs of the way that config names; None if it names none.

    texts: phrases of single images, in the order of the categories; may be empty if they are not known yet.
    Raises: ConfigError that says what is wrong with a file or a setting, StorageError.
    """
    by = config.labels.by
    if texts is not None and (by is None or not WAYS[by].takes_image_phrases):
        raise ConfigError(
            "phrases of single images, as text in input.prompts or in a phrases_column, need "
            f"{ways_with_image_phrases()}; got {'neither' if by is None else f'labels.by={by}'}"
        )
    if by is None:
        return None
    if texts is None and "phrases" in WAYS[by].needs and config.labels.phrases is None:
        raise ConfigError(f"labels.by={by} needs labels.phrases, {EXAMPLE}")
    read = function_named(WAYS[by].inputs)
    inputs: Inputs = read(config) if texts is None else read(config, texts)
    return inputs


def labels_identity(config: Config, inputs: Inputs | None, begun: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The part of a run's identity that is about `labels`; empty for a run without. It has `categories` if masks get
    names, and `presence` if rows get that column.

    begun: the identity of the run to resume: one from before that column is finished without it.
    """
    if inputs is None:
        return {}
    names = {} if inputs.categories is None else {"categories": inputs.categories}
    assert config.labels.by is not None
    is_stored = begun is None or "presence" in begun.get("labels", {})
    presence = {"presence": True} if WAYS[config.labels.by].presence and is_stored else {}
    return {"labels": {**config.labels.identity(), **inputs.identity, **names, **presence}}


def generator_maker(model: Sam | torch.device, config: Config, inputs: Inputs) -> MakeGenerator:
    """Factory of an actor's generators; the work that they share is done here, once.

    model: the device, if `labels.by` needs no SAM.
    """
    assert config.labels.by is not None
    maker: MakeGenerator = function_named(WAYS[config.labels.by].builder)(model, config, inputs)
    return maker


def function_named(name: str) -> Callable[..., Any]:
    """The function `module:function`."""
    module, _, attribute = name.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function
