"""Imports run one way, ray stays in its two packages, and `import samray` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import samray

ROOT = Path(samray.__file__).resolve().parent

LAYERS = [
    {"errors", "precision", "scene_paint", "strict_json"},
    {"settings", "strict_yaml", "tiff"},
    {"config", "image_kinds", "prompts"},
    {"cli_help", "figures", "images", "kernels", "scenes", "storage"},
    {"sam"},
    {"dataset", "masks"},
    {"evaluate"},
    {"overlays", "pipeline"},
    {"train"},
    {"plan_view", "report_page", "status_view"},
    {"report", "train_report"},
    {"demo"},
    {"cli_output"},
    {"cli_evaluate", "cli_export"},
    {"cli"},
    {"__main__"},
]
"""What stands below may be imported, what stands beside or above may not. A package counts as one."""

LAYER_OF = {part: level for level, parts in enumerate(LAYERS) for part in parts}
MAY_IMPORT_RAY = {"pipeline", "train"}


def imported_names(file: Path) -> Iterator[str]:
    """Full names of everything a file imports, wherever in it: also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(file: Path) -> str:
    """`storage` of samray/storage.py, `sam` of samray/sam/spec.py."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(file for file in ROOT.rglob("*.py") if file != ROOT / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    part = part_of(file)
    assert part in LAYER_OF, f"{part} has no place in LAYERS yet"
    for name in imported_names(file):
        top, *rest = name.split(".")
        if top == "ray":
            assert part in MAY_IMPORT_RAY, f"{file} imports ray"
        if top != "samray" or not rest or rest[0] == part:
            continue
        if rest[0] not in LAYER_OF:  # `from samray import __version__`, or a public name
            assert rest[0].startswith("__"), f"{file} imports {name}: import it from its own module"
            continue
        assert LAYER_OF[rest[0]] < LAYER_OF[part], f"{file} imports {name}, which stands beside or above it"


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(done.stdout.splitlines()[-1].split())


def test_import_samray_is_light() -> None:
    assert not loaded_by("import samray") & {"torch", "ray", "numpy", "pyarrow", "pydantic"}


def test_help_is_light() -> None:
    commands = "[], ['label'], ['demo'], ['evaluate'], ['evaluate', 'points']"
    code = f"from samray.cli import main\nfor a in ({commands}): assert main([*a, '--help']) == 0"
    assert not loaded_by(code) & {"torch", "ray", "numpy", "pyarrow", "pandas", "fsspec", "scipy", "jinja2"}


def test_sections_and_masks_need_no_torch() -> None:
    assert not loaded_by("import samray; samray.MaskConfig(); samray.load_config('sa1b')") & {"torch", "ray", "pyarrow"}


def test_public_names_resolve() -> None:
    assert sorted(samray.__all__) == sorted(samray._HOMES)
    assert set(samray.__all__) <= set(dir(samray))
    for name in samray.__all__:
        assert getattr(samray, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        samray.no_such_name  # noqa: B018
