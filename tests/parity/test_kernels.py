"""The Triton kernels: when they are used, that they compile for GPUs, and (`kernel_checks.py`) what they compute."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from samray.errors import ConfigError
from samray.sam.kernels import MAX_TOKENS, enabled

CHECKS = Path(__file__).with_name("kernel_checks.py")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALLEST_SHARED_BYTES = 99 * 1024
"""What a block may have of the GPUs since Ampere, the consumers' included."""

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed, so NOTHING of the kernels is tested: pip install 'samray[test]' (on Linux)",
)


def run_checks(**environment: str) -> None:
    """In a fresh process: whether triton interprets is settled when it is imported, by whichever test that was."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "SAMRAY_"))}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(command, env=outer | environment, capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-5000:])
    assert done.returncode == 0
    for line in done.stdout.splitlines():
        if line.startswith("SKIPPED"):  # seen in the summary of this run, whose process is another
            warnings.warn(line, stacklevel=2)


@needs_triton
def test_kernels_in_the_interpreter() -> None:
    run_checks(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernels are interpreted and compiled, NOT run")
def test_kernels_on_a_gpu() -> None:
    run_checks()


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed to compile for one; the interpreter takes much that the compiler does not."""
    from samray.sam.kernels import image_to_tokens, measure

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"logits": "*fp32", "figures": "*i32", "low_scale_y": "fp32", "low_scale_x": "fp32", "scale_y": "fp32"}
    types |= {"scale_x": "fp32", "lower": "fp32", "threshold": "fp32", "upper": "fp32"}
    sizes = {"FIELDS": 7, "BLOCK_H": measure.BLOCK_HW[0], "BLOCK_W": measure.BLOCK_HW[1]}
    compile_for(capability, measure.kernel, types, sizes, measure.LAUNCH)
    pointers = ("keys", "queries", "heads", "absorbed", "folded", "norm_weight", "norm_bias", "out")
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        types = dict.fromkeys(pointers, f"*{name}") | {"eps": "fp32"}
        for num_tokens, absorbed in ((7, False), (7, True), (MAX_TOKENS, True)):
            sizes = image_to_tokens.kernel_sizes(8, num_tokens, 16, 256, dtype)
            options = {"ABSORBED": absorbed, "PRECISION": "tf32x3"}
            compile_for(capability, image_to_tokens.kernel, types, sizes | options, image_to_tokens.LAUNCH)


def compile_for(
    capability: int, kernel: object, types: dict[str, str], constants: dict[str, object], launch: dict[str, int]
) -> None:
    """types: of pointers and floats; other arguments are integers. Raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch))
    assert compiled.metadata.shared <= SMALLEST_SHARED_BYTES
    assert compiled.asm["cubin"]


def test_kernels_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for value, on in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("SAMRAY_TRITON", value)
        assert enabled(GPU) is on
        assert not enabled(CPU)
        assert not enabled(torch.device("mps"))
    monkeypatch.delenv("SAMRAY_TRITON")
    assert not enabled(GPU)
    monkeypatch.setenv("SAMRAY_TRITON", "yes")
    with pytest.raises(ConfigError, match="SAMRAY_TRITON must be 0 or 1; got 'yes'"):
        enabled(GPU)


def test_kernels_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("SAMRAY_TRITON", "1")
    assert not enabled(CPU)
    with pytest.raises(ConfigError, match="pip install triton"):
        enabled(GPU)
