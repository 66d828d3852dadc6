"""What tests ask of the manifests in configs/kuberay: their parts, their commands, and what the CRDs say of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from samray.cli.main import main
from samray.config import Config
from samray.pipeline.report import LabelReport
from tests.support import REPOSITORY, pages

KUBERAY = REPOSITORY / "configs" / "kuberay"
MANIFESTS = sorted(KUBERAY.glob("*.yaml"))
GPU_JOB, KIND_JOB, GPU_CLUSTER = (KUBERAY / f"{n}.yaml" for n in ("rayjob-gpu", "rayjob-cpu-kind", "raycluster-gpu"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def ray_document(path: Path) -> dict[str, Any]:
    """The one document of a manifest that is KubeRay's."""
    (of_ray,) = (document for document in documents(path) if document["apiVersion"].startswith("ray.io/"))
    return of_ray


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    return spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec


def groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The head group and the worker groups."""
    spec = cluster_spec(document)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only_container,) = group["template"]["spec"]["containers"]
    return only_container


def quantity(text: str | float) -> float:
    """`500m`, `24Gi`, `1`, as Kubernetes reads them."""
    number, unit = re.fullmatch(r"([\d.]+)(\D*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


def entrypoint(path: Path) -> str:
    return str(ray_document(path)["spec"]["entrypoint"])


def documented_commands() -> Iterator[tuple[str, str]]:
    """(where, command): each `samray label|demo` and `ray job submit` of the README, docs/ and the comments."""
    texts = {path.name: path.read_text() for path in MANIFESTS}
    comments = {name: "\n".join(re.findall(r"^ *# *(.*)", text, re.M)) for name, text in texts.items()}
    for where, text in [*comments.items(), *((page, text) for page, _, text in pages.blocks("bash"))]:
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            quoted = re.findall(r"`((?:samray (?:label|demo)|ray job submit) [^`]+)`", line)
            if re.match(r"(samray (label|demo)|ray job submit) ", line):
                quoted.append(line)
            for command in quoted:
                yield where, command


def split_submission(line: str) -> tuple[list[str], str]:
    """`ray job submit OPTIONS -- ENTRYPOINT`, taken apart."""
    options, dashes, command = line.removeprefix("ray job submit").partition(" -- ")
    assert dashes, f"no -- between Ray's options and the command: {line}"
    return shlex.split(options), command


def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.M)
    return str(version)


def check_submission(options: list[str]) -> None:
    """Raises click's error where `ray job submit` would not take these options."""
    from ray.dashboard.modules.job.cli import submit

    submit.make_context("submit", [*options, "--", "true"])


class Commands:
    """Runs samray's command line up to where the work would begin, and keeps what it would begin with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.begun: list[tuple[str, str, Config]] = []
        for function in ("run.label_with", "label_from.label_from_with"):
            monkeypatch.setattr(f"samray.pipeline.{function}", self._label)
        monkeypatch.setattr("samray.cli.demo.run_demo", self._demo)
        monkeypatch.setattr("samray.cli.demo_train.train_demo", self._demo)

    def _label(self, input: str, output: str, config: Config, **options: Any) -> LabelReport:
        self.begun.append((input, output, config))
        return LabelReport(output, num_images=1, num_shards=1)

    def _demo(self, directory: Path, config: Config, *args: Any, **options: Any) -> int:
        self.begun.append((str(directory), str(directory), config))
        return 0

    def run(self, line: str) -> tuple[str, str, Config]:
        """What an entrypoint comes to: input, output and settings. Raises ValueError with samray's own words."""
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "jobs/autolabel.py"]:
            words = ["samray", "label", *words[2:]]
        if words[0] != "samray":
            raise ValueError(f"{words[0]} is no entry point of samray")
        self.capsys.readouterr()
        if main(words[1:]) != 0:
            raise ValueError(self.capsys.readouterr().err.strip())
        return self.begun[-1]
