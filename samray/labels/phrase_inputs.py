"""What each way with phrases needs: the phrases, and the network that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samray.config.labels import WAYS
from samray.labels.networks import Network, find_network
from samray.labels.phrases import read_phrases
from samray.text import count, first_few

if TYPE_CHECKING:
    from samray.config import Config


@dataclass(frozen=True, slots=True)
class PhraseInputs:
    """Phrases, and the network that compares images with them."""

    categories: list[str]
    network: Network

    @property
    def identity(self) -> dict[str, Any]:
        return {"network_sha256": self.network.sha256}

    @property
    def phrases_in_words(self) -> str:
        return f"{count(len(self.categories), 'phrase')}: {first_few(self.categories, 5)}"

    def network_row(self) -> tuple[str, str]:
        """The network's row of the plan."""
        return ("network", f"{self.network.checkpoint} (SHA-256 {self.network.sha256[:12]}...)")


def read_phrases_and_network(config: Config, *kinds: str) -> tuple[list[str], Network]:
    """kinds: values of `model_type` that fit `labels.by`. Raises: ConfigError that names the setting, StorageError."""
    labels = config.labels
    assert labels.by is not None
    assert labels.phrases is not None
    phrases = read_phrases(labels.phrases)
    checkpoint = labels.checkpoint or WAYS[labels.by].network
    assert checkpoint is not None
    return phrases, find_network(checkpoint, kinds, labels.by)
