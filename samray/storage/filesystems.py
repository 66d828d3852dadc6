"""The process's fsspec filesystems, and the one retry loop of samray."""

from __future__ import annotations

import errno
import gc
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from samray.errors import ConfigError, StorageError
from samray.storage.addresses import make_client
from samray.storage.faults import MAX_ATTEMPTS, as_storage_error, is_conflict, is_transient
from samray.storage.uris import is_local, redact, scheme_of

log = logging.getLogger(__name__)

FIRST_BACKOFF_S: Final = 0.25
MAX_BACKOFF_S: Final = 10.0

T = TypeVar("T")


_filesystems: dict[str, Any] = {}
_filesystems_lock = threading.Lock()
_inherited: list[Any] = []


def _forget_filesystems() -> None:
    """A forked child has neither the event loop's thread nor a right to the sockets that its parent's clients use.

    They are kept alive, unused: their finalizers would take the sockets out of the epoll set, which both processes
    share, and the parent would wait in vain for its answers.
    Nor does the child collect what garbage the parent had: among it may be references of Ray's, whose finalizers wait
    for locks that were held by threads which the child does not have.
    """
    gc.freeze()
    global _filesystems_lock
    _filesystems_lock = threading.Lock()
    _inherited.extend(_filesystems.values())
    _filesystems.clear()


os.register_at_fork(after_in_child=_forget_filesystems)


def reset() -> None:
    """Forget all connections, so that changed credentials and endpoints are read from the environment again."""
    with _filesystems_lock:
        _filesystems.clear()


def filesystem(uri: str) -> Any:
    """The process's one fsspec filesystem for the URI's scheme, made on first use and shared by all threads."""
    scheme = scheme_of(uri)
    with _filesystems_lock:
        fs = _filesystems.get(scheme)
        if fs is None:
            fs = _filesystems[scheme] = _make_filesystem(scheme)
        return fs


def for_arrow(uri: str) -> tuple[Any, str]:
    """The filesystem as pyarrow and Ray take it, and the path there; None and the path as it is of a local one.

    By a URI alone they would open another one, which knows fewer storages and not fsspec's configuration.
    """
    if is_local(uri):
        return None, uri
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    own = filesystem(uri)
    return PyFileSystem(FSSpecHandler(own)), own._strip_protocol(uri)


def _make_filesystem(scheme: str) -> Any:
    import fsspec
    from fsspec.config import conf

    # Listings are never cached: another driver's shards must be seen.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme in ("s3", "s3a"):
        given = dict(conf.get("s3", {}).get("config_kwargs", {}))
        # No retries below ours: nested loops multiply, and botocore's would hide which attempt succeeded.
        options["config_kwargs"] = {
            "connect_timeout": 10,
            "read_timeout": 60,
            "max_pool_connections": 64,
            "retries": {"total_max_attempts": 1},
        } | given
    elif scheme in ("http", "https"):
        options["get_client"] = make_client
    try:
        fs = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{scheme}:// is no filesystem that fsspec knows: {error}") from error
    if scheme in ("s3", "s3a"):
        fs.retries = 1
    return fs


def retry(doing: str, uri: str, call: Callable[[], T]) -> T:
    """Call until it succeeds, fails for good, or `MAX_ATTEMPTS` is reached; the one retry loop of samray.

    Waits with full jitter between attempts, so that many workers do not come back at the same moment.

    Raises: StorageError (FileError, NotFoundError where it is one file's fault); FileExistsError from `call` passes.
    """
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return call()
        except (StorageError, ConfigError):
            raise
        except Exception as error:  # every fsspec backend raises its own types; nothing is swallowed here
            if is_conflict(error):
                raise FileExistsError(errno.EEXIST, "already there", redact(uri)) from error
            if attempt == MAX_ATTEMPTS or not is_transient(error):
                raise as_storage_error(error, doing, uri) from error
            wait_s = random.uniform(0, min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (attempt - 1)))
            log.info("attempt %d to %s %s failed (%s), next in %.2f s",
                     attempt, doing, redact(uri), redact(error), wait_s)  # fmt: skip
            time.sleep(wait_s)
    raise AssertionError("unreachable")
