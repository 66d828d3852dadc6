"""A stand-in for a GPU: a device that is not "cpu", whose tensors are kept and computed on the CPU.

samray then takes the code paths of a GPU, and every operation on the device passes one place, where it is counted and
timed: what is left of the time is the host's. Kernels are those operations that compute or copy; views are none. A
synchronisation is an operation after which the host has to wait for the queued work: values that come to the host,
shapes that depend on values, and copies from the host's pageable memory without `non_blocking`.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE: Final = torch.device("meta")
"""torch was built without any other device that needs no hardware."""

_freed: list[Tensor] = []
"""Memory of tensors that are gone: given back within the next operation, because a device's costs the host nothing."""

_OF_SHAPES: Final = {"nonzero", "nonzero_numpy", "masked_select", "unique_dim", "_unique2", "equal"}
"""Operations whose result's shape depends on values."""
_ENTRIES: Final = 2000
_OF_VALUES: Final = {"item", "_local_scalar_dense", "is_nonzero"}


class OnDevice(Tensor):
    """A tensor of the stand-in. `on_cpu` has the values."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        wrapped: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        wrapped.on_cpu = inner
        return wrapped

    def __del__(self) -> None:
        _freed.append(self.on_cpu)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} outside of DeviceStandIn")


class DeviceStandIn(TorchDispatchMode):
    """Within it, in this thread, tensors can be put on `DEVICE`."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """around: entered for each operation on the device."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._clock = clock
        self._around = around
        self.seconds = 0.0
        """Time of the operations on the device, including the time to count them."""
        self.operations = 0
        """Kernels and views."""
        self.kernels = 0
        self.syncs: Counter[str] = Counter()
        """Name of the operation -> number of synchronisations."""

    def __enter__(self) -> DeviceStandIn:
        self._autocast, self._tensor = torch.autocast, torch.tensor
        # One refuses device types that it does not know; the stand-in is never cast. The other drops the values.
        torch.autocast = lambda kind, **how: (  # type: ignore[misc, assignment]
            contextlib.nullcontext() if kind == DEVICE.type else self._autocast(kind, **how)
        )
        torch.tensor = lambda data, device=None, **how: self._tensor(data, **how).to(device)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.autocast, torch.tensor = self._autocast, self._tensor  # type: ignore[misc]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = self._clock()
        with self._around():
            _freed.clear()
            until_freed = self._clock()
            out, is_on_device = self._run(func, args, dict(kwargs or {}))
        self.seconds += (self._clock() if is_on_device else until_freed) - start
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, bool]:
        """The result, and whether it is an operation on the device."""
        leaves = tree_leaves((args, kwargs))
        is_from_device = any(isinstance(leaf, OnDevice) for leaf in leaves)
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(wanted)
        is_to_device = is_from_device if wanted is None else wanted == DEVICE
        if wanted == DEVICE:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs))
        if not (is_from_device or is_to_device):
            return out, False
        self._count(func, leaves, is_from_device, is_to_device, bool(kwargs.get("non_blocking")))
        if is_to_device:
            out = tree_map(lambda each: OnDevice(each) if isinstance(each, Tensor) else each, out)
        return out, True

    def _count(self, func: Any, leaves: list[Any], is_from: bool, is_to: bool, non_blocking: bool) -> None:
        name = func._schema.name.removeprefix("aten::")
        self.operations += 1
        self.kernels += not func.is_view
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        crosses = bool(tensors) and (is_from != is_to or (name == "copy_" and not isinstance(tensors[-1], OnDevice)))
        if crosses and not (is_to and non_blocking):
            self.syncs["to the device" if is_to else "to the host"] += 1
        elif name in _OF_SHAPES | _OF_VALUES:
            self.syncs[name] += 1
        elif name in ("index", "index_put_") and any(leaf.dtype == torch.bool for leaf in tensors[1:]):
            self.syncs["index by booleans"] += 1


def seconds_to_enter() -> float:
    """Time that an operation takes on its way to the stand-in, which is not counted as the device's."""
    with torch.inference_mode(), DeviceStandIn(time.thread_time) as device:
        one = torch.zeros(1, device=DEVICE)
        before = device.seconds
        start = time.thread_time()
        for _ in range(_ENTRIES):
            torch.neg(one)
        return (time.thread_time() - start - (device.seconds - before)) / _ENTRIES


def to_device(model: nn.Module) -> nn.Module:
    """Put the weights of a model on the stand-in, in place."""
    for module in model.modules():
        for weights in (module._parameters, module._buffers):
            for name, weight in weights.items():
                if weight is not None:
                    weights[name] = OnDevice(weight.detach())  # type: ignore[assignment]
    return model


def _unwrapped(value: Any) -> Any:
    return value.on_cpu if isinstance(value, OnDevice) else value
