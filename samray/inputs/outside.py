"""Limits on the URIs in a list: a list may be untrusted, and decides which files samray opens.

Without `input.allow_outside` a list may name

- local files only in its own folder, or in the folder of all lists of an INPUT,
- object stores and web servers, with the user's own credentials, but a remote list never servers of this machine or of
  a private network, and
- no fsspec filesystem that wraps another one (`zip://`, `generic://`, `simplecache://`, ...).

Link-local addresses, where clouds serve a machine's credentials, are always refused (`samray.storage.addresses`).
Symbolic links are followed: they belong to the owner of the folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.storage.addresses import is_internal, is_link_local

_SERVER: Final = r"^(?P<server>[a-z][a-z0-9+.\-]*://[^/?#]*)"
_OWN_NETWORKS: Final = frozenset(
    {"http", "https", "ftp", "ftps", "sftp", "ssh", "smb", "webdav", "webdavs", "webhdfs", "webHDFS", "hdfs"}
)
_REMOTE: Final = frozenset(
    {
        *("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "ocilake", "oss", "tos", "tosfs", "hf"),
        *("gdrive", "dropbox", "box", "lakefs", "github", "memory", "pyscript", "dbfs", "msgraph", "sharepoint"),
        *("onedrive", "dvc", "wandb", "asynchdfs", "root", *_OWN_NETWORKS),
    }
)
_ROWS_AT_ONCE: Final = 2**20
_NEVER: Final = (
    "not_allowed: {server} is a link-local address, where clouds serve credentials; samray never connects to it"
)
_SETTING: Final = "if you trust the list, add input.allow_outside=true (and --redo-changed for an existing OUTPUT)"


def problems_of(locations: pa.ChunkedArray, folder: str, *, allow_outside: bool) -> pa.ChunkedArray | None:
    """Why samray must not open each location, as `not_allowed: message`; null if it may, None if it may open all.

    locations: normalized URIs, of containers for images in archives. folder: where local files must be.
    """
    # In parts, because the patterns below make intermediate columns of the size of their input.
    parts = [locations.slice(start, _ROWS_AT_ONCE) for start in range(0, len(locations), _ROWS_AT_ONCE)]
    problem_of = cache(partial(server_problem, folder=folder, allow_outside=allow_outside))  # looks names up
    problems_by_part = [_problems_of_part(part, folder, allow_outside, problem_of) for part in parts]
    if all(problems is None for problems in problems_by_part):
        return None
    nulls = (pa.chunked_array([pa.nulls(len(part), pa.string())]) for part in parts)
    chunks = (
        problems if problems is not None else null for problems, null in zip(problems_by_part, nulls, strict=True)
    )
    return pa.chunked_array([chunk for column in chunks for chunk in column.chunks], pa.string())


def _problems_of_part(
    locations: pa.ChunkedArray, folder: str, allow_outside: bool, problem_of: Callable[[str], str | None]
) -> pa.ChunkedArray | None:
    # If the common start of all locations is inside the folder, no location needs to be looked at by itself.
    shared = _shared_start(locations)
    if storage.is_local(folder) and any(shared.startswith(storage.join(root, "")) for root in _spellings(folder)):
        return None
    if match := re.match(rf"{_SERVER}/", shared):  # the usual case; a pattern per row is slow
        servers: Any = pa.chunked_array([pa.repeat(match["server"], len(locations))])
    else:
        servers = pc.struct_field(pc.extract_regex(locations, _SERVER), "server")
    named = [server for server in pc.unique(servers).to_pylist() if server]
    refused = [server for server in named if problem_of(server)]
    problems = None
    if refused:
        texts = pa.array([problem_of(server) for server in refused], pa.string())
        problems = pc.take(texts, pc.index_in(servers, value_set=pa.array(refused, pa.string())))
    if allow_outside:
        return problems
    # Without a server a location is a local path; the empty text is a row without URI, which is reported elsewhere.
    outside = pc.and_(pc.is_null(servers), pc.not_equal(locations, ""))
    for root in _spellings(folder) if storage.is_local(folder) else ():
        outside = pc.and_not(outside, pc.starts_with(locations, storage.join(root, "")))
    # Only now the links, as each needs a look at the disk.
    if storage.is_local(folder) and pc.any(outside, min_count=0).as_py():
        outside = pc.and_not(outside, _leads_inside(locations, outside, folder))
    if not pc.any(outside, min_count=0).as_py():
        return problems
    message = f"not_allowed: {_where(folder)}; {_SETTING}"
    return pc.if_else(outside, message, pa.scalar(None, pa.string()) if problems is None else problems)


def _leads_inside(locations: pa.ChunkedArray, outside: Any, folder: str) -> Any:
    """Whether a location is below `folder` after following symbolic links.

    A shell may show /home/me where the system shows /gpfs/home/me, and lists contain either.
    """
    # Folders instead of files: few per list, and each is resolved once.
    folders = pc.replace_substring_regex(locations, r"(?s)/[^/]*$", "/")
    root = storage.join(os.path.realpath(folder), "")
    named = pc.unique(folders.filter(outside)).to_pylist()
    inside = [name for name in named if "\0" not in name and storage.join(os.path.realpath(name), "").startswith(root)]
    return pc.is_in(folders, value_set=pa.array(inside, pa.string()))


def _shared_start(locations: pa.ChunkedArray) -> str:
    """The common start of all locations: that of the first and the last in alphabetical order."""
    ends = pc.min_max(locations)
    return os.path.commonprefix([ends["min"].as_py() or "", ends["max"].as_py() or ""])  # noqa: RUF071


def location_problem(location: str, folder: str, *, allow_outside: bool) -> str | None:
    """`problems_of` for one location."""
    problems = problems_of(pa.chunked_array([[location]], pa.string()), folder, allow_outside=allow_outside)
    return None if problems is None else str(problems[0].as_py())


def server_problem(server: str, folder: str, *, allow_outside: bool) -> str | None:
    """`problems_of` for everything on a server, `scheme://host`."""
    scheme, host = server.split("://", 1)
    # Also with allow_outside: no list needs what clouds serve there.
    if scheme in _OWN_NETWORKS and is_link_local(host):
        return _NEVER.format(server=storage.redact(server))
    if allow_outside:
        return None
    # A scheme that fsspec does not know opens nothing, and fails when it is read.
    if scheme not in _REMOTE and scheme in _known_schemes():
        return f"not_allowed: a list may not name {scheme}:// places, which open other files; {_SETTING}"
    # A remote list may name its own server, also on a private network.
    same = re.match(_SERVER, folder)
    is_remote = not storage.is_local(folder)
    if scheme in _OWN_NETWORKS and is_remote and not (same and same["server"] == server) and is_internal(host):
        server = storage.redact(server)
        return f"not_allowed: {server} is on this machine or a private network, but the list is not; {_SETTING}"
    return None


def _where(folder: str) -> str:
    if storage.is_local(folder):
        return f"a list may name local files only below {folder}"
    return "a remote list may not name local files"


def _spellings(folder: str) -> set[str]:
    return {folder, os.path.realpath(folder)}


@cache
def _known_schemes() -> frozenset[str]:
    from fsspec.registry import known_implementations

    return frozenset(known_implementations)
