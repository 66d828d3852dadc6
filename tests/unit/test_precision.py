"""What numbers a GPU would compute in, by torch's own switches."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from samray.precision import auto_dtype, exact_convolutions, products_in_tf32
from samray.sam.sam import Sam
from samray.sam.spec import MODELS


def test_auto_is_bfloat16_where_a_gpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert auto_dtype(torch.device("cpu")) == torch.float32
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert auto_dtype(torch.device("cuda")) == dtype


def test_convolutions_of_the_encoder_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    sam, seen = Sam(MODELS["tiny"]).eval(), []
    monkeypatch.setattr(
        sam.image_encoder, "forward", lambda pixels: seen.append(torch.backends.cudnn.conv.fp32_precision) or pixels
    )
    before = torch.backends.cudnn.conv.fp32_precision
    sam.encode_images(torch.zeros(1))
    assert seen == ["ieee"]
    assert torch.backends.cudnn.conv.fp32_precision == before != "ieee"
    with pytest.raises(KeyError), exact_convolutions():
        raise KeyError
    assert torch.backends.cudnn.conv.fp32_precision == before


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
from samray.precision import exact_convolutions, products_in_tf32
assert products_in_tf32() == {allowed}
before = torch.backends.cudnn.conv.fp32_precision
with exact_convolutions():
    assert torch.backends.cudnn.conv.fp32_precision == (before if {allowed} else "ieee")
assert torch.backends.cudnn.conv.fp32_precision == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_by_itself_rounds_no_products() -> None:
    assert not products_in_tf32()
