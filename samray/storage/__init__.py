"""Files on any fsspec filesystem: list, read, and writes that appear whole or not at all.

This is the only package that talks to storage and the only one that retries. Names found by listing are taken
literally: a `*`, `?`, `[`, `%` or `#` in a name is just a character. Local files are plain absolute paths, all others
`scheme://...` URIs. Endpoint and credentials come from the usual environment variables (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, ...) and from fsspec's own configuration (`FSSPEC_S3_...`); none is ever put into a message.

`put_new` is what makes a shard appear exactly once: on local disks a finished temporary file is hard-linked to its
name, which fails if the name is taken; on object stores it is one conditional PUT of finished bytes; on filesystems
that write in place a finished temporary file is renamed. `check_output` names a storage that can do none of this.
"""

from __future__ import annotations

from samray.storage.filesystems import configure, for_arrow, reset
from samray.storage.listing import FileEntry, clock, list_files, list_names, list_times, list_versions
from samray.storage.reading import exists, file_size, file_version, is_dir_like, open_read, read_bytes, read_whole
from samray.storage.redaction import HARMLESS_QUERY, has_credentials, is_redacted, redact, redact_error
from samray.storage.retrying import time_limit, timeout_s
from samray.storage.uris import (
    glob_base,
    has_glob,
    is_local,
    is_web,
    join,
    normalize,
    parent,
    place_of,
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
    "parent",
    "place_of",
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
    "time_limit",
    "timeout_s",
]
