"""The one retry loop of samray: how often and how long a request is tried, and when a storage counts as gone.

A request is tried for `storage.timeout_s` with full jitter between attempts, so that many workers do not come back at
the same moment. All requests of a process share what they know of a bucket or host: one that has failed without a
single success for that long is tried once more by each new request, not for minutes again.
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
from samray.storage.uris import place_of, scheme_of

log = logging.getLogger(__name__)

FIRST_BACKOFF_S: Final = 0.25
MAX_BACKOFF_S: Final = 10.0

_LEAST_ATTEMPT_S: Final = 15.0
"""What an attempt gets at least, unless its caller has set a limit: it may begin in the last moment."""

_SLOWEST_BYTES_PER_S: Final = 100_000
"""A slower transfer counts as stalled."""

T = TypeVar("T")

_reconnect: Callable[[str], None] | None = None

_settings = StorageConfig()


class _Limit(threading.local):
    """Time limits of the current request of this thread."""

    until = float("inf")
    """By time.monotonic(), as `time_limit` has it."""
    attempt_until = float("inf")
    """When retry's patience ends; a bounded attempt may run a little longer."""


_limit = _Limit()
_outages: dict[str, tuple[float, float]] = {}
_outages_lock = threading.Lock()
_ftp_lock = threading.RLock()


def use(settings: StorageConfig) -> None:
    """Use these settings from now on; see `filesystems.configure`."""
    global _settings
    _settings = settings


def settings() -> StorageConfig:
    """The settings in force in this process."""
    return _settings


def timeout_s() -> float:
    """Seconds for which one request is tried (`storage.timeout_s`)."""
    return _settings.timeout_s


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """All requests of this thread within the block together get so many seconds, those under way included."""
    before = _limit.until
    _limit.until = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        _limit.until = before


def attempt_options(fs: Any, num_bytes: int | None = None) -> dict[str, float]:
    """Options of a call on this fsspec filesystem that end it when its time is up.

    num_bytes: what it transfers; None if that may be anything: then only a stall or `time_limit` ends it.
    """
    if not getattr(fs, "async_impl", False):
        return {}
    now = time.monotonic()
    left = _limit.until - now
    if num_bytes is not None:
        least = _LEAST_ATTEMPT_S + num_bytes / _SLOWEST_BYTES_PER_S
        left = min(left, max(least, _limit.attempt_until - now))
    return {} if left == float("inf") else {"timeout": max(0.01, left)}


def reconnect_with(reconnect: Callable[[str], None]) -> None:
    """What closes the connections to a URI's server after each failed attempt."""
    global _reconnect
    _reconnect = reconnect


def retry(doing: str, uri: str, call: Callable[[], T]) -> T:
    """Call until it succeeds, fails for good, or its time or `storage.max_attempts` is up.

    Raises: FileError or NotFoundError if it is this file that is refused, UnavailableError if every attempt failed,
    StorageError if no request will succeed; FileExistsError from `call` passes.
    """
    started = time.monotonic()
    place = place_of(uri)
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
        except Exception as error:  # every fsspec backend raises its own types; nothing is swallowed here
            if is_conflict(error):
                _answered(place)
                raise FileExistsError(errno.EEXIST, "already there", redact(uri)) from error
            if fault_of(error) is not Fault.RETRY:
                _answered(place)
                raise as_storage_error(error, doing, uri) from error
            wait_s = _wait_before_next(attempt, started, place)
            if isinstance(error, TimeoutError) and not str(error) and seen is not None:
                error = seen  # what the server said before says more than that time is up
            seen = error
            if _reconnect is not None:
                _reconnect(uri)
            if wait_s is None:
                tried = f" after {attempt} attempt{'s' * (attempt != 1)} in {time.monotonic() - started:.0f} s"
                raise as_storage_error(error, doing, uri, tried) from error
            log.info("attempt %d to %s %s failed (%s), next in %.2f s",
                     attempt, doing, redact(uri), redact_error(error, uri), wait_s)  # fmt: skip
        else:
            _answered(place)
            return result
        time.sleep(wait_s)


def _wait_before_next(attempt: int, started: float, place: str) -> float | None:
    """Seconds until the next attempt; None if this one was the last."""
    now = time.monotonic()
    end = min(started, _failing_since(place, now)) + _settings.timeout_s
    left = min(end - now, (_limit.until - now) / 2)  # half of the time is for the next attempt itself
    if left <= 0.01 * _settings.timeout_s or attempt == _settings.max_attempts:
        return None
    backoff_s = random.uniform(0, min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(attempt - 1, 10)))
    return min(backoff_s, left)


def _failing_since(place: str, now: float) -> float:
    """When the present run of failures began, of which this is one; failures far apart are not one run."""
    with _outages_lock:
        since, last = _outages.get(place, (now, now))
        if now - last > _settings.timeout_s:
            since = now
        _outages[place] = (since, now)
    return since


def _answered(place: str) -> None:
    """The storage there answers, be it with a refusal."""
    if place in _outages:
        with _outages_lock:
            _outages.pop(place, None)


def forget_outages() -> None:
    """Begin with a clean slate, as a forked child and a process with new endpoints do."""
    global _outages_lock, _ftp_lock
    _outages_lock, _ftp_lock = threading.Lock(), threading.RLock()
    _outages.clear()
