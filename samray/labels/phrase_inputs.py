"""Inputs of each way with phrases: the phrases, and the network that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from samray.config.labels import WAYS
from samray.errors import ConfigError
from samray.labels.networks import Network, find_network
from samray.labels.phrases import MOST_PHRASES, read_phrases
from samray.prompts import phrase_problem
from samray.text import abridged, count, plain

if TYPE_CHECKING:
    from samray.config import Config


@dataclass(frozen=True, slots=True)
class PhraseInputs:
    """Phrases, and the network that compares images with them."""

    categories: list[str]
    network: Network
    num_common: int | None = None
    """How many of the categories, from the first, are asked of every image; None: all. The others are phrases of single
    images."""

    @property
    def common(self) -> list[str]:
        """The phrases asked of every image."""
        return self.categories[: self.num_common]

    @property
    def identity(self) -> dict[str, Any]:
        asked = {} if self.num_common is None else {"asked_of_all": self.num_common}
        return {"network_sha256": self.network.sha256, **asked}

    def with_texts(self, texts: Sequence[str] | None) -> Self:
        """The same with phrases of single images; the same if texts is None: images have none.

        Raises: ConfigError if that makes too many categories.
        """
        if texts is None:
            return self
        known = set(map(plain, self.categories))
        categories = [*self.categories, *(text for text in texts if plain(text) not in known)]
        if len(categories) > MOST_PHRASES:
            raise ConfigError(
                f"labels.phrases and the texts of all prompts are {len(categories):,} phrases, expected at most "
                f"{MOST_PHRASES:,}"
            )
        return replace(self, categories=categories, num_common=len(self.categories))

    @property
    def phrases_in_words(self) -> str:
        common = self.common
        every = f"{count(len(common), 'phrase')}: {abridged(common, 5)}" if common else ""
        if (num_of_images := len(self.categories) - len(common)) == 0:
            return every
        of_images = f"{count(num_of_images, 'phrase')} of single images: {abridged(self.categories[len(common) :], 5)}"
        return f"{every}; {of_images}" if every else of_images

    def network_row(self) -> tuple[str, str]:
        """The network's row of the plan."""
        return ("network", f"{self.network.checkpoint} (SHA-256 {self.network.sha256[:12]}...)")


def read_phrases_and_network(config: Config, *kinds: str) -> tuple[list[str], Network]:
    """The phrases asked of every image, none if `labels.phrases` is null, and the network.

    kinds: values of `model_type` that fit `labels.by`. Raises: ConfigError that names the setting, StorageError.
    """
    labels = config.labels
    assert labels.by is not None
    phrases = [] if labels.phrases is None else read_phrases(labels.phrases)
    for number, phrase in enumerate(labels.negatives, start=1):
        if problem := phrase_problem(phrase):
            raise ConfigError(f"labels.negatives: item {number} {problem}")
    checkpoint = labels.checkpoint or WAYS[labels.by].network
    assert checkpoint is not None
    return phrases, find_network(checkpoint, kinds, labels.by)
