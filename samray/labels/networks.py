"""Networks of text from `transformers` (extra `text`): find their files, identify them by content, load them.

A network is a folder in Hugging Face's layout, local or on any fsspec URI, or a name on the Hugging Face Hub. Only the
files of `FILES` are used: weights as safetensors, settings and tokenizer as text. Nothing is unpickled, and code that
comes with a network is never run. Remote files are downloaded once per machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from samray import storage
from samray.errors import ConfigError
from samray.sam import fetch
from samray.storage.strict_json import parse_json
from samray.text import count

SETTING: Final = "labels.checkpoint"
WEIGHTS: Final = "model.safetensors"
FILES: Final = (
    "config.json", WEIGHTS, "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
)  # fmt: skip
"""The files of a network's folder that may be used; its digest covers them."""
_NEEDED: Final = (
    ("config.json",),
    (WEIGHTS,),
    ("preprocessor_config.json", "processor_config.json"),
    ("tokenizer.json", "vocab.txt", "vocab.json"),
)
"""One of each must be there."""
_HUB_NAME: Final = re.compile(r"[\w.-]+/[\w.-]+")
_GATED: Final[Mapping[str, str]] = {
    "facebook/sam3": "It has a licence of its own, Meta's SAM License: accept it on that page, then log in with "
    "`hf auth login` or set HF_TOKEN on every machine",
}
"""Networks that the Hub gives only to those who accepted the licence: what to do."""
_PICKLED: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class Network:
    """A network of a run: where it is, and what it contains. Small and picklable."""

    checkpoint: str
    """As for `locate`."""
    sha256: str
    """Digest of its files, in hex: part of the run's identity, the same wherever the files are."""


def require_transformers(way: str) -> None:
    """Raises: ConfigError if transformers is not installed."""
    # Found, not imported: importing it takes seconds.
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(f"labels.by={way} needs the package transformers: pip install 'samray[text]'")


def find_network(checkpoint: str, kinds: tuple[str, ...], way: str) -> Network:
    """Locate a network, download it if needed, and check that it is of one of these kinds.

    checkpoint: a folder, a URI or a name on the Hub. kinds: for `model_type` in its config.json. way: `labels.by`.
    Raises: ConfigError that says which files to put where, StorageError.
    """
    require_transformers(way)
    folder = locate(checkpoint)
    _check_files(folder, checkpoint)
    _check_settings(folder, checkpoint, kinds, way)
    _check_whole(folder, checkpoint)
    return Network(absolute_checkpoint(checkpoint), digest(folder))


def absolute_checkpoint(checkpoint: str) -> str:
    """As given, but a local folder as an absolute path: a relative one means another where the actors run."""
    is_folder = storage.is_local(checkpoint) and Path(storage.normalize(checkpoint)).is_dir()
    return storage.normalize(checkpoint) if is_folder else checkpoint


def weights_sha256(network: Network) -> str:
    """SHA-256 (hex) of the weights file alone. Raises: as `locate`."""
    return fetch.file_sha256(locate(network.checkpoint) / WEIGHTS)


def digest(folder: Path) -> str:
    """SHA-256 (hex) of the names and contents of those of FILES that are in folder."""
    # The weights' own digest is cached, so that a large file is not read at every start.
    lines = [f"{fetch.file_sha256(folder / name)} {name}\n" for name in FILES if (folder / name).is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextlib.contextmanager
def opened(network: Network) -> Iterator[Path]:
    """The local folder of a network for loading it, with the run's files from the first byte to the last.

    Raises: ConfigError if this machine has other files, StorageError.
    """
    folder = locate(network.checkpoint)
    _check_files(folder, network.checkpoint)
    before = digest(folder)
    if before != network.sha256:
        raise ConfigError(
            f"{_name(network.checkpoint)} on {socket.gethostname()} is not this run's network: its SHA-256 is "
            f"{before}, expected {network.sha256}. It was replaced, or differs between machines: restore the run's "
            "files, or choose another OUTPUT for these"
        )
    yield folder
    if digest(folder) != before:
        raise ConfigError(f"{_name(network.checkpoint)} was replaced while it was loaded; restore it and run again")


def load_network(cls: Any, folder: Path, origin: str) -> Any:
    """A transformers network in evaluation mode, float32, on the CPU.

    cls: its class. origin: `Network.checkpoint`, for messages.
    Raises: ConfigError that names a missing, misshapen or not finite tensor, or says why it cannot be loaded.
    """
    with loading(origin):
        network, info = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, dtype="float32",
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    name = f"{_name(origin)}: {WEIGHTS}"
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(f"{name} does not have {count(len(missing), 'tensor')} of this network, as {missing[0]}")
    if misshapen := sorted(info["mismatched_keys"]):
        key, shape, expected = misshapen[0]
        raise ConfigError(f"{name}: {key} is {tuple(shape)}, but config.json expects {tuple(expected)}")
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConfigError(f"{name}: {key} has values that are not finite numbers")  # it would find nothing
    return network.eval().requires_grad_(False)


def load_tokenizer(cls: Any, folder: Path, origin: str, vocab_size: int) -> Any:
    """A network's tokenizer. cls: its class. vocab_size: tokens that the network knows. Raises: as `load_network`."""
    with loading(origin):
        tokenizer = cls.from_pretrained(folder, local_files_only=True)
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"{_name(origin)}: its tokenizer has {len(tokenizer)} tokens, but the network knows {vocab_size}; put the "
            "files of one network into the folder"
        )
    return tokenizer


@contextlib.contextmanager
def loading(origin: str) -> Iterator[None]:
    """Turn whatever transformers raises about a network's file into ConfigError, without its reports and bars."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # one per actor would fill the driver's terminal
    try:
        yield
    # ValueError, KeyError, SafetensorError, RuntimeError, errors of its own checks.
    except Exception as error:
        raise ConfigError(f"{_name(origin)} cannot be loaded: {error}") from error
    finally:
        logging.set_verbosity(level)


def locate(checkpoint: str) -> Path:
    """The local folder of a network: as given, or downloaded.

    Raises: ConfigError if it is not there or cannot be downloaded, StorageError.
    """
    if storage.is_local(checkpoint):
        folder = Path(storage.normalize(checkpoint))
        if folder.is_dir():
            return folder
        if _HUB_NAME.fullmatch(checkpoint):
            return _from_hub(checkpoint)
        raise ConfigError(f"{_name(checkpoint)} is not a folder; {_what_to_do()}")
    return _from_uri(checkpoint)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        with contextlib.suppress(Exception):  # what is on this machine needs no network
            folder = Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=True))
            if not _missing(os.listdir(folder)):
                return folder
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    # A client that retries, many kinds of errors: of the connection, of HTTP, of the name, of the cache.
    except Exception as error:
        raise ConfigError(
            f"{_name(name)} is neither a folder nor can it be downloaded from Hugging Face: "
            f"{_first_line(error)}. {_how_to_get(name)}, then {_what_to_do()}"
        ) from error


def _from_uri(uri: str) -> Path:
    """A folder of links to the copies in the cache of `samray.sam.fetch`, named by what they link to."""
    names = [name for name in storage.list_names(uri) if name in (*FILES, *_PICKLED)]
    if not names:
        raise ConfigError(f"{_name(uri)} has none of a network's files; {_what_to_do()}")
    copies = {name: fetch.fetch_remote(storage.join(uri, name)) for name in names if name in FILES}
    if WEIGHTS not in copies:
        _refuse_without_weights(names, uri)
    key = hashlib.sha256("\n".join(f"{name} {path}" for name, path in sorted(copies.items())).encode()).hexdigest()
    folder = fetch.cache_dir() / "networks" / key[:16]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Filled apart, then renamed: other processes of this machine may do the same now.
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{key[:16]}."))
        for name, path in copies.items():
            (part / name).symlink_to(path.absolute())
        try:
            part.rename(folder)
        except OSError:  # another process was first
            for name in copies:
                (part / name).unlink()
            part.rmdir()
    return folder


def _check_files(folder: Path, checkpoint: str) -> None:
    names = os.listdir(folder)
    if WEIGHTS not in names:
        _refuse_without_weights(names, checkpoint)
    if missing := _missing(names):
        raise ConfigError(f"{_name(checkpoint)} does not have {' and '.join(missing)}; {_what_to_do()}")


def _missing(names: list[str]) -> list[str]:
    return [" or ".join(files) for files in _NEEDED if not any(name in names for name in files)]


def _refuse_without_weights(names: list[str], checkpoint: str) -> None:
    pickled = [name for name in _PICKLED if name in names]
    if pickled:
        raise ConfigError(
            f"{_name(checkpoint)} has {pickled[0]}, but not {WEIGHTS}. Pickled weights can run code and are not "
            "loaded; convert them where you trust them: load the network with transformers and call "
            "save_pretrained(FOLDER), which writes safetensors"
        )
    convert = ""
    if storage.is_local(checkpoint) and not Path(storage.normalize(checkpoint)).is_dir():  # a name on the Hub
        convert = ". If the Hub has it as pickled weights alone, load it with transformers where you trust it and call "
        convert += "save_pretrained(FOLDER), which writes safetensors"
    raise ConfigError(f"{_name(checkpoint)} does not have {WEIGHTS}; {_what_to_do()}{convert}")


def _check_settings(folder: Path, checkpoint: str, kinds: tuple[str, ...], way: str) -> None:
    try:
        settings = parse_json((folder / "config.json").read_bytes())
        kind = settings.get("model_type") if isinstance(settings, dict) else None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_name(checkpoint)}: config.json cannot be read: {error}") from error
    if kind not in kinds:
        raise ConfigError(
            f"{_name(checkpoint)} is a network of the kind {kind!r} (model_type in config.json), but labels.by={way} "
            f"needs {' or '.join(map(repr, kinds))}"
        )
    if (key := _names_code(settings)) is not None:
        raise ConfigError(
            f"{_name(checkpoint)}: config.json has {key}, which names code to download; samray runs no code that comes "
            "with a network. Remove the entry if the network is one of transformers' own"
        )


def _check_whole(folder: Path, checkpoint: str) -> None:
    """Refuse files that are cut off, or Git LFS's pointers in their place: the actors would find out after OUTPUT was
    begun with their digest. Reads no weights. Raises: ConfigError."""
    from safetensors import SafetensorError, safe_open

    for path in (folder / name for name in FILES):
        try:
            if path.name == WEIGHTS:
                with safe_open(path, framework="numpy"):  # its header fits the size of the file
                    pass
            elif path.suffix == ".json" and path.is_file():
                parse_json(path.read_bytes())
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(
                f"{_name(checkpoint)}: {path.name} cannot be read: {error}. Its download is incomplete, or it is a "
                "pointer of Git LFS (git lfs pull gets the file): get it again"
            ) from error


def _names_code(settings: Any) -> str | None:
    """The key of an entry with which transformers would fetch code: its own classes, or kernels from the Hub."""
    if isinstance(settings, list):
        return next((key for part in settings if (key := _names_code(part)) is not None), None)
    if not isinstance(settings, dict):
        return None
    for key, value in settings.items():
        # A repository `owner/name` in place of `eager` or `sdpa`.
        if key == "auto_map" or (key.strip("_").startswith("attn_implementation") and "/" in str(value)):
            return str(key)
        if (inner := _names_code(value)) is not None:
            return inner
    return None


def _name(checkpoint: str) -> str:
    return f"{SETTING} {storage.redact(checkpoint)}"


def _how_to_get(name: str) -> str:
    page = f"https://huggingface.co/{name}"
    return f"See {page}. {_GATED[name]}; or get its files" if name in _GATED else f"Get the files of {page} elsewhere"


def _what_to_do() -> str:
    return (
        f"set {SETTING} to a folder, a path or URI that all machines read, with config.json, {WEIGHTS}, "
        "preprocessor_config.json or processor_config.json, and tokenizer.json, vocab.json or vocab.txt"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
