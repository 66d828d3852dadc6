"""File URIs: a canonical form, joining and resolving, without interpreting special characters."""

from __future__ import annotations

import os
import posixpath
import re
from typing import Final

_SCHEME: Final = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]*)://")
_GLOB_CHARS: Final = re.compile(r"[*?\[]")


def scheme_of(uri: str) -> str:
    """The URI's scheme in lower case; "file" for a plain path."""
    match = _SCHEME.match(uri)
    scheme = match.group(1).lower() if match else "file"
    return "file" if scheme == "local" else scheme


def is_local(uri: str) -> bool:
    """Whether the URI names a file on a local filesystem."""
    return scheme_of(uri) == "file"


def origin_of(uri: str) -> str:
    """The unit that fails as a whole: `scheme://` with the bucket or host; `file://` for local files."""
    scheme = scheme_of(uri)
    return (
        "file://" if scheme == "file" else f"{scheme}://{uri.split('://', 1)[1].partition('/')[0].rpartition('@')[2]}"
    )


def is_web(uri: str) -> bool:
    """Whether the URI is served by a web server."""
    return scheme_of(uri) in ("http", "https")


def normalize(uri: str) -> str:
    """The canonical form: an absolute plain path for local files, else `scheme://...` without a trailing slash.

    Percent signs and the like are literal, as in fsspec.
    """
    uri = os.fspath(uri)
    if not is_local(uri):
        scheme, rest = uri.split("://", 1)
        return f"{scheme.lower()}://{rest.rstrip('/')}"
    path = _SCHEME.sub("", uri)
    if path == "~" or path.startswith("~/"):
        path = os.path.expanduser(path)
    return os.path.abspath(path)


def join(uri: str, *parts: str) -> str:
    """Append the relative `parts` to `uri`; parts are literal."""
    base = uri.rstrip("/") or "/"
    return base + "".join(("" if base == "/" and i == 0 else "/") + part.strip("/") for i, part in enumerate(parts))


def resolve(base: str, uri: str) -> str:
    """Resolve a `uri` from a file in the folder `base`: relative ones start there."""
    if _SCHEME.match(uri):
        return normalize(uri)
    if is_local(base):
        return os.path.normpath(os.path.join(normalize(base), os.path.expanduser(uri) if uri[:2] == "~/" else uri))
    scheme, rest = normalize(base).split("://", 1)
    if uri.startswith("/"):  # for example a network mount that every worker has
        return normalize(uri)
    # Keys may have empty segments (a//b.jpg), which normpath would remove: only URIs with dots go through it.
    path = f"{rest}/{uri}"
    if any(part in (".", "..") for part in uri.split("/")):
        path = posixpath.normpath(path)
    return f"{scheme}://{path}"


def parent(uri: str) -> str:
    """The folder of `uri`."""
    uri = normalize(uri)
    if is_local(uri):
        return os.path.dirname(uri)
    scheme, rest = uri.split("://", 1)
    return f"{scheme}://{rest.rpartition('/')[0] or rest}"


def has_glob(uri: str) -> bool:
    """Whether `uri` has a character with a meaning in globs."""
    return _GLOB_CHARS.search(uri) is not None


def glob_base(uri: str) -> str:
    """The folder above a glob's first wildcard segment: the root of the listed names."""
    segments = normalize(uri).split("/")
    wild = next((i for i, segment in enumerate(segments) if has_glob(segment)), len(segments))
    return "/".join(segments[:wild]) or "/"
