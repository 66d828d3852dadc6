"""LVIS's frequency of each class, from a file with its categories."""

from __future__ import annotations

import json

from samray import storage
from samray.errors import ConfigError


def read_frequencies(uri: str) -> dict[str, str]:
    """Class name -> "f", "c" or "r", from an LVIS annotation file, or any JSON with such a list `categories`.

    A name counts with underscores and with spaces, because tools differ. Raises: ConfigError, StorageError.
    """
    where = storage.redact(uri)
    expected = f'{where}: expected JSON with LVIS\'s "categories", each with "name" and "frequency" (f, c or r)'
    try:
        content = json.loads(storage.read_bytes(storage.normalize(uri)))
        frequency_of = {str(category["name"]): str(category["frequency"]) for category in content["categories"]}
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ConfigError(f"{expected}; {error}" if isinstance(error, ValueError) else expected) from None
    if not frequency_of or not set(frequency_of.values()) <= set("fcr"):
        raise ConfigError(expected)
    return frequency_of | {name.replace("_", " "): frequency for name, frequency in frequency_of.items()}
