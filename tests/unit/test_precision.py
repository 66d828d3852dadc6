"""What numbers a GPU would compute in, by torch's own switches."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from samray.sam import precision
from samray.sam.precision import auto_dtype, exact_convolutions
from samray.sam.sam import Sam, to_device
from samray.sam.spec import MODELS

CUDA, CPU = torch.device("cuda"), torch.device("cpu")

by_name = pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"),
    reason="exact convolutions are NOT tested, for this torch has no switch of theirs: pip install 'torch>=2.9'",
)


@pytest.fixture
def products_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine's environment says (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE)."""
    monkeypatch.setattr(precision, "products_in_tf32", lambda: False)


def convolutions() -> str:
    return str(torch.backends.cudnn.conv.fp32_precision)


def test_auto_is_bfloat16_where_a_gpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert auto_dtype(CPU) == torch.float32
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, version=capability: version)
        assert auto_dtype(CUDA) == dtype


@by_name
@pytest.mark.usefixtures("products_are_exact")
@pytest.mark.parametrize("device", [CUDA, CPU])
def test_convolutions_of_an_encoder_on_a_gpu_are_exact(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    sam, seen = Sam(MODELS["tiny"]).eval(), []
    monkeypatch.setattr(Sam, "device", device)
    monkeypatch.setattr(sam.image_encoder, "forward", lambda pixels: seen.append(convolutions()) or pixels)
    before = convolutions()
    sam.encode_images(torch.zeros(1))
    assert seen == ["ieee" if device == CUDA else before]
    assert convolutions() == before != "ieee"
    with pytest.raises(KeyError), exact_convolutions(CUDA):
        raise KeyError
    assert convolutions() == before


@by_name
@pytest.mark.usefixtures("products_are_exact")
def test_of_several_threads_the_last_one_switches_back() -> None:
    before, inside, first_is_out = convolutions(), threading.Barrier(2), threading.Event()
    seen: list[str] = []

    def second() -> None:
        with exact_convolutions(CUDA):
            inside.wait(30)
            first_is_out.wait(30)
            seen.append(convolutions())

    thread = threading.Thread(target=second)
    with exact_convolutions(CUDA):
        thread.start()
        inside.wait(30)
    first_is_out.set()
    thread.join()
    assert seen == ["ieee"]
    assert convolutions() == before


@pytest.mark.slow
@by_name
@pytest.mark.parametrize(
    ("choice", "allowed"),
    [
        ("pass", False),
        ("torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("torch.set_float32_matmul_precision('high')", True),
        ("torch.backends.fp32_precision = 'tf32'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", False),
    ],
)
def test_whoever_allows_tf32_has_it(choice: str, allowed: bool) -> None:
    """In a process of its own: torch lets nobody go back from its newer switches to the older ones."""
    code = f"""
import torch
{choice}
from samray.sam.precision import exact_convolutions, products_in_tf32
assert products_in_tf32() == {allowed}
before = torch.backends.cudnn.conv.fp32_precision
with exact_convolutions(torch.device("cuda")):
    assert torch.backends.cudnn.conv.fp32_precision == (before if {allowed} else "ieee")
assert torch.backends.cudnn.conv.fp32_precision == before
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_copies_to_mps_are_waited_for() -> None:
    """torch reads the host's memory later, when it may be another tensor's."""
    copies: list[tuple[str, bool]] = []

    class Recorder:
        def to(self, device: torch.device, non_blocking: bool) -> None:
            copies.append((device.type, non_blocking))

    for name in ("cuda", "mps"):
        to_device(Recorder(), torch.device(name))  # type: ignore[arg-type]
    assert copies == [("cuda", True), ("mps", False)]
