"""`samray train` on a real Ray: killed and resumed, on two workers, and refused where the config is another."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

import samray
from samray import storage
from samray.cli.main import main
from samray.cluster.sizes import data_settings
from samray.config import ClusterConfig
from samray.errors import ConfigError, SamrayError, StorageError
from samray.sam.spec import MODELS
from samray.train import worker as training_worker
from samray.train.data import ExampleMaker, example_stream, open_data
from samray.train.examples import Frame
from samray.train.learner import Learner, Means, frame_of
from samray.train.loop import Worker, run_leg
from samray.train.mixture import Mixture
from samray.train.monitor import Monitor
from samray.train.run import train
from samray.train.settings import TrainSettings, load_train_settings
from samray.train.store import Store
from tests.support import REPOSITORY
from tests.support.drivers import driver, wait_until
from tests.support.scene_outputs import paint, write_scenes

SETTINGS = [
    "train.steps=8", "train.batch_size=2", "train.log_every=2", "train.validate_every=4",
    "train.save_every_minutes=0", "train.interaction_steps=4", "train.first_image_size=64", "train.first_fraction=1",
    "train.warmup_steps=2", "train.drop_path=0.1", "data.prompts_per_image=2", "data.validation_images=2",
    "data.validation_fraction=0.2", "model.dtype=float32", "cluster.num_cpus_per_worker=1",
]  # fmt: skip
"""The embedded model on small images, so that a step takes moments."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """An output with known masks, and painted scenes."""
    return [write_scenes(str(tmp_path_factory.mktemp("world")), paint(12)).output, "scenes"]


def lines_of(output: str | Path) -> list[dict[str, Any]]:
    """The metrics without times."""
    lines = Store(str(output)).read_metrics()
    return [{k: v for k, v in line.items() if k not in ("minutes", "examples_per_s")} for line in lines]


@contextlib.contextmanager
def death_of_a_worker(output: Path, step: int) -> Iterator[list[int]]:
    """kill -9 of the training process as soon as this step is saved; yields the list of those killed."""
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 300
        while Store(str(output)).read_position().step < step and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    yield killed
    thread.join()


def train_in_this_process(data: list[str], output: Path, settings: TrainSettings, image_size: int = 64) -> None:
    """What the one worker of a run does, with the same examples in the same order."""
    mixture, frame = open_data(data, settings), frame_of(MODELS["tiny"], image_size)
    whole = frame_of(MODELS["tiny"], MODELS["tiny"].image_size)
    maker, batch_size = ExampleMaker(mixture, frame), settings.train.batch_size
    numbers = np.arange(settings.train.steps * batch_size).reshape(-1, batch_size)
    batches = (
        {name: torch.from_numpy(a) for name, a in maker({"number": worker_numbers}).items()}
        for worker_numbers in numbers
    )
    worker = Worker(config=settings.train, store=Store(str(output)), validation=lambda: mixture.validation(2, whole))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums decides the last digit
    try:
        run_leg(Learner(settings, MODELS["tiny"], image_size=image_size, device=torch.device("cpu")), batches, worker)
    finally:
        torch.set_num_threads(before)


def test_killed_driver_and_killed_worker_change_no_figure(data: list[str], tmp_path: Path, local_ray: None):
    """Twice interrupted, and to the last digit the curve and the weights of an undisturbed run, here without Ray."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["train", *data, str(parts), *SETTINGS]
    with driver(
        tmp_path / "log", *arguments, program=("-m", "samray"), environment={"PYTHONPATH": str(REPOSITORY)}
    ) as d:
        wait_until(lambda: Store(str(parts)).read_position().step >= 2, d)
        d.kill()
        d.clean_up()
    first = Store(str(parts)).read_position().step
    assert 2 <= first < 8
    settings = load_train_settings(None, SETTINGS)
    with death_of_a_worker(parts, first + 1) as killed:
        resumed = train(data, parts, settings, progress=False)
    assert killed
    train_in_this_process(data, whole, settings)
    assert (resumed.step, resumed.exit_code) == (8, 0)
    assert lines_of(parts) == lines_of(whole)
    assert [line["step"] for line in lines_of(whole)] == [0, 2, 4, 4, 6, 8, 8]
    weights, expected = (load_file(folder / "weights.safetensors") for folder in (parts, whole))
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    assert sorted(p.name for p in parts.iterdir() if not p.name.startswith("_")) == [
        "curves.png", "metrics.jsonl", "position.json", "state-00000008.pt", "train.json", "weights.safetensors",
    ]  # fmt: skip
    samray.load_model(checkpoint=str(parts / "weights.safetensors"))


def test_a_finished_run_starts_nothing_and_another_config_is_refused(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """No Ray is needed for either."""
    monkeypatch.setattr("samray.train.run._run_on_ray", lambda run: pytest.fail("nothing is left to do"))
    store = Store(str(tmp_path))
    with pytest.raises(pytest.fail.Exception):
        train(data, tmp_path, load_train_settings(None, SETTINGS), progress=False)
    storage.put(store.uri("position.json"), json.dumps({"step": 8, "elapsed_s": 90.0}).encode())
    assert main(["train", *data, str(tmp_path), *SETTINGS]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "8 steps, 1 min 30 s" in shown
    assert f"samray label INPUT OUTPUT model.name=tiny model.checkpoint={tmp_path}/weights.safetensors" in shown
    assert main(["train", *data, str(tmp_path), *SETTINGS, "train.learning_rate=1e-3"]) == 2
    assert "train.learning_rate: 0.0001 there, 0.001 now" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"data.uris: .*endless.* there"):
        train(data[:1], tmp_path, load_train_settings(None, SETTINGS), progress=False)


class _Noted:
    """A DATA whose examples are their numbers, each noted in a file when it is made."""

    num_images = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def example(self, draw: int, frame: Frame) -> dict[str, Any]:
        (self.folder / str(draw)).touch()
        return {"number": np.array(draw)}

    def validation(self, limit: int, frame: Frame) -> Iterator[Any]:
        yield from ()


@pytest.mark.parametrize(
    ("error", "reported_at", "message"),
    [
        (ConfigError("the weights are others here"), 1, "the weights are others here"),
        (StorageError("8 images cannot be used"), 4, "8 images cannot be used"),
        (KeyError("points"), 4, r"the run ended early: KeyError: 'points'; run the same command to resume"),
        (None, 4, "the training worker died 3 times before its first step"),
    ],
)
def test_the_driver_hears_why_workers_end_before_a_step(
    error: Exception | None, reported_at: int, message: str, local_ray: None, monkeypatch: pytest.MonkeyPatch
):
    """Another try is for what another try may help. None: killed."""
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    monitor = ray.remote(Monitor).options(num_cpus=0).remote()

    def leg(arguments: Any) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(training_worker, "_train_leg", leg)
    for _ in range(reported_at):
        assert ray.get(monitor.why_given_up.remote()) is None
        with contextlib.suppress(SamrayError, KeyError):
            training_worker.work({"monitor": monitor})
    reason = ray.get(monitor.why_given_up.remote())
    assert re.match(message, str(reason))
    assert isinstance(reason, ConfigError) == isinstance(error, ConfigError)


def test_examples_are_made_when_they_are_due_and_not_long_before(tmp_path: Path, local_ray: None):
    """Ray Data alone would make all of them at once, and hold them."""
    monitor = ray.remote(Monitor).remote()
    mixture = Mixture([_Noted(tmp_path)], None, seed=0)
    with data_settings(ClusterConfig()):
        # As `train` sets it: without it two steps that end together may change places.
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        stream = example_stream(
            mixture, Frame(64, 16), 100, 300, 2, num_workers=1, num_actors=1, monitor=monitor
        )  # fmt: skip
        batches = iter(stream.iter_batches(batch_size=2, prefetch_batches=0))
        first = [next(batches)["number"].tolist() for _ in range(20)]
        time.sleep(3)  # of a stream that runs on all would be there by now
        assert len(list(tmp_path.iterdir())) <= 2 * (38 + 1)
        ray.get(monitor.beat.remote({"step": 390}))
        later = [batch["number"].tolist() for batch in batches]
    assert first + later == [[2 * step, 2 * step + 1] for step in range(100, 400)]


def test_two_workers_share_out_a_batch_and_learn_as_one_does(data: list[str], s3_root: str, local_ray: None):
    """Onto S3. With nothing drawn but the data, gradients of two halves are those of the whole batch."""
    changed = ["train.interaction_steps=1", "train.drop_path=0", "train.trainable=decoder", "train.steps=4"]
    settings = load_train_settings(None, [*SETTINGS, *changed, "cluster.num_workers=2"])
    output = storage.join(s3_root, "out")
    assert train(data, output, settings, progress=False).step == 4
    state = Store(output).read_state()
    assert state is not None

    learner = Learner(settings, MODELS["tiny"], image_size=64, device=torch.device("cpu"))
    begun = {name: value.clone() for name, value in learner.sam.state_dict().items()}
    maker = ExampleMaker(open_data(data, settings), frame_of(MODELS["tiny"], 64))
    for step in range(4):
        learner.means = learner.means if step % 2 else Means()  # train.log_every=2 starts them again
        # Each worker has a block of two steps' examples, and goes through it by halves.
        numbers = np.array([2 * (2 * (step // 2) + rank) + step % 2 for rank in (0, 1)])
        learner.step({name: torch.from_numpy(array) for name, array in maker({"number": numbers}).items()})
    # Adam makes whole steps of the rounding that is all a key's bias has for a gradient: softmax does not see it.
    learnt = {name: value for name, value in learner.sam.state_dict().items() if not name.endswith("k_proj.bias")}
    apart = sum(float((state["model"][name] - value).square().sum()) for name, value in learnt.items())
    moved = sum(float((begun[name] - value).square().sum()) for name, value in learnt.items())
    assert 0 < apart < 1e-4 * moved, "within a hundredth of the way that the weights went"
    _, last_two = learner.means.flush()
    written = [line for line in lines_of(output) if line["kind"] == "train"][-1]
    assert written["mask_loss"] == pytest.approx(last_two["mask_loss"], rel=1e-2), "of both workers, not of one"


def test_errors_of_the_command_are_a_sentence(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def stderr_of(*arguments: str) -> str:
        assert main(["train", *arguments]) == 2
        return " ".join(capsys.readouterr().err.split())

    output = str(tmp_path / "out")
    assert "Missing argument 'OUTPUT'" in stderr_of(data[0])
    assert "unknown setting train.setps; did you mean train.steps?" in stderr_of(data[0], output, "train.setps=3")
    assert "is not the output of a samray run" in stderr_of(str(tmp_path), output)
    assert "encoder has only 12 blocks" in stderr_of(data[0], output, "train.trainable=last_blocks:99")
    assert "data.shares has 1 numbers, but there are 2 DATA" in stderr_of(*data, output, "data.shares=[1]")
    assert not Path(output).exists()
