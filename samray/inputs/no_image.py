"""The message for an INPUT without images: what was looked for, what is there, and what to type instead."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from itertools import islice
from typing import Final

import pyarrow as pa

from samray import storage
from samray.errors import ConfigError, NotFoundError
from samray.inputs.decode import image_extensions
from samray.inputs.readers import container_endings, list_endings, what_to_give
from samray.inputs.tar import is_compressed_tar
from samray.text import abridged

_ARCHIVES: Final = (
    *(".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".lzma", ".z", ".br", ".cab", ".iso", ".dmg"),
    *(".tgz", ".tbz2", ".txz", ".tzst", ".jar", ".cbz", ".cbr"),
)
_LISTS: Final = (
    *(".json", ".json5", ".geojson", ".yaml", ".yml", ".xml", ".xls", ".xlsx", ".ods", ".feather", ".arrow", ".ipc"),
    *(".arrows", ".avro", ".orc", ".db", ".sqlite", ".sqlite3", ".duckdb", ".lst", ".list", ".log", ".toml", ".ini"),
    *(".ndjson", ".tsv"),
)
_OTHERS: Final = (
    *(".npy", ".npz", ".h5", ".hdf5", ".lmdb", ".mdb", ".tfrecord", ".tfrecords", ".rec", ".idx", ".mat", ".pkl"),
    *(".pickle", ".pt", ".pth", ".safetensors", ".onnx", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg"),
    *(".pdf", ".html", ".htm", ".md", ".doc", ".docx", ".py", ".ipynb"),
)
_INSTEAD: Final = {
    ".json": "; annotations in JSON are read by `samray import`",
    ".ndjson": "; rename it to .jsonl",
    ".tsv": "; save it with commas, as .csv",
}
_MAX_LISTED: Final = 100_000
_CHAIN: Final = re.compile(r"^[A-Za-z][A-Za-z0-9+.\-]*(://.*)?::")


def refuse_unreadable_kinds(uri: str) -> None:
    """Raises: ConfigError if the name of an INPUT says that it is neither an image nor anything that holds them."""
    name = storage.redact(uri)
    if not storage.is_local(uri) and _CHAIN.match(uri):
        raise ConfigError(
            f"INPUT {name} chains filesystems (`::`), which samray does not read; "
            "unpack the archive and give the folder, or give a plain .tar"
        )
    lower = uri.lower()
    readable = (*image_extensions(), *container_endings())
    if lower.endswith(readable) or not lower.endswith((*_ARCHIVES, *_LISTS, *_OTHERS)) or storage.is_dir_like(uri):
        return
    if is_compressed_tar(uri):
        raise ConfigError(
            f"INPUT {name} is a compressed tar, from which single images cannot be read; "
            "unpack it, or decompress it to a plain .tar"
        )
    ending = posixpath.splitext(lower)[1]
    if lower.endswith(_ARCHIVES):
        what = f"is a {ending} file, which samray does not unpack; unpack it, or make a plain .tar of what is in it"
    elif lower.endswith(_LISTS):
        what = f"is a {ending} file; lists of images are {', '.join(list_endings())}, one URI per row"
        what += _INSTEAD.get(ending, "")
    else:
        what = f"is a {ending} file, which is not an image; {what_to_give()}"
    raise ConfigError(f"INPUT {name} {what}")


def no_image_message(uri: str, root: str, uris: pa.ChunkedArray) -> str:
    """The sentence for an INPUT without an image. uris: of the files that it names."""
    where = storage.redact(uri)
    usual = (".jpg", ".png", ".webp", ".tif", ".heic")
    shown = ", ".join(ending for ending in usual if ending in image_extensions())
    sentence = (
        f"INPUT {where}: no image found; looked for names ending in {shown} and {len(image_extensions()) - 5} more"
    )
    names = uris.to_pylist()
    if not names and storage.has_glob(uri):
        sentence = f"INPUT {where}: no file matches this pattern"
        names = _files_below(root)
    if not names:
        return sentence + "; no file was found"
    start = len(storage.join(root, ""))
    names = [name[start:] for name in names]
    counts = Counter(posixpath.splitext(name.lower())[1] or "without ending" for name in names)
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    kinds = abridged([f"{number} {ending}" for ending, number in ordered], 5)
    sentence += f", among {len(names)} files ({kinds})" if len(uris) else f"; below {storage.redact(root)} are {kinds}"
    wanted = container_endings() if len(uris) else (*image_extensions(), *container_endings())
    present = [ending for ending in wanted if counts[ending] and ending != ".txt"]
    readable = max(
        present, key=lambda ending: counts[ending], default=None
    )  # the first in `wanted` of the most frequent
    if readable is None:
        return sentence
    # The suggested pattern must find files: it is made from those that are there.
    same = [name for name in names if name.lower().endswith(readable)]
    return f"{sentence}; name them, as in '{storage.redact(_glob_of(root, same))}'"


def _glob_of(root: str, names: list[str]) -> str:
    """A pattern that finds these names below root, which have the same ending."""
    folders = {posixpath.dirname(name) for name in names}
    endings = {posixpath.splitext(name)[1] for name in names}
    ending = endings.pop() if len(endings) == 1 else sorted(endings)[0]
    if len(folders) == 1:
        return storage.join(root, *filter(None, folders), f"*{ending}")
    return storage.join(root, "**", f"*{ending}")


def _files_below(root: str) -> list[str]:
    try:
        return sorted(entry.uri for entry in islice(storage.list_files(root), _MAX_LISTED))
    except NotFoundError:
        return []
