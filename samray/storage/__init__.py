"""Files on any fsspec filesystem: listing, reading, and atomic writes.

Only this package talks to storage, and only it retries. Names from a listing are literal: a `*`, `?`, `[`, `%` or `#`
in a name is an ordinary character. Local files are plain absolute paths, all others `scheme://...` URIs. Endpoint and
credentials come from the usual environment variables (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, ...) and from fsspec's
configuration (`FSSPEC_S3_...`); no message contains them.

`put_new` ensures that a shard is created exactly once. On local disks it hard-links a finished temporary file to its
name, which fails if the name exists; on object stores it is one conditional PUT; on filesystems that write in place it
renames a finished temporary file. `check_output` rejects storage that supports none of these.
"""

from __future__ import annotations

from samray.storage.filesystems import configure, for_arrow, reset
from samray.storage.listing import FileEntry, clock, list_files, list_names, list_times, list_versions
from samray.storage.reading import (
    exists,
    file_size,
    file_version,
    is_dir_like,
    open_read,
    read_bytes,
    read_whole,
    size_of_version,
)
from samray.storage.redaction import HARMLESS_QUERY, has_credentials, is_redacted, redact, redact_error
from samray.storage.retrying import time_limit, timeout_s
from samray.storage.uris import (
    glob_base,
    has_glob,
    is_local,
    is_web,
    join,
    normalize,
    origin_of,
    parent,
    resolve,
    scheme_of,
)
from samray.storage.writing import TEMPORARY_PREFIX, check_output, delete, put, put_chunks, put_new, remove_leftovers

__all__ = [
    "HARMLESS_QUERY",
    "TEMPORARY_PREFIX",
    "FileEntry",
    "check_output",
    "clock",
    "configure",
    "delete",
    "exists",
    "file_size",
    "file_version",
    "for_arrow",
    "glob_base",
    "has_credentials",
    "has_glob",
    "is_dir_like",
    "is_local",
    "is_redacted",
    "is_web",
    "join",
    "list_files",
    "list_names",
    "list_times",
    "list_versions",
    "normalize",
    "open_read",
    "origin_of",
    "parent",
    "put",
    "put_chunks",
    "put_new",
    "read_bytes",
    "read_whole",
    "redact",
    "redact_error",
    "remove_leftovers",
    "reset",
    "resolve",
    "scheme_of",
    "size_of_version",
    "time_limit",
    "timeout_s",
]
