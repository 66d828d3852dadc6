"""The encoded bytes of the images of a listing or plan, or why there are none.

A missing image is its own fault. Any other refusal, and a request that failed for as long as it was tried, may as well
be the fault of the whole bucket, of the credentials or of the network: an image gets a failed row for it only after
another file could be read since. If nothing can be read, StorageError ends the run, and no row says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from samray import storage
from samray.errors import (
    BucketNotFoundError,
    ConfigError,
    FileError,
    ImageError,
    NotFoundError,
    RefusedError,
    StorageError,
    TooLargeError,
    UnavailableError,
)
from samray.inputs.base import FetchFile, too_large
from samray.inputs.readers import reader_of
from samray.inputs.rows import INPUT_SCHEMA

if TYPE_CHECKING:
    from samray.config import InputConfig

Doubt = RefusedError | BucketNotFoundError | UnavailableError
_DOUBT: Final = (RefusedError, BucketNotFoundError, UnavailableError)
"""Errors of one file that may be those of all."""

Sample = Callable[[], list[str]]
"""Gives files from all over the input."""

NO_CREDENTIALS: Final = (
    "{} can be read only with credentials, which no OUTPUT keeps: label again with an INPUT that lists it, or make the"
    " image readable without them (image_root names another place to loaders)"
)

_FETCH_THREADS: Final = 16
_MAX_PROBES: Final = 8
"""Other files asked for, all at once, when one is refused."""
_PROBE_S: Final = 8.0
_PROBE_BYTES: Final = 64 * 1024
"""Enough that bodies which are all cut on their way do not pass for readable."""
_PROBE_WEB_BYTES: Final = 16 * 2**20
_LAST_TRY_S: Final = 20.0
_ENOUGH: Final = 3
"""Refused files of a bucket, without a readable one, after which the whole bucket counts as refused."""
_MAX_REMEMBERED: Final = 10_000

_readable: dict[str, str] = {}
"""Bucket or host -> a file there that this process could read: the first to ask when another one is refused."""


def fetch_images(rows: pa.Table, config: InputConfig, sample: Sample | None = None) -> list[bytes | ImageError]:
    """The encoded bytes of each row of a slice of a listing or plan, or why there are none.

    One image's fault (missing, too_large, no permission, a web server that fails) is an ImageError in its place.
    sample: other files to read before an image is blamed; called if one is refused. Without it only the rows
    themselves show whether others are readable, and an image refused by a storage that answers is believed to be alone.

    Raises: StorageError if the storage as a whole fails: then a retry later helps, and no row should say otherwise.
    """
    items = rows.select(INPUT_SCHEMA.names).to_pylist()
    fetched = _fetch_all(items, config, storage.timeout_s())
    # A disk that is not mounted shows as missing files, which would otherwise become failed rows of the whole input.
    if sample and len(items) >= _ENOUGH and all(isinstance(d, ImageError) and d.reason == "missing" for d in fetched):
        _raise_if_the_disk_is_gone([_file_of(item) for item in items], sample)
    doubts = {i: data for i, data in enumerate(fetched) if isinstance(data, _DOUBT)}
    if doubts:
        readable = [_file_of(items[i]) for i, data in enumerate(fetched) if isinstance(data, bytes)]
        _raise_if_nothing_is_readable([(_file_of(items[i]), error) for i, error in doubts.items()], readable, sample)
        # The storage may have come back only just now.
        again = _fetch_all([items[i] for i in doubts], config, min(_LAST_TRY_S, storage.timeout_s()))
        for i, data in zip(doubts, again, strict=True):
            fetched[i] = data
    # Lists of web links may name any number of hosts.
    if len(_readable) > _MAX_REMEMBERED:
        _readable.clear()
    for item, data in zip(items, fetched, strict=True):
        if isinstance(data, bytes):
            _readable[storage.origin_of(_file_of(item))] = _file_of(item)
    return [_blamed(data) if isinstance(data, _DOUBT) else data for data in fetched]


def _file_of(item: dict[str, Any]) -> str:
    """The file that holds the image."""
    return str(item["container"] or item["uri"])


def _blamed(error: Doubt) -> ImageError:
    reason = "missing" if isinstance(error, BucketNotFoundError) else "unreadable"
    return ImageError(reason, str(error).partition("; ")[0])  # the rest says what to do about a run


# --- reading -------------------------------------------------------------------------------------------------------


def _fetch_all(items: list[dict[str, Any]], config: InputConfig, timeout_s: float) -> list[bytes | ImageError | Doubt]:
    """timeout_s: for each image, unless its reader takes all rows of a container at once."""
    fetched: dict[int, bytes | ImageError | Doubt] = {}
    at_once: dict[str, list[int]] = {}
    single: list[int] = []
    for i, item in enumerate(items):
        container = item["container"]
        reader = reader_of(container)
        # Checked before any request: the listing already knows the problem, or the credentials are hidden.
        if item["problem"]:
            fetched[i] = ImageError.parse(item["problem"])
        elif storage.is_redacted(_file_of(item)):
            fetched[i] = ImageError("missing", NO_CREDENTIALS.format(item["uri"]))
        elif reader is not None and reader.fetch_at_once:
            at_once.setdefault(container, []).append(i)
        else:
            single.append(i)

    # A file that a row refers to has its own time limit.
    def fetch_file(uri: str) -> bytes | ImageError:
        with storage.time_limit(timeout_s):
            data = _fetch([{"uri": uri, "size": None, "container": None}], config, fetch_file)[0]
        return _blamed(data) if isinstance(data, _DOUBT) else data

    def fetch_one(i: int) -> bytes | ImageError | Doubt:
        with storage.time_limit(timeout_s):
            return _fetch([items[i]], config, fetch_file)[0]

    # One image needs no pool of threads, for example when a loader reads it.
    if len(single) == 1:
        fetched[single[0]] = fetch_one(single[0])
    elif single:
        with ThreadPoolExecutor(min(_FETCH_THREADS, len(single))) as pool:
            fetched |= zip(single, pool.map(fetch_one, single), strict=True)
    for indices in at_once.values():
        fetched |= zip(indices, _fetch([items[i] for i in indices], config, fetch_file), strict=True)
    return [fetched[i] for i in range(len(items))]


def _fetch(
    items: list[dict[str, Any]], config: InputConfig, fetch_file: FetchFile
) -> Sequence[bytes | ImageError | Doubt]:
    """The bytes of an image's own file, or of rows of one container, by its reader."""
    container = items[0]["container"]
    # An error of a container is that of all its rows.
    try:
        reader = reader_of(container)
        if reader is None or reader.fetch is None:
            raise FileError(f"{storage.redact(container)} is not a file that holds images")
        return reader.fetch(_file_of(items[0]), items, config, fetch_file)
    except TooLargeError as error:
        return [too_large(error.size, config)] * len(items)
    except _DOUBT as error:
        return [error] * len(items)
    except NotFoundError as error:
        return [ImageError("missing", str(error))] * len(items)
    except (FileError, ConfigError) as error:
        return [ImageError("unreadable", str(error))] * len(items)


# --- whose fault it is ---------------------------------------------------------------------------------------------


def _raise_if_nothing_is_readable(
    refused: list[(tuple[str, Doubt])], readable: list[str], sample: Sample | None
) -> None:
    """Ask for other files of each bucket or host that refused one. Raises: StorageError if none of them comes.

    refused: files and why; readable: those read just before.
    """
    others: list[str] | None = None
    for origin in dict.fromkeys(storage.origin_of(uri) for uri, _ in refused):
        errors = {uri: error for uri, error in refused if storage.origin_of(uri) == origin}
        # First the files that were readable just now: the quickest proof that the storage as a whole works.
        known = [uri for uri in readable if storage.origin_of(uri) == origin][-2:]
        known += [_readable[origin]] if origin in _readable else []
        if _any_is_readable(known):
            continue
        # Then others of the same bucket or host, from all over the input; sampled once for all origins.
        others = others if others is not None else sample() if sample else readable
        near = [uri for uri in others if storage.origin_of(uri) == origin and uri not in errors]
        if _any_is_readable(near):
            continue
        far = [*readable, *others]
        # A host of the web that is gone for good must not end a run that reads from many.
        if storage.is_web(origin) and _any_is_readable(
            u for u in far if storage.is_web(u) and storage.origin_of(u) != origin
        ):
            continue
        # Too few files of this origin were tried to blame it: if others elsewhere can be read, blame these images.
        num_tried = len({*errors, *known, *near[:_MAX_PROBES]})
        if num_tried < _ENOUGH and _any_is_readable(uri for uri in far if storage.origin_of(uri) != origin):
            continue
        error = next(iter(errors.values()))
        # Without a sample (see `fetch_images`), a refusal by a storage that answers is that image's own.
        if sample is None and not known and (storage.is_web(origin) or not isinstance(error, UnavailableError)):
            continue
        if isinstance(error, UnavailableError):
            raise error
        raise StorageError(
            f"{error}; it is not that file alone: none of {num_tried} files at {origin} can be read. Check the "
            "bucket's name, the credentials and the permissions, then run the same command again"
        ) from error


def _raise_if_the_disk_is_gone(files: list[str], sample: Sample) -> None:
    """Files of a disk that is not mounted are not refused, but missing, and so are all others of the input."""
    if all(storage.is_local(file) for file in files):
        error = UnavailableError(
            f"not one of {len(files)} files that INPUT names is there any more, such as {storage.redact(files[0])}; "
            "check that the disk is mounted, then run the same command again"
        )
        _raise_if_nothing_is_readable([(file, error) for file in files], [], sample)


def _any_is_readable(uris: Iterable[str]) -> bool:
    """Whether one of the first few of these files can be read now."""
    chosen = list(dict.fromkeys(uris))[:_MAX_PROBES]
    if not chosen:
        return False
    # Not a `with` block, which would wait for probes that hang although one has succeeded.
    pool = ThreadPoolExecutor(len(chosen))
    try:
        return any(probe.result() for probe in as_completed([pool.submit(_is_readable, uri) for uri in chosen]))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _is_readable(uri: str) -> bool:
    with storage.time_limit(_PROBE_S):
        try:
            if storage.is_web(uri):  # may send no ranges, or compressed ones
                storage.read_whole(uri, _PROBE_WEB_BYTES)
            else:
                storage.read_bytes(uri, 0, _PROBE_BYTES)
        except TooLargeError:
            # It answered with a size, so the storage can be read.
            return True
        except (StorageError, ConfigError):
            return False
    return True
