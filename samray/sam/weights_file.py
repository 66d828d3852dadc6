"""Locations and digests of the weights of a run, for a driver, without torch.

`samray.sam.checkpoints` reads them.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from samray import storage
from samray.config.base import did_you_mean
from samray.errors import ConfigError, NotFoundError, StorageError
from samray.sam import fetch
from samray.sam.spec import MODELS, ModelSpec

ADAPTER_SETTING: Final = "model.adapter"
ADAPTER_FILE: Final = "adapter.safetensors"
"""In the OUTPUT of a training."""
ADAPTER_FORMAT: Final = "samray-lora"
"""Value of `format` in an adapter's metadata."""

# In order of preference: safetensors cannot hold code.
_HF_FILES: Final = ("model.safetensors", "pytorch_model.bin")


class WeightsFile:
    """The weights of a run: located and hashed at most once each, on first use.

    name, checkpoint and adapter: as for `load_model`. Each step raises ConfigError if `load_model` would, and
    StorageError if the storage of a URI fails.
    """

    def __init__(
        self, name: str = "tiny", checkpoint: str | Path | None = None, adapter: str | Path | None = None
    ) -> None:
        self.name, self.checkpoint, self.adapter = name, checkpoint, adapter

    @cached_property
    def path(self) -> Path:
        """The local file, downloaded and verified if needed. The adapter's header is looked at before."""
        find_spec(self.name)
        if self.adapter is not None:
            read_adapter_header(self.adapter_path, self.name, self.known_sha256)
        return resolve_checkpoint(self.name, self.checkpoint)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 in hex: part of a run's identity."""
        spec, path = find_spec(self.name), self.path
        if self.checkpoint is None and spec.url is not None and spec.sha256 is not None:
            return spec.sha256  # resolving published weights has checked their hash
        return fetch.file_sha256(path)

    @property
    def known_sha256(self) -> str | None:
        """As `sha256`, without a download; None for weights of the user."""
        spec = find_spec(self.name)
        if self.checkpoint is not None or spec.gated is not None:
            return None
        path = local_weights(spec)
        return spec.sha256 if spec.url is not None or path is None else fetch.file_sha256(path)

    @cached_property
    def adapter_sha256(self) -> str | None:
        """SHA-256 in hex of the adapter, which is a part of a run's identity, too; None without one."""
        return None if self.adapter is None else fetch.file_sha256(self.adapter_path)

    @cached_property
    def adapter_path(self) -> Path:
        """The local file of the adapter; only with one."""
        return local_weights_file(str(self.adapter), ADAPTER_SETTING)

    @property
    def identity(self) -> dict[str, str]:
        """Both digests by their names in a run's identity; without an adapter only that of the weights."""
        digest = {} if self.adapter_sha256 is None else {"adapter_sha256": self.adapter_sha256}
        return {"checkpoint_sha256": self.sha256, **digest}

    @property
    def is_known(self) -> bool:
        """Whether the digest shows that these are the model's weights, so that nothing has to be read."""
        return self.checkpoint is None and self.adapter is None and self.sha256 == find_spec(self.name).sha256


def find_spec(name: str) -> ModelSpec:
    if name not in MODELS:
        raise ConfigError(f"model.name: {name!r} is not one of {', '.join(MODELS)}{did_you_mean(name, MODELS)}")
    return MODELS[name]


def resolve_checkpoint(name: str = "tiny", checkpoint: str | Path | None = None) -> Path:
    """The local file with this model's weights, downloaded and verified if needed.

    Raises ConfigError if there is none and it cannot be downloaded, StorageError if the storage of a URI fails.
    """
    spec = find_spec(name)
    if checkpoint is not None:
        return local_weights_file(str(checkpoint))
    if spec.gated is not None:
        return _user_supplied(spec)
    if spec.url is None:
        path = embedded_path(spec)
        if not path.is_file():
            raise ConfigError(
                f"the embedded weights {path} are missing: this installation of samray is incomplete, reinstall it or "
                "set model.checkpoint"
            )
        return path
    try:
        return fetch.fetch_published(spec.file_name, spec.url, spec.sha256, spec.size_mb)
    except StorageError as error:
        raise ConfigError(
            f"the weights of {name} are not on this machine and downloading them failed: {error}. Get {spec.url} "
            f"({spec.size_mb:,.0f} MB) elsewhere and copy it to {fetch.published_path(spec.file_name)}, or set "
            "model.checkpoint to a file or URI that this machine can read"
        ) from error


def _user_supplied(spec: ModelSpec) -> Path:
    """The file that the user put into the cache. Raises: ConfigError if there is none."""
    path = fetch.published_path(spec.file_name)
    if not path.is_file():
        raise ConfigError(
            f"the weights of {spec.name} are gated, and samray does not download them: get {spec.file_name} from "
            f"{spec.gated}, and set model.checkpoint to it or copy it to {path}"
        )
    return path


def local_weights(spec: ModelSpec) -> Path | None:
    """The published or embedded weights on this machine, not verified; None if they are not here."""
    is_embedded = spec.url is None and spec.gated is None
    path = embedded_path(spec) if is_embedded else fetch.published_path(spec.file_name)
    return path if path.is_file() else None


def embedded_path(spec: ModelSpec) -> Path:
    return Path(__file__).resolve().parents[1] / "weights" / spec.file_name


def local_weights_file(checkpoint: str, setting: str = "model.checkpoint") -> Path:
    """The local file of a path or URI. setting: its name in messages. Raises: ConfigError, StorageError."""
    if not storage.is_local(checkpoint):
        try:
            return fetch.fetch_remote(checkpoint)
        except NotFoundError as error:
            raise ConfigError(f"{setting}: {error}") from error
    path = Path(storage.normalize(checkpoint))
    if path.is_dir():
        names = (ADAPTER_FILE,) if setting == ADAPTER_SETTING else _HF_FILES
        for file_name in names:
            if (path / file_name).is_file():
                return path / file_name
        if any((path / f"{file_name}.index.json").is_file() for file_name in names):
            raise ConfigError(
                f"{setting}: the weights in the folder {path} are cut into several files, and samray reads one; save"
                ' them as one, with save_pretrained(FOLDER, max_shard_size="100GB") of transformers'
            )
        raise ConfigError(f"{setting}: the folder {path} has no {' and no '.join(names)}")
    if not path.is_file():
        raise ConfigError(f"{setting}: the file {path} does not exist")
    return path


def read_adapter_header(path: Path, model: str, base_sha256: str | None = None) -> dict[str, str]:
    """The metadata of an adapter's file. base_sha256: of the weights that it is for; None: not known yet.

    Raises: ConfigError if it is not an adapter, or one of another model, or one of other weights.
    """
    advice = f"`samray train train.trainable=lora` writes one, {ADAPTER_FILE}"
    try:
        with safe_open(path, framework="np") as file:
            info: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{ADAPTER_SETTING}: {path} is not an adapter: {error}; {advice}") from error
    if info.get("format") != ADAPTER_FORMAT:
        raise ConfigError(f"{ADAPTER_SETTING}: {path} is not an adapter; {advice}")
    if missing := [key for key in ("model", "base_sha256", "scale") if key not in info]:
        raise ConfigError(
            f"{ADAPTER_SETTING}: {path} is damaged, or of another version of samray: its metadata have no {missing[0]};"
            " copy it again, or train it again"
        )
    if info["model"] != model:
        name = info["model"][:64]
        raise ConfigError(
            f"{ADAPTER_SETTING}: {path} adapts {name}, not {model}: set model.name={name}, or {ADAPTER_SETTING} to one"
            f" of {model}"
        )
    if base_sha256 is not None and info["base_sha256"] != base_sha256:
        raise ConfigError(
            f"{ADAPTER_SETTING}: {path} was trained on other weights of {model}: their SHA-256 is"
            f" {info['base_sha256'][:64]}, that of these is {base_sha256}; set model.checkpoint to the weights that it"
            " was trained on"
        )
    return info
