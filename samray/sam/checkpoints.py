"""Load a Sam from a model's name or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from samray.errors import ConfigError
from samray.sam import adapter as adapters
from samray.sam import fetch
from samray.sam.formats import FLOATS, StateDict, is_within, read_state_dict
from samray.sam.precision import auto_dtype
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, ModelSpec
from samray.sam.text_projection import CLIP_SHA256, PREFIX, TextProjection, projection_shapes
from samray.sam.weights_file import (
    ADAPTER_SETTING,
    WeightsFile,
    find_spec,
    local_weights,
    local_weights_file,
    resolve_checkpoint,
)

if TYPE_CHECKING:
    from samray.config import ModelConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NOT_NEEDED = ".num_batches_tracked"  # a training counter; files without it are complete
_INTEGERS = (_NOT_NEEDED, CLIP_SHA256)  # ends of the names of tensors that are not floats


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRow:
    """A line of `samray models`."""

    name: str
    parameters: int
    size_mb: float
    licence: str
    source: str
    url: str | None
    file_name: str
    gated: str | None
    """Page where the user gets the file, which samray does not download."""
    verified_by: str
    """How the published file is verified: SHA-256, or size and keys; only keys for a file that the user supplies."""
    present: Path | None
    """Path of its weights on this machine (not verified), or None."""


def load_model(
    name: str = "tiny",
    checkpoint: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    sha256: str | None = None,
    adapter: str | Path | None = None,
    adapter_sha256: str | None = None,
) -> Sam:
    """Load a Sam in evaluation mode, without gradients for its parameters.

    name: a row of MODELS. checkpoint: a file, a Hugging Face folder or any fsspec URI; None means the published
    weights, downloaded once per node, or for `tiny` the embedded ones. device: None uses a GPU if there is one.
    dtype: float32 (the default), bfloat16, float16, or `auto`, which is bfloat16 on a GPU and float32 elsewhere.
    sha256: expected digest of the weights file, in hex; None accepts any. adapter: a file or URI of a LoRA adapter,
    which is merged into the weights that it was trained on; adapter_sha256: as sha256.

    Raises ConfigError if the model, the file or its keys are not as expected, StorageError if the storage of a URI
    fails.
    """
    spec = find_spec(name)
    chosen_device = choose_device(device)
    chosen_dtype = _dtype(dtype, chosen_device)
    path = WeightsFile(name, checkpoint, adapter).path
    # The file is read twice, to hash and to load. If it is replaced in between, neither is valid.
    with fetch.unchanged(path, sha256):
        # On the CPU first: keys and shapes are checked before any GPU memory is used.
        model = build(spec, read_state_dict(path), str(path))
        base_sha256 = "" if adapter is None else fetch.file_sha256(path)
    if adapter is not None:
        adapter_path = local_weights_file(str(adapter), ADAPTER_SETTING)
        with fetch.unchanged(adapter_path, adapter_sha256):
            lora = adapters.read_adapter(adapter_path, name, base_sha256)
        lora.check(name, _shapes(spec))
        lora.merge(model)
    return model.to(chosen_device).cast_image_side(chosen_dtype)


def load_configured(settings: ModelConfig) -> Sam:
    """`load_model` with the settings of `model`."""
    return load_model(settings.name, settings.checkpoint, settings.device, settings.dtype, adapter=settings.adapter)


def build(spec: ModelSpec, state: Mapping[str, Tensor], origin: str) -> Sam:
    """Build a float32 Sam on the CPU with these weights (Meta's names, any float dtype), as returned by `load_model`.

    Raises ConfigError that names missing, unexpected or misshapen keys; origin: the file's name in messages.
    """
    _refuse_misfit(spec, state, origin)
    # Random initial values would be overwritten at once.
    with _NoInit():
        model = Sam(spec)
        if projection_shapes(state, spec.embed_dim):
            clip_dim = state[f"{PREFIX}weight"].shape[1]
            model.prompt_encoder.text_projection = TextProjection(clip_dim, spec.embed_dim)
    # Copied, not assigned: converts half-precision files to float32, and does not keep the file mapped.
    model.load_state_dict(dict(state), strict=False)
    return model.eval().requires_grad_(False)


def check_checkpoint(name: str = "tiny", checkpoint: str | Path | None = None) -> None:
    """Check a model's weights without building the model. Raises ConfigError if `load_model` would."""
    check_weights(WeightsFile(name, checkpoint))


def check_weights(weights: WeightsFile) -> None:
    """Check weights and adapter without building the model. Raises ConfigError if `load_model` would."""
    if weights.is_known:
        return
    spec, path = find_spec(weights.name), weights.path
    _refuse_misfit(spec, read_state_dict(path), str(path))
    if weights.adapter is not None:
        check_adapter(weights, fetch.file_sha256(path))


def check_adapter(weights: WeightsFile, base_sha256: str | None) -> None:
    """Check an adapter, but not its base weights. base_sha256: theirs, if known. Raises: ConfigError, StorageError."""
    lora = adapters.read_adapter(weights.adapter_path, weights.name, base_sha256)
    lora.check(weights.name, _shapes(find_spec(weights.name)))


def _refuse_misfit(spec: ModelSpec, state: Mapping[str, Tensor], origin: str) -> None:
    """Raises: ConfigError if the weights are not this model's."""
    family = state.family if isinstance(state, StateDict) else None
    expected = _expected(spec, state)
    problems = key_problems(expected, state)
    if not problems and family in (None, spec.family):
        if problems := value_problems(expected, state):
            raise ConfigError(f"{origin} is damaged, or of a training that diverged: {'; '.join(problems)}")
        return
    if adapters.is_adapter(state):
        raise ConfigError(f"{origin} is a LoRA adapter, not weights: set {ADAPTER_SETTING} to it")
    # The file may be another model's: look for the one that it fits, for the message.
    fits = [
        other
        for other in MODELS.values()
        if other is not spec and family in (None, other.family) and not key_problems(_expected(other, state), state)
    ]
    family = fits[0].family if fits else family
    if family not in (None, spec.family):
        other_model = f"model.name={fits[0].name}, or " if fits else ""
        raise ConfigError(
            f"{origin} has weights of {family}{f' ({fits[0].name})' if fits else ''}, not of {spec.family} "
            f"({spec.name}): set {other_model}model.checkpoint to a file of {spec.family}"
        )
    hint = f" It fits {' and '.join(other.name for other in fits)}: set model.name={fits[0].name}." if fits else ""
    raise ConfigError(f"{origin} does not fit {spec.name}: {'; '.join(problems)}.{hint}")


def read_clip_sha256(name: str = "tiny", checkpoint: str | Path | None = None) -> str | None:
    """SHA-256 (hex) of the CLIP for which these weights have a text projection; None if they have none.

    Raises: as `resolve_checkpoint` and `read_state_dict`.
    """
    if checkpoint is None:
        return None  # neither published nor embedded weights have one: nothing is downloaded to find out
    path = resolve_checkpoint(name, checkpoint)
    state = read_state_dict(path)
    if not projection_shapes(state, find_spec(name).embed_dim):
        return None
    _refuse_misfit(find_spec(name), state, str(path))
    return bytes(state[CLIP_SHA256].to(torch.uint8).tolist()).hex()


def _expected(spec: ModelSpec, state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint for this model, with those of a text projection if state has any of them."""
    return _shapes(spec) | projection_shapes(state, spec.embed_dim)


def checkpoint_sha256(name: str = "tiny", checkpoint: str | Path | None = None) -> str:
    """SHA-256 (hex) of the weights file: part of a run's identity. Cached for large unchanged files."""
    return WeightsFile(name, checkpoint).sha256


def list_models() -> list[ModelRow]:
    """Every known model and whether its weights are on this machine."""
    rows = []
    for spec in MODELS.values():
        path = local_weights(spec)
        rows.append(
            ModelRow(
                name=spec.name,
                parameters=_num_parameters(spec),
                size_mb=spec.size_mb if path is None else path.stat().st_size / 1e6,
                licence=spec.licence,
                source=spec.source,
                url=spec.url,
                file_name=spec.file_name,
                gated=spec.gated,
                verified_by=_verified_by(spec),
                present=path,
            )
        )
    return rows


def _verified_by(spec: ModelSpec) -> str:
    """How a published file is verified; "" for weights that are embedded."""
    if spec.gated is not None:
        return "keys"
    return "" if spec.url is None else "size and keys" if spec.sha256 is None else "SHA-256"


def check_device(device: str | None, *, here: bool = True) -> None:
    """Raises: ConfigError if device is not available; here: on this machine, else if it is invalid anywhere."""
    if device is not None:
        choose_device(device) if here else _parse_device(device)


def _parse_device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        # torch accepts names of backends that this build lacks; only an allocation shows it. `meta` has no data.
        if chosen.type in ("cpu", "cuda") or torch.empty(0, device=chosen).device.type != "meta":
            return chosen
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ConfigError(
            f"model.device: {device!r} is not a device of this PyTorch, expected cpu, cuda or cuda:N"
        ) from error
    raise ConfigError(f"model.device: {device!r} cannot compute, expected cpu, cuda or cuda:N")


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None: a GPU if there is one. Raises: ConfigError if it is not available."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = _parse_device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"model.device: {device} is not available: PyTorch sees {torch.cuda.device_count()} GPUs")
    return chosen


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return auto_dtype(device)
    if dtype is None:
        return torch.float32
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _DTYPES.values():
        raise ConfigError(f"model.dtype: {dtype!r} is not one of auto, {', '.join(_DTYPES)}")
    return chosen


class _NoInit(TorchFunctionMode):
    """Leaves new parameters uninitialized, because all of them are filled from the checkpoint."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An initialiser returns the tensor that it was given, here unchanged.
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


@cache
def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The expected tensors of a checkpoint for this model."""
    # On the meta device nothing is allocated, however large the model.
    with torch.device("meta"), _NoInit():
        return {key: tuple(value.shape) for key, value in Sam(spec).state_dict().items()}


@cache
def _num_parameters(spec: ModelSpec) -> int:
    with torch.device("meta"), _NoInit():
        return sum(parameter.numel() for parameter in Sam(spec).parameters())


def key_problems(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> list[str]:
    """Clauses about missing, unexpected, misshapen and mistyped keys; [] if there are none."""
    missing = [key for key in expected if key not in state and not key.endswith(_NOT_NEEDED)]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} is {tuple(state[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    mistyped = [
        f"{key} is {str(state[key].dtype).removeprefix('torch.')}"
        for key in expected
        if key in state and state[key].dtype not in FLOATS and not key.endswith(_INTEGERS)
    ]
    return [
        *_clause("missing key", missing),
        *_clause("unexpected key", unexpected),
        *_clause("misshapen key", misshapen),
        *_clause("mistyped key", mistyped, end=" (not float32, float16, bfloat16 or float64)"),
    ]


def value_problems(expected: Iterable[str], state: Mapping[str, Tensor]) -> list[str]:
    """A clause about tensors with NaN or infinity; [] if there are none. state: without `key_problems`."""
    # Only what is loaded: other tensors of a file, masks of an attention for example, may well be infinite.
    broken = [key for key in expected if key in state and not key.endswith(_INTEGERS) and not is_within(state[key])]
    return _clause("key", broken, end=" with values that are not finite")


def _clause(what: str, keys: Iterable[str], shown: int = 3, end: str = "") -> list[str]:
    """`2 missing keys: a, b`, with at most the first few names; [] if there are none."""
    keys = list(keys)
    if not keys:
        return []
    more = ", ..." if len(keys) > shown else ""
    return [f"{len(keys)} {what}{'s' if len(keys) > 1 else ''}{end}: {', '.join(keys[:shown])}{more}"]
