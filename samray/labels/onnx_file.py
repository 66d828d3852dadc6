"""Networks in ONNX files (extra `fastsam`): find them, identify them by content, open them in onnxruntime.

The file is local or on any fsspec URI, from which it is downloaded once per machine. onnxruntime gets its bytes, not
its path, and only after `samray.labels.onnx_graph` has checked them, so no other file is read. What a graph may
allocate is bounded.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import psutil
import torch

from samray import storage
from samray.errors import ConfigError, NotFoundError
from samray.labels.networks import Network
from samray.labels.onnx_graph import problem_of
from samray.sam import fetch
from samray.sam.weights_file import local_weights_file

MAX_BYTES: Final = 2**31 - 1
"""The largest file that ONNX, as protobuf, allows without other files."""
_MEMORY_SHARE: Final = 0.5
"""Share of the machine's memory that all graphs of a process may use."""
_PICKLES: Final = (b"PK\x03\x04", b"\x80\x02")
"""How torch.save's files begin: now, and before PyTorch 1.6."""
_OF_NO_MEMORY: Final = ("is smaller than requested bytes", "Failed to allocate memory", "bad allocation", "bad_alloc")

Array = npt.NDArray[np.float32]


def require_onnxruntime(way: str) -> None:
    """Raises: ConfigError if onnxruntime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise ConfigError(f"labels.by={way} needs the package onnxruntime: pip install 'samray[fastsam]'")


def find_onnx(checkpoint: str, setting: str, export: str) -> Network:
    """Locate an ONNX file, download it if needed, and check that it is a plain graph.

    checkpoint: a path or URI. setting: its name in messages. export: the command that exports such a file.
    Raises: ConfigError, StorageError.
    """
    name = f"{setting} {storage.redact(checkpoint)}"
    if not storage.is_local(checkpoint):
        try:
            _check_size(storage.file_size(checkpoint) or 0, name)  # before it is downloaded
        except NotFoundError as error:
            raise ConfigError(f"{setting}: {error}") from error
    elif Path(storage.normalize(checkpoint)).is_dir():
        raise ConfigError(f"{name} is a folder; name the file in it that ends in .onnx")
    path = local_weights_file(checkpoint, setting)
    _check_size(path.stat().st_size, name)
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(_PICKLES):
        raise ConfigError(
            f"{name} is a pickled PyTorch file, which can run code when it is loaded, so samray does not; export it to "
            f"ONNX where you trust it: {export}"
        )
    if (problem := problem_of(path.read_bytes())) is not None:
        raise ConfigError(f"{name} {problem}; export the network again: {export}")
    # A relative path means another file where the actors run.
    return Network(str(path.absolute()) if storage.is_local(checkpoint) else checkpoint, fetch.file_sha256(path))


def _check_size(num_bytes: int, name: str) -> None:
    if num_bytes > MAX_BYTES:
        raise ConfigError(f"{name} has {num_bytes:,} bytes, expected at most {MAX_BYTES:,}, the limit of ONNX")


class OnnxNetwork:
    """A network with one input (1, 3, H, W) in onnxruntime. Several threads may use it at once."""

    def __init__(self, network: Network, setting: str, device: torch.device) -> None:
        """setting: the file's name in messages. device: where it runs; on a GPU that needs onnxruntime-gpu.

        Raises: ConfigError if this machine has another file than the driver found, or onnxruntime cannot load it.
        """
        path = local_weights_file(network.checkpoint, setting)
        self.name = f"{setting} {storage.redact(network.checkpoint)}"
        with fetch.unchanged(path, network.sha256):
            data = path.read_bytes()
        self.session = _session(data, self.name, device)
        if device.type == "cuda" and _CUDA not in self.session.get_providers():
            raise ConfigError(
                f"{self.name} cannot run on {device}, because the installed onnxruntime has no CUDA or does not find "
                "it; install onnxruntime-gpu in its place, or set model.device=cpu"
            )
        self.inputs: list[Any] = self.session.get_inputs()

    def run(self, pixels: Array) -> list[Array]:
        """All outputs, in the file's order, for one input (1, 3, H, W) float32.

        Raises: MemoryError if the graph needs more than it may, RuntimeError if it fails otherwise.
        """
        try:
            return list(self.session.run(None, {self.inputs[0].name: pixels}))
        except Exception as error:  # onnxruntime's own classes, which have no base of theirs
            text = " ".join(str(error).split())
            if any(words in text for words in _OF_NO_MEMORY):
                raise MemoryError(f"onnxruntime: {text[-300:]}") from error
            # As PyTorch says it: after such a failure the process cannot use the GPU any more.
            lost = "CUDA error: " if "CUDA failure" in text else ""
            raise RuntimeError(f"{lost}onnxruntime: {text[:300]}") from error


_CUDA: Final = "CUDAExecutionProvider"


def _session(data: bytes, name: str, device: torch.device) -> Any:
    import onnxruntime

    _limit_memory()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised as well; warnings of the graph are not the user's
    options.add_session_config_entry("session.use_env_allocators", "1")
    # On a CPU each thread of the labeler has an image of its own, see `ShardLabeler`.
    options.intra_op_num_threads = 1 if device.type == "cpu" else 0
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and _CUDA in onnxruntime.get_available_providers():
        providers.insert(0, (_CUDA, {"device_id": device.index or 0}))
    try:
        # Its fallback would try the same again, and print.
        return onnxruntime.InferenceSession(data, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's own classes, which have no base of theirs
        raise ConfigError(f"{name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


@functools.cache
def _limit_memory() -> None:
    """Bound what all graphs of this process allocate on the CPU."""
    import onnxruntime

    where = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    limit = int(psutil.virtual_memory().total * _MEMORY_SHARE)
    # 1: allocate what is asked for, instead of the next power of two.
    arena = onnxruntime.OrtArenaCfg({"max_mem": limit, "arena_extend_strategy": 1})
    onnxruntime.create_and_register_allocator(where, arena)
