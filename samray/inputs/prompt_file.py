"""Prompt files (`input.prompts`): match each list of prompts with an image of the input.

JSON lines or Parquet, one row per image, with the columns `uri` or `file_name`, and `prompts`, a list of what
`samray.prompts.Prompt` accepts; other columns are ignored. Relative URIs start at the file's folder, as in a manifest.
If a row has both, `uri` is used and `file_name` is ignored, because a URI names one image, and a name may match
several.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from samray import storage
from samray.errors import ConfigError, NotFoundError
from samray.inputs.rows import indices_of, redact_all
from samray.prompts import Prompt
from samray.storage.strict_json import parse_json
from samray.storage.tables import read_parquet
from samray.text import plain

if TYPE_CHECKING:
    from samray.output.plan import Plan

_COLUMNS: Final = ("uri", "file_name", "prompts")
_MAX_EXAMPLES: Final = 3


@dataclass(frozen=True, slots=True)
class _Row:
    """The prompts of one image."""

    column: str
    """uri or file_name: the column to find the image by."""
    name: str
    """The value as written."""
    prompts: list[Prompt]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchedPrompts:
    """The prompts of a file whose images are in a plan."""

    by_index: dict[int, list[Prompt]]
    """Image index in the plan -> its prompts."""
    num_unknown: int
    """Number of images in the file that the plan does not have."""
    unknown: list[str] = field(default_factory=list)
    """A few of those, as written, without credentials."""

    @property
    def num_prompts(self) -> int:
        """Number of prompts for images in the plan."""
        return sum(map(len, self.by_index.values()))

    def by_shard(self, plan: Plan, shards: Collection[int]) -> dict[int, dict[int, list[Prompt]]]:
        """For each of the shards: index in the shard -> the image's prompts."""
        prompts_by_shard: dict[int, dict[int, list[Prompt]]] = {shard: {} for shard in shards}
        starts = plan.starts()
        for index, prompts in self.by_index.items():
            shard = bisect_right(starts, index) - 1
            if shard in prompts_by_shard:
                prompts_by_shard[shard][index - starts[shard]] = prompts
        return prompts_by_shard


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFile:
    """A prompt file, read and checked without knowing the images."""

    uri: str
    sha256: str
    rows: list[_Row]

    @classmethod
    def read(cls, uri: str) -> PromptFile:
        """Raises: ConfigError that names the image and prompt, StorageError."""
        uri = storage.normalize(uri)
        try:
            data = storage.read_bytes(uri)
        except NotFoundError as error:
            raise ConfigError(f"{_name(uri)} does not exist") from error
        rows: list[_Row] = []
        for where, values in _values(uri, data):
            rows.append(_parse(f"{_name(uri)}, {where}", values))
        if not any(row.prompts for row in rows):
            raise ConfigError(f"{_name(uri)} has no prompts")
        # The hash is of the bytes that were parsed, not of a second read, which could give another file.
        return cls(uri=uri, sha256=hashlib.sha256(data).hexdigest(), rows=rows)

    @property
    def prompts(self) -> Iterator[Prompt]:
        """The prompts of all images, in the order of the file."""
        return (prompt for row in self.rows for prompt in row.prompts)

    def spelled(self, phrases: Iterable[str]) -> PromptFile:
        """The same with each text as it is in phrases: "Cat" and "cat" are one name."""
        known = {plain(phrase): phrase for phrase in phrases}

        def spelled(prompt: Prompt) -> Prompt:
            return prompt if prompt.text is None else replace(prompt, text=known[plain(prompt.text)])

        return replace(self, rows=[replace(row, prompts=list(map(spelled, row.prompts))) for row in self.rows])

    @property
    def identity(self) -> dict[str, Any]:
        """Part of a run's identity: the file's content, because its path may change."""
        return {"prompts": {"sha256": self.sha256}}

    def match(self, images: pa.Table) -> MatchedPrompts:
        """Match with images. images: columns uri and file_name, of all images of a plan or listing, in order.

        Raises: ConfigError if a name matches several images, if two rows are for the same image, or if no image is
        found.
        """
        folder = storage.parent(self.uri)
        # Redacted on both sides: the plan may store its URIs without credentials.
        wanted = {
            "uri": [
                storage.redact(storage.resolve(folder, row.name)) if row.column == "uri" else None for row in self.rows
            ],
            "file_name": [row.name if row.column == "file_name" else None for row in self.rows],
        }
        matches = indices_of(wanted["uri"], redact_all(images["uri"])) | indices_of(
            wanted["file_name"], images["file_name"]
        )
        by_index: dict[int, list[Prompt]] = {}
        unknown = []
        for number, row in enumerate(self.rows):
            name = storage.redact(row.name)
            indices = matches.get(number, [])
            # Ambiguous: a wrong guess would put the prompts on another image.
            if len(indices) > 1:
                raise ConfigError(
                    f"{_name(self.uri)}: the {row.column} {name!r} matches {len(indices)} images of INPUT; "
                    "use the uri of the intended one"
                )
            if not indices:
                unknown.append(name)
            elif indices[0] in by_index:
                raise ConfigError(f"{_name(self.uri)}: two rows are for the image {name!r}; merge them into one")
            else:
                by_index[indices[0]] = row.prompts
        if not by_index:
            first_prompted, first_planned = (
                storage.redact(name) for name in (self.rows[0].name, images["file_name"][0].as_py())
            )
            raise ConfigError(
                f"{_name(self.uri)}: none of its {len(self.rows)} images is in INPUT; its first is {first_prompted!r}, "
                f"INPUT's first has the file_name {first_planned!r}"
            )
        return MatchedPrompts(by_index=by_index, num_unknown=len(unknown), unknown=unknown[:_MAX_EXAMPLES])


def _name(uri: str) -> str:
    return f"input.prompts {storage.redact(uri)}"


def _values(uri: str, data: bytes) -> Iterator[tuple[str, Any]]:
    """Each row as plain values, and its position. Raises: ConfigError."""
    kind = uri.lower().rpartition(".")[2]
    try:
        if kind == "jsonl":
            for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
                if line.strip():
                    yield f"line {number}", parse_json(line)
        elif kind == "parquet":
            table = read_parquet(data)
            # Only the known columns become Python objects.
            table = table.select([name for name in _COLUMNS if name in table.schema.names])
            yield from ((f"row {number}", values) for number, values in enumerate(table.to_pylist()))
        else:
            raise ConfigError(f"{_name(uri)} is neither .jsonl nor .parquet")
    except (pa.ArrowException, ValueError) as error:
        raise ConfigError(f"{_name(uri)} cannot be read as {kind}: {error}") from error


def _parse(where: str, values: Any) -> _Row:
    """Raises: ConfigError."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected an object with uri or file_name, and prompts")
    column = next((name for name in ("uri", "file_name") if values.get(name)), None)
    if column is None:
        raise ConfigError(f"{where}: expected uri or file_name, got neither")
    name, user_prompts = values[column], values.get("prompts")
    if not isinstance(name, str) or not isinstance(user_prompts, list):
        raise ConfigError(f"{where}: {column} must be a string, and prompts a list")
    prompts = []
    for index, value in enumerate(user_prompts):
        try:
            prompts.append(Prompt.parse(value))
        except ConfigError as error:
            raise ConfigError(f"{where}: image {storage.redact(name)!r}, prompts[{index}]: {error}") from None
    return _Row(column, name, prompts)
