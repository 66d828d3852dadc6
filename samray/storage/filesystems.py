"""The fsspec filesystems of this process."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any, Final

from samray.config import StorageConfig
from samray.errors import ConfigError
from samray.storage import retrying
from samray.storage.addresses import make_client
from samray.storage.uris import is_local, scheme_of

_CONNECT_S: Final = 10.0
SCHEMES_OF_HOSTS: Final = frozenset({"ftp", "hdfs", "sftp", "smb", "ssh", "webhdfs"})
"""Filesystems that take host, port and user from the URI."""

_filesystems: dict[str, Any] = {}
_filesystems_lock = threading.Lock()
_inherited: list[Any] = []


def _forget_filesystems() -> None:
    """Drop the parent's filesystems in a forked child, which has no event loop thread and must not use its sockets.

    The objects are kept alive, unused: their finalizers would remove the sockets from the epoll set that both processes
    share, and the parent would never get its responses.
    The child does not collect the parent's garbage either: it may contain Ray references whose finalizers wait for
    locks of threads that the child does not have.
    """
    gc.freeze()
    global _filesystems_lock
    # A thread of the parent may have held the old lock at the fork, and no thread of the child would release it.
    _filesystems_lock = threading.Lock()
    _inherited.extend(_filesystems.values())
    _filesystems.clear()
    retrying.forget_outages()


os.register_at_fork(after_in_child=_forget_filesystems)


def reset() -> None:
    """Drop all connections; credentials and endpoints are then read from the environment again."""
    with _filesystems_lock:
        _filesystems.clear()
    retrying.forget_outages()


def configure(settings: StorageConfig) -> None:
    """Use these settings from now on in this process; reconnects if the time limit changed."""
    if settings.stall_timeout_s != retrying.settings().stall_timeout_s:
        reset()
    retrying.use(settings)


def filesystem(uri: str) -> Any:
    """The filesystem for the URI's scheme, created on first use and shared by all threads of the process.

    One per host if a filesystem is a connection to a host.
    """
    key = _key_of(uri)
    with _filesystems_lock:
        fs = _filesystems.get(key)
        if fs is None:
            fs = _filesystems[key] = _make_filesystem(scheme_of(uri), uri)
        return fs


def reconnect(uri: str) -> None:
    """Make the next request open a new connection, if the filesystem is a single connection that may be broken."""
    if scheme_of(uri) in SCHEMES_OF_HOSTS:
        with _filesystems_lock:
            _filesystems.pop(_key_of(uri), None)


def _key_of(uri: str) -> str:
    scheme = scheme_of(uri)
    return "/".join(uri.split("/", 3)[:3]) if scheme in SCHEMES_OF_HOSTS else scheme


def for_arrow(uri: str) -> tuple[Any, str]:
    """The filesystem and path for pyarrow and Ray; for a local file None and the unchanged path.

    From a URI alone they would open their own filesystem, which supports fewer storages and ignores fsspec's
    configuration.
    """
    if is_local(uri):
        return None, uri
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs = filesystem(uri)
    return PyFileSystem(FSSpecHandler(fs)), fs._strip_protocol(uri)


def _make_filesystem(scheme: str, uri: str) -> Any:
    import fsspec
    from fsspec.config import conf

    # Listings are never cached: shards of another driver must be visible.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    stall_s = retrying.settings().stall_timeout_s
    if scheme in ("s3", "s3a"):
        # What the user configured in fsspec wins over these options.
        config_kwargs = dict(conf.get("s3", {}).get("config_kwargs", {}))
        # No retries below ours: nested loops multiply, and botocore's hide which attempt succeeded.
        options["config_kwargs"] = {
            "connect_timeout": min(_CONNECT_S, stall_s),
            "read_timeout": stall_s,
            "max_pool_connections": 64,
            "retries": {"total_max_attempts": 1},
        } | config_kwargs
    elif scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        # No limit on the whole transfer: a large file may take long; only a stall is an error.
        timeout = ClientTimeout(total=None, sock_connect=min(_CONNECT_S, stall_s), sock_read=stall_s)
        options["client_kwargs"] = {"timeout": timeout} | dict(conf.get(scheme, {}).get("client_kwargs", {}))
        options["get_client"] = make_client
    try:
        if scheme in SCHEMES_OF_HOSTS:
            options |= fsspec.get_filesystem_class(scheme)._get_kwargs_from_urls(uri)
        fs = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{scheme}:// is not an fsspec filesystem: {error}") from error
    if scheme in ("s3", "s3a"):
        # s3fs has a retry loop of its own above botocore's.
        fs.retries = 1
    return fs


retrying.reconnect_with(reconnect)
