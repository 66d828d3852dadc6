"""Imports run one way, and `import samray` stays light."""

from __future__ import annotations

import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest
from PIL import Image

import samray
from samray.cluster import gpus
from samray.cluster.gpus import num_gpus

ROOT = Path(samray.__file__).resolve().parent


def test_imports_run_one_way() -> None:
    """The contracts of import-linter in pyproject.toml: layers without cycles, and ray only where work is spread."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = grimp.build_graph("samray", exclude_type_checking_imports=True, cache_dir=None)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert list(TopologicalSorter(imported).static_order())  # raises CycleError, which names the circle


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(done.stdout.splitlines()[-1].split())


def test_import_samray_is_light() -> None:
    assert not loaded_by("import samray") & {"torch", "ray", "numpy", "pyarrow", "pydantic"}


def test_help_is_light() -> None:
    commands = "[], ['label'], ['demo'], ['evaluate'], ['evaluate', 'points']"
    code = f"from samray.cli.main import main\nfor a in ({commands}): assert main([*a, '--help']) == 0"
    assert not loaded_by(code) & {"torch", "ray", "numpy", "pyarrow", "pandas", "fsspec", "scipy", "jinja2"}


def test_sections_and_masks_need_no_torch() -> None:
    assert not loaded_by("import samray; samray.MaskConfig(); samray.load_config('sa1b')") & {"torch", "ray", "pyarrow"}


def test_a_driver_needs_no_torch(tmp_path: Path) -> None:
    """Importing it takes a second of a core. The embedded weights are known by their digest."""
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    code = f"""
from samray.cli.plan_view import print_plan
from samray.cluster.session import this_machine
from samray.config import Config
from samray.pipeline.plan_run import plan_run
import samray.pipeline.edges, samray.pipeline.embed, samray.pipeline.label_from, samray.pipeline.naming
print_plan(plan_run({str(tmp_path / "in")!r}, {str(tmp_path / "out")!r}, Config()))
this_machine()
"""
    assert "torch" in loaded_by(code) if num_gpus() else "torch" not in loaded_by(code)


def test_a_gpu_is_looked_for_if_there_is_a_driver_of_one(tmp_path: Path) -> None:
    for name in ("null", "nvme0n1", "nvram"):
        (tmp_path / name).touch()
    assert gpus._may_have_gpu(tmp_path) == (sys.platform != "linux")
    for name in ("nvidia0", "nvidiactl", "kfd", "dxg", "nvhost-gpu"):
        (tmp_path / name).touch()
        assert gpus._may_have_gpu(tmp_path)
        (tmp_path / name).unlink()


def test_a_model_is_loaded_without_torchs_compiler() -> None:
    """It and sympy take longer to import than the embedded model takes to load, in every process that labels."""
    assert "sympy" not in loaded_by("from samray.sam.checkpoints import *; load_model('tiny'); list_models()")


def test_public_names_resolve() -> None:
    assert sorted(samray.__all__) == sorted(samray._HOMES)
    assert set(samray.__all__) <= set(dir(samray))
    for name in samray.__all__:
        assert getattr(samray, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        samray.no_such_name  # noqa: B018
