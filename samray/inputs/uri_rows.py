"""Turn the URIs of lists into rows: resolve, parse samray's own URIs, check, merge and name them.

samray's own URIs are those it writes into the column `uri`: `tar://member::archive.tar` and `file.parquet#row=5`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.errors import FileError, NotFoundError
from samray.inputs.decode import image_extensions
from samray.inputs.outside import location_problem, problems_of
from samray.inputs.rows import input_rows, map_some, may_hold_credentials, redact_all, take
from samray.inputs.skipped import REPEATED, Skipped
from samray.inputs.tar import TarMember, index_tar

_ROWS_AT_ONCE: Final = 2**20

# URIs that `storage.resolve` leaves unchanged or only appends to the folder: nearly all URIs of nearly all lists.
_PLAIN_URI: Final = r"^[a-z][a-z0-9+.\-]*://.*[^/]$"
_LOCAL_URI: Final = r"^(file|local)://"
_PLAIN_PATH: Final = r"^(/[^/]+)+$"
_PLAIN_RELATIVE: Final = r"^[^/]+(/[^/]+)*$"
_NOT_PLAIN_PATH: Final = r"(^|/)\.\.?(/|$)|^~"

_IN_TAR: Final = r"(?is)^tar://(?P<member>.+)::(?P<archive>.+\.tar)$"
_IN_PARQUET: Final = r"(?is)^(?P<file>.+\.parquet)#row=(?P<row>[0-9]{1,15})$"
_SAMRAY_URI: Final = r"(?is)^tar://.+::.+\.tar$|^.+\.parquet#row=[0-9]{1,15}$"


@dataclass(frozen=True, slots=True)
class UriRows:
    """The rows of one list."""

    rows: pa.Table
    """`INPUT_SCHEMA`; file_name is set later."""
    locations: pa.ChunkedArray
    """The source of names: the URI or, for an image in an archive, the archive without its extension and the
    image."""
    relative: bool
    """Whether every URI was written relative to the list."""


def is_samray_uri(uri: str) -> bool:
    """Whether the URI is samray's form for an image in a tar or a row of a Parquet file."""
    return re.match(_SAMRAY_URI, uri) is not None


def rows_of_uris(written: pa.ChunkedArray, folder: str, root: str, *, allow_outside: bool = False) -> UriRows:
    """Rows for the URIs of a list in `folder`; relative ones start there. root: folder that local files must be in.

    Raises: StorageError.
    """
    written = pc.fill_null(written, "")
    relative = pc.all(_is_relative(written), min_count=0).as_py()
    marks = (pc.match_substring(written, "::"), pc.match_substring(written, "#row="))  # faster than a pattern
    is_samray = pc.match_substring_regex(written, _SAMRAY_URI) if any(pc.any(mark).as_py() for mark in marks) else None
    if is_samray is None or not pc.any(is_samray, min_count=0).as_py():
        uris = _resolved(written, folder)
        problem = problems_of(uris, root, allow_outside=allow_outside)
        return UriRows(input_rows(uris, None, problem=problem), uris, relative)
    # Only lists with samray's own URIs go through Python row by row.
    reader = _SamrayUris(folder, root, allow_outside)
    rows = [
        reader.row(uri) if of_samray else {}
        for uri, of_samray in zip(written.to_pylist(), is_samray.to_pylist(), strict=True)
    ]
    # Empty text in place of samray's URIs keeps the rows aligned.
    others = _resolved(pc.if_else(is_samray, "", written), folder)
    column = {name: pa.chunked_array([[row.get(name) for row in rows]], kind) for name, kind in _COLUMNS.items()}
    problem, of_others = column.pop("problem"), problems_of(others, root, allow_outside=allow_outside)
    problem = problem if of_others is None else pc.coalesce(problem, of_others)
    locations = pc.coalesce(column.pop("location"), others)
    uris = pc.coalesce(column.pop("uri"), others)
    return UriRows(input_rows(uris, None, problem=problem, **column), locations, relative and not any(rows))


_COLUMNS: Final = {
    **dict.fromkeys(("uri", "location", "container", "extents", "problem"), pa.string()),
    **dict.fromkeys(("offset", "size", "row"), pa.int64()),
}


class _SamrayUris:
    """Finds the images that samray's own URIs name; reads the index of each tar once."""

    def __init__(self, folder: str, root: str, allow_outside: bool) -> None:
        self._folder, self._root, self._allow_outside = folder, root, allow_outside
        self._tars: dict[str, dict[str, TarMember] | str] = {}

    def row(self, uri: str) -> dict[str, Any]:
        """Columns of `INPUT_SCHEMA`, and `location`."""
        if match := re.match(_IN_PARQUET, uri):
            file = storage.resolve(self._folder, match["file"])
            row = int(match["row"])
            location = f"{file.rpartition('.')[0]}/row-{row}"
            columns: dict[str, Any] = {"uri": f"{file}#row={row}", "location": location, "container": file, "row": row}
            return columns | {"problem": self._problem(file)}
        match = re.match(_IN_TAR, uri)
        assert match is not None, uri
        name, archive = match["member"], storage.resolve(self._folder, match["archive"])
        location = f"{archive.rpartition('.')[0]}/{name}"
        columns = {
            "uri": f"tar://{name}::{archive}",
            "location": location,
            "container": archive,
            "offset": 0,
            "size": 0,
        }
        # Before the archive is opened: a list must not make samray read what it may not name.
        if problem := self._problem(archive):
            return columns | {"problem": problem}
        members = self._members(archive)
        if isinstance(members, str):
            return columns | {"problem": members}
        member = members.get(name)
        if member is None:
            return columns | {"problem": f"missing: {storage.redact(archive)} has no member {name[:200]!r}"}
        return columns | {
            "offset": member.offset, "size": member.size, "extents": member.extents, "problem": member.problem
        }  # fmt: skip

    def _problem(self, container: str) -> str | None:
        return location_problem(container, self._root, allow_outside=self._allow_outside)

    def _members(self, archive: str) -> dict[str, TarMember] | str:
        """The tar's members by name; or why it cannot be read, as `reason: message`."""
        if archive not in self._tars:
            try:
                index = index_tar(archive, ("",))
            except FileError as error:
                self._tars[archive] = f"{'missing' if isinstance(error, NotFoundError) else 'unreadable'}: {error}"
            else:
                members = {member.name: member for member in index.members}
                self._tars[archive] = members or f"unreadable: {index.damage or 'the tar has no files'}"
        return self._tars[archive]


# --- merging and naming --------------------------------------------------------------------------------------------


def merge_lists(lists: Sequence[UriRows], root: str) -> tuple[pa.Table, Skipped]:
    """The rows of all lists as one table; of equal URIs the first is kept, and the others are counted as skipped.

    file_name is the path below `root` in lists with only relative URIs, else the part after the longest folder that all
    URIs of the other lists share.
    """
    rows = pa.concat_tables(part.rows for part in lists)
    below = pa.chunked_array([chunk for part in lists for chunk in _below(part, root).chunks], pa.string())
    if below.null_count:
        locations = pa.chunked_array([chunk for part in lists for chunk in part.locations.chunks], pa.string())
        # Names of lists with absolute URIs, from what they share; those below root are named already.
        unnamed = pc.if_else(pc.is_null(below), locations, None) if below.null_count < len(below) else locations
        unnamed = redact_all(unnamed)  # before the scheme is removed: it identifies user names and passwords
        names = pc.utf8_slice_codeunits(unnamed, start=len(_shared_folder(unnamed)))
        below = pc.coalesce(below, names) if below.null_count < len(below) else names
    rows = rows.set_column(rows.schema.get_field_index("file_name"), "file_name", _without_signatures(below))
    repeated = later_copies(rows["uri"])
    skipped = Skipped()
    if len(repeated):
        keep = np.ones(rows.num_rows, bool)
        keep[repeated] = False
        skipped.add_names(REPEATED, take(rows["file_name"], pa.array(repeated)))
        rows = rows.filter(pa.array(keep))
    return rows, skipped


def _below(part: UriRows, root: str) -> pa.ChunkedArray:
    """The paths below root; null for those outside of it, and for all if some were not written relative."""
    start = storage.join(root, "")
    if part.relative:
        is_below = pc.or_(pc.starts_with(part.locations, start), pc.equal(part.locations, ""))
        names = pc.utf8_slice_codeunits(part.locations, start=len(start))
        return names if pc.all(is_below, min_count=0).as_py() else pc.if_else(is_below, names, None)
    return pa.chunked_array([pa.nulls(len(chunk), pa.string()) for chunk in part.locations.chunks], pa.string())


def with_distinct_names(rows: pa.Table) -> pa.Table:
    """Add a number to each file_name that an earlier row already has: `a/b~2.jpg`. Their URIs differ."""
    repeated = later_copies(rows["file_name"])
    if not len(repeated):
        return rows
    names = rows["file_name"].to_pylist()
    taken, numbers = set(names), dict[str, int]()
    for index in repeated.tolist():
        name, new = names[index], names[index]
        stem, ending = posixpath.splitext(name)
        # A name with a number may be taken, too.
        while new in taken:
            numbers[name] = numbers.get(name, 1) + 1
            new = f"{stem}~{numbers[name]}{ending}"
        names[index] = new
        taken.add(new)
    column = pa.chunked_array([pa.array(names, pa.string())])
    return rows.set_column(rows.schema.get_field_index("file_name"), "file_name", column)


def later_copies(texts: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Indices of the texts that also occur earlier, in order; the empty text does not count.

    Holds 64 bits per text, because there may be 100 million, and only the texts with equal hashes.
    """
    hashes = np.empty(len(texts), np.int64)
    for start in range(0, len(texts), _ROWS_AT_ONCE):
        part = texts.slice(start, _ROWS_AT_ONCE)
        hashes[start : start + len(part)] = np.fromiter(map(hash, _each(part)), np.int64, len(part))
    # Sorted, equal hashes are neighbours: (texts,) int64, no set of all texts.
    ordered = np.sort(hashes)
    equal = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(equal):
        return np.empty(0, np.int64)
    # Only texts with equal hashes become Python strings, and are compared by value.
    candidates = np.flatnonzero(np.isin(hashes, equal))
    seen: set[str] = set()
    copies = []
    for index, text in zip(candidates.tolist(), take(texts, pa.array(candidates)).to_pylist(), strict=True):
        if text in seen:
            copies.append(index)
        elif text:
            seen.add(text)
    return np.array(copies, np.int64)


def _each(texts: pa.ChunkedArray) -> Iterable[str]:
    return (text for chunk in texts.chunks for text in chunk.to_pylist())


def _without_signatures(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Remove signatures: names go into every file made from an output, so `photo.jpg?X-Amz-Signature=...` becomes
    `photo.jpg`.

    A query without a secret stays: it may be what distinguishes two images.
    """
    return map_some(names, may_hold_credentials(names, r"\?"), _without_signature)


def _without_signature(name: str) -> str:
    redacted = storage.redact(name)
    path = name.partition("?")[0]
    return path if storage.is_redacted(redacted) and path.lower().endswith(image_extensions()) else redacted


def _resolved(written: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    """`storage.resolve` of each non-empty text."""
    parts = [written.slice(start, _ROWS_AT_ONCE) for start in range(0, len(written), _ROWS_AT_ONCE)]
    return pa.chunked_array([_resolved_chunk(chunk, folder) for part in parts for chunk in part.chunks], pa.string())


def _resolved_chunk(texts: pa.StringArray, folder: str) -> pa.StringArray:
    """Resolve in Python only unusual spellings; no copy if nothing changes."""
    matches = pc.match_substring_regex
    dotted = matches(texts, _NOT_PLAIN_PATH)
    plain_uri = pc.and_not(matches(texts, _PLAIN_URI), matches(texts, _LOCAL_URI))
    as_is = pc.or_(plain_uri, pc.and_not(matches(texts, _PLAIN_PATH), dotted))
    if pc.all(as_is).as_py():
        return texts
    prefix = storage.join(storage.normalize(folder), "")
    # Three groups: as they are, plain relative paths (Arrow appends them to the folder), and the rest (Python).
    uris = pc.if_else(as_is, texts, pc.binary_join_element_wise(prefix, texts, ""))
    others = pc.invert(pc.or_(as_is, pc.and_not(matches(texts, _PLAIN_RELATIVE), dotted)))
    resolved = [storage.resolve(folder, text) if text else "" for text in texts.filter(others).to_pylist()]
    return pc.replace_with_mask(uris, others, pa.array(resolved, pa.string()))


def _is_relative(texts: pa.ChunkedArray) -> Any:
    absolute = pc.or_(pc.starts_with(texts, "/"), pc.starts_with(texts, "~/"))
    return pc.invert(pc.or_(absolute, pc.match_substring(texts, "://")))


def _shared_folder(uris: pa.ChunkedArray) -> str:
    """The longest folder, with a trailing slash, that all non-empty URIs start with."""
    ends = pc.min_max(pc.if_else(pc.equal(uris, ""), None, uris))  # the common start of these two is common to all
    low, high = ends["min"].as_py() or "", ends["max"].as_py() or ""
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[: low.rfind("/", 0, length) + 1]
