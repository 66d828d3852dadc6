"""Files that a listing left out: how many, of which kind, and why. Nothing in INPUT is skipped silently."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray.storage.redaction import redact_json
from samray.text import abridged

NOT_AN_IMAGE: Final = "not images by their ending"
HIDDEN: Final = "hidden"
REPEATED: Final = "listed more than once"
REPLACED: Final = "replaced by a later tar member of the same name"
SPECIAL: Final = "not regular files"
UNUSABLE: Final = "unusable"
"""Archives and lists that cannot be read, next to others that can; each with its own message."""

_MAX_KINDS: Final = 50
_OTHERS: Final = "others"
_NO_ENDING: Final = "without ending"
_MAX_TEXT: Final = 1000
_ENDING: Final = r"(?P<ending>\.[0-9A-Za-z_-]{1,12})$"


class Skipped:
    """Counts by reason and kind. A kind is a file extension or, for `UNUSABLE`, a message.

    A reason has at most `_MAX_KINDS` kinds, which protects the memory from hostile names; the rest count as `others`.
    """

    def __init__(self, counts: Mapping[str, Mapping[str, int]] | None = None) -> None:
        self.counts: dict[str, dict[str, int]] = {reason: dict(kinds) for reason, kinds in (counts or {}).items()}

    def add(self, reason: str, kind: str, number: int = 1) -> None:
        """Count files of one kind."""
        if number:
            kinds = self.counts.setdefault(reason, {})
            # Messages and endings come from files, so their length is bounded, too.
            kind = kind[:_MAX_TEXT]
            if kind not in kinds and len(kinds) >= _MAX_KINDS:
                kind = _OTHERS
            kinds[kind] = kinds.get(kind, 0) + number

    def add_name(self, reason: str, name: str) -> None:
        """Count a file by the extension of its name."""
        match = re.search(_ENDING, name)
        self.add(reason, match["ending"].lower() if match else _NO_ENDING)

    def add_names(self, reason: str, names: Any) -> None:
        """Count files by the extensions of their names, an Arrow array of strings."""
        endings = pc.struct_field(pc.extract_regex(names, _ENDING), "ending")
        counts = pc.value_counts(pc.fill_null(pc.utf8_lower(endings), _NO_ENDING))
        # The most frequent first: they are kept if there are too many kinds.
        for entry in sorted(counts.to_pylist(), key=lambda entry: -entry["counts"]):
            self.add(reason, entry["values"], entry["counts"])

    def update(self, other: Skipped) -> None:
        """Add the counts of another listing."""
        for reason, kinds in other.counts.items():
            for kind, number in kinds.items():
                self.add(reason, kind, number)

    def redacted(self) -> dict[str, dict[str, int]]:
        """The counts as plain JSON, without the credentials that a message may contain."""
        return dict(redact_json(self.counts))

    def __bool__(self) -> bool:
        return bool(self.counts)

    def lines(self) -> list[str]:
        """Readable lines: one per reason, the most frequent kinds first; one per unusable archive or list."""
        lines = []
        for reason, kinds in self.counts.items():
            ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
            if reason == UNUSABLE:
                lines += [text if text != _OTHERS else f"and {number:,} more" for text, number in ordered]
            else:
                shown = abridged([f"{number:,} {kind}" for kind, number in ordered], 8)
                lines.append(f"{shown}: {reason}")
        return lines


def skipped_names(names: pa.ChunkedArray, keep: Any, reason: str) -> Skipped:
    """Count the names for which `keep` is false."""
    skipped = Skipped()
    if not pc.all(keep, min_count=0).as_py():
        skipped.add_names(reason, names.filter(pc.invert(keep)))
    return skipped
