"""The identity of the run in OUTPUT: settings and inputs as plain JSON, compared on resume."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Final

from samray import __version__, storage
from samray.errors import ConfigError
from samray.storage.redaction import redact_json
from samray.text import abridged

_MOST_SHOWN: Final = 300
"""Characters of two values in a message."""


def versions(packages: Iterable[str]) -> dict[str, Any]:
    """The start time of a run, and the versions of samray, Python and the installed packages."""
    return {
        "samray_version": __version__,
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in packages}},
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def refuse_differences(
    output: str, recorded: Mapping[str, Any], wanted: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Raise ConfigError that lists each setting that differs.

    defaults: the identity of default settings. A setting that only one side has counts as its default on the other,
    which lets an OUTPUT from before that setting resume. Stored URIs are redacted again, because an older version may
    have redacted less.
    """
    # Flat keys as on the command line, for example masks.points_per_side.
    stored, requested, default = _flat(redact_json(recorded)), _flat(wanted), _flat(redact_json(defaults))
    missing = "not set"
    stored, requested = default | stored, default | requested
    differences = [
        f"  {key}: {_in_words(stored.get(key, missing), requested.get(key, missing))}"
        for key in sorted(stored.keys() | requested.keys())
        if stored.get(key, missing) != requested.get(key, missing)
    ]
    if differences:
        advice = "use those settings to finish it, or choose another OUTPUT for these"
        if "model.checkpoint_sha256" in {key for key in stored if stored[key] != requested.get(key)}:
            advice += (
                ". Weights are compared by content: set model.checkpoint to the run's weights. The embedded model"
                " changes with samray's version: its file is samray/weights/tiny.safetensors of the older version"
            )
        raise ConfigError(
            f"{storage.redact(output)} belongs to a run with other settings:\n" + "\n".join(differences) + f"\n{advice}"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            # As people write it; lone surrogates cannot be printed.
            text = json.dumps(value, ensure_ascii=False)
            flat[prefix + key] = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return flat


def _in_words(stored: str, requested: str) -> str:
    """Two values as in `_flat`; of long lists, such as a thousand phrases, only what differs."""
    if len(stored) + len(requested) <= _MOST_SHOWN or not (stored.startswith("[") and requested.startswith("[")):
        return f"{stored} there, {requested} now"
    before, after = (
        [json.dumps(item, ensure_ascii=False) for item in json.loads(text)] for text in (stored, requested)
    )
    parts = [f"{len(before):,} there, {len(after):,} now"]
    for what, items, others in (("only there", before, set(after)), ("only now", after, set(before))):
        if different := [item for item in items if item not in others]:
            parts.append(f"{what}: {abridged(different, 5)}")
    return "; ".join(parts if len(parts) > 1 else [*parts, "the same in another order"])
