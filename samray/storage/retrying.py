"""samray's only retry loop: how often and how long a request is retried, and when a storage counts as unavailable.

A request is retried for `storage.timeout_s` with full jitter, which spreads the retries of many workers over time. The
requests of a process share what they know about a bucket or host: if it has failed without any success for that long,
new requests are retried only once, not for minutes again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

from samray.config import StorageConfig
from samray.errors import ConfigError, StorageError
from samray.storage.faults import Fault, as_storage_error, fault_of, is_conflict
from samray.storage.redaction import redact, redact_error
from samray.storage.uris import origin_of, scheme_of

log = logging.getLogger(__name__)

FIRST_BACKOFF_S: Final = 0.25
MAX_BACKOFF_S: Final = 10.0

_LEAST_ATTEMPT_S: Final = 15.0
"""Minimum seconds per attempt, unless the caller set a limit: an attempt may begin at the last moment."""

_SLOWEST_BYTES_PER_S: Final = 100_000
"""A slower transfer counts as stalled."""

T = TypeVar("T")

_reconnect: Callable[[str], None] | None = None

_settings = StorageConfig()


class _Limit(threading.local):
    """Time limits of this thread's current request."""

    until = float("inf")
    """In time.monotonic(), set by `time_limit`."""
    attempt_until = float("inf")
    """When retry gives up; a bounded attempt may run a little longer."""


_limit = _Limit()
_outages: dict[str, tuple[float, float]] = {}
_outages_lock = threading.Lock()
_ftp_lock = threading.RLock()


def use(settings: StorageConfig) -> None:
    """Use these settings from now on; see `filesystems.configure`."""
    global _settings
    _settings = settings


def settings() -> StorageConfig:
    """The current settings of this process."""
    return _settings


def timeout_s() -> float:
    """Seconds for which one request is tried (`storage.timeout_s`)."""
    return _settings.timeout_s


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Limit the total time of this thread's requests within the block, including the one in progress."""
    before = _limit.until
    _limit.until = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        _limit.until = before


def attempt_options(fs: Any, num_bytes: int | None = None) -> dict[str, float]:
    """Options for a call on this fsspec filesystem that end it when its time is up.

    num_bytes: size of the transfer; None if unknown: then only a stall or `time_limit` ends it.
    """
    # Only fsspec's asynchronous filesystems take a time limit per call.
    if not getattr(fs, "async_impl", False):
        return {}
    now = time.monotonic()
    left = _limit.until - now
    if num_bytes is not None:
        # Long enough for a slow but steady transfer.
        least = _LEAST_ATTEMPT_S + num_bytes / _SLOWEST_BYTES_PER_S
        left = min(left, max(least, _limit.attempt_until - now))
    return {} if left == float("inf") else {"timeout": max(0.01, left)}


def reconnect_with(reconnect: Callable[[str], None]) -> None:
    """Set the function that closes the connections to a URI's server after each failed attempt."""
    global _reconnect
    _reconnect = reconnect


def retry(doing: str, uri: str, call: Callable[[], T]) -> T:
    """Call until it succeeds, fails permanently, or its time or `storage.max_attempts` is used up.

    Raises: FileError or NotFoundError if this file is refused, UnavailableError if every attempt failed, StorageError
    if no request can succeed. FileExistsError from `call` is passed on.
    """
    started = time.monotonic()
    origin = origin_of(uri)
    attempt = 0
    seen: Exception | None = None
    while True:
        attempt += 1
        _limit.attempt_until = started + _settings.timeout_s
        try:
            with _ftp_lock if scheme_of(uri) == "ftp" else contextlib.nullcontext():  # one connection, one request
                result = call()
        except (StorageError, ConfigError):
            raise
        except Exception as error:  # every fsspec backend raises its own types; all are re-raised
            if is_conflict(error):
                _answered(origin)
                raise FileExistsError(errno.EEXIST, "already there", redact(uri)) from error
            if fault_of(error) is not Fault.RETRY:
                _answered(origin)
                raise as_storage_error(error, doing, uri) from error
            wait_s = _wait_before_next(attempt, started, origin)
            if isinstance(error, TimeoutError) and not str(error) and seen is not None:
                error = seen  # the server's earlier error is more precise than a timeout
            seen = error
            if _reconnect is not None:
                _reconnect(uri)
            if wait_s is None:
                tried = f" after {attempt} attempt{'' if attempt == 1 else 's'} in {time.monotonic() - started:.0f} s"
                raise as_storage_error(error, doing, uri, tried) from error
            log.info("attempt %d to %s %s failed (%s), next in %.2f s",
                     attempt, doing, redact(uri), redact_error(error, uri), wait_s)  # fmt: skip
        else:
            _answered(origin)
            return result
        # Outside of the FTP lock: other requests go on during the pause.
        time.sleep(wait_s)


def _wait_before_next(attempt: int, started: float, origin: str) -> float | None:
    """Seconds until the next attempt; None if this one was the last."""
    now = time.monotonic()
    # If the bucket or host failed before this request began, that time counts, too.
    end = min(started, _failing_since(origin, now)) + _settings.timeout_s
    left = min(end - now, (_limit.until - now) / 2)  # leave half of the time for the next attempt
    # Too little time for another attempt.
    if left <= 0.01 * _settings.timeout_s or attempt == _settings.max_attempts:
        return None
    backoff_s = random.uniform(0, min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(attempt - 1, 10)))
    return min(backoff_s, left)


def _failing_since(origin: str, now: float) -> float:
    """Start of the current series of failures, including this one; failures far apart start a new series."""
    with _outages_lock:
        since, last = _outages.get(origin, (now, now))
        if now - last > _settings.timeout_s:
            since = now
        _outages[origin] = (since, now)
    return since


def _answered(origin: str) -> None:
    """Note that the storage responded, even with a refusal."""
    # A look without the lock first, because this runs after every request.
    if origin in _outages:
        with _outages_lock:
            _outages.pop(origin, None)


def forget_outages() -> None:
    """Forget past failures: for a forked child, or a process with new endpoints."""
    global _outages_lock, _ftp_lock
    _outages_lock, _ftp_lock = threading.Lock(), threading.RLock()
    _outages.clear()
