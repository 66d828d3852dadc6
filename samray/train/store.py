"""The files of a training run in OUTPUT, on any filesystem; every file is written all or nothing.

train.json           settings, DATA, versions: the run's identity
weights.safetensors  running average of the weights, for `samray label model.checkpoint=`
adapter.safetensors  in its place with train.trainable=lora, for `model.adapter=`
state-<step>.pt      model, average, optimizer: where a resumed run begins
position.json        step and time of the valid state; written after it
metrics.jsonl        a line of means every `train.log_every` steps, and one per validation
curves.png           the same as a plot
reconstructions.png  of train.objective=mae: held-out images, masked and reconstructed

Only one run may write at a time: two drivers on one OUTPUT would overwrite each other's steps.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from samray import storage
from samray.errors import ConfigError, NotFoundError, StorageError
from samray.output.identity import refuse_differences, versions
from samray.sam.weights_file import ADAPTER_FILE
from samray.storage.redaction import redact_json
from samray.storage.strict_json import parse_json
from samray.train.settings import LORA, TrainConfig

RUN_FILE, WEIGHTS_FILE, POSITION_FILE = "train.json", "weights.safetensors", "position.json"
METRICS_FILE, CURVES_FILE = "metrics.jsonl", "curves.png"
_STATE_NAME = re.compile(r"state-(\d{8,})\.pt")
_CHUNK_BYTES = 16 * 2**20
_PACKAGES = ("numpy", "pillow", "pyarrow", "ray", "torch")


@dataclass(slots=True)
class Position:
    """The progress of a run."""

    step: int = 0
    """Steps done."""
    elapsed_s: float = 0.0
    """Time spent in training, validation and saving, including earlier runs."""

    def progress(self, config: TrainConfig) -> float:
        """Used fraction of the budget, 0 to 1: of steps or of minutes, whichever is larger."""
        by_steps = self.step / config.steps if config.steps else 0.0
        by_time = self.elapsed_s / (60 * config.minutes) if config.minutes else 0.0
        return min(1.0, max(by_steps, by_time))


def weights_file(config: TrainConfig) -> str:
    """The name of the file that a training is for."""
    return ADAPTER_FILE if config.trainable == LORA else WEIGHTS_FILE


def is_training(output: str) -> bool:
    """Whether a folder or prefix is the OUTPUT of a training. Raises: StorageError."""
    return storage.exists(storage.join(storage.normalize(output), RUN_FILE))


class Store:
    """The OUTPUT of one run. Picklable."""

    def __init__(self, output: str) -> None:
        self.output = storage.normalize(output)

    def uri(self, name: str) -> str:
        """The URI of a file."""
        return storage.join(self.output, name)

    # --- the run -----------------------------------------------------------------------------------------------------

    def claim(
        self, identity: Mapping[str, Any], settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> bool:
        """Write train.json, or check that it has the same identity. Returns whether it was written.

        defaults: the identity of default settings, for settings that an older run does not have.
        Raises: ConfigError if the identity differs, StorageError.
        """
        wanted = redact_json(identity)
        run, is_new = self.read_run(), False
        if run is None:
            # A position without its run would count as the progress of this one.
            if storage.exists(self.uri(POSITION_FILE)):
                raise ConfigError(
                    f"{storage.redact(self.output)} has {POSITION_FILE}, but no {RUN_FILE} that describes it; choose"
                    " another OUTPUT, or empty this one"
                )
            full = {"identity": wanted, "settings": redact_json(settings), **versions(_PACKAGES)}
            is_new = storage.put_new(self.uri(RUN_FILE), json.dumps(full, indent=2, sort_keys=True).encode() + b"\n")
            # Another driver may have been first: compare with what is stored.
            run = self.read_run() or full
        run["identity"].get("data", {}).pop("image_root", None)  # was stored by older versions
        refuse_differences(self.output, run["identity"], wanted, defaults or {})
        return is_new

    def give_back(self) -> None:
        """Undo a claim without result, to allow the same OUTPUT with other settings.

        Raises: StorageError.
        """
        names = storage.list_names(self.output)
        # Lines, weights or a state show that steps were done, also by another driver.
        began = any(line["kind"] == "train" for line in self.read_metrics())
        if not began and not any(name in (WEIGHTS_FILE, ADAPTER_FILE) or _STATE_NAME.fullmatch(name) for name in names):
            # train.json last: after a kill in between, the rest still belongs to a run.
            for name in (METRICS_FILE, CURVES_FILE, RUN_FILE):
                storage.delete(self.uri(name))

    def read_run(self) -> dict[str, Any] | None:
        """Read train.json; None if it does not exist. Raises: ConfigError if it is not samray's, StorageError."""
        try:
            run = parse_json(storage.read_bytes(self.uri(RUN_FILE)))
            if not isinstance(run, dict) or "identity" not in run:
                raise ValueError("it is not samray's")
        except NotFoundError:
            return None
        except ValueError as error:
            where = storage.redact(self.uri(RUN_FILE))
            raise ConfigError(f"{where} is not valid: {error}; choose another OUTPUT") from error
        return run

    # --- state and weights -------------------------------------------------------------------------------------------

    def read_position(self) -> Position:
        """The progress of the run; zero if nothing was saved. Raises: StorageError."""
        try:
            return Position(**json.loads(storage.read_bytes(self.uri(POSITION_FILE))))
        except NotFoundError:
            return Position()

    def read_state(self) -> dict[str, Any] | None:
        """The state from `write_state`, on the CPU; None before the first save. Raises: StorageError."""
        position = self.read_position()
        if position == Position():
            return None
        data = storage.read_bytes(self.uri(_state_name(position)))
        # weights_only: a state is data, and nothing in it may run code.
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return {**state, "position": position}

    def write_state(self, position: Position, state: Mapping[str, Any]) -> None:
        """Write the position, the last file of a save; then delete earlier states. Raises: StorageError."""
        name = _state_name(position)
        # The state first: after a kill in between, position.json still names the earlier state, which is complete.
        self._put(name, lambda path: torch.save(dict(state), path))
        storage.put(self.uri(POSITION_FILE), json.dumps(dataclasses.asdict(position)).encode() + b"\n")
        for other in storage.list_names(self.output):
            match = _STATE_NAME.fullmatch(other)
            if match and int(match[1]) < position.step:
                storage.delete(self.uri(other))

    def write_weights(self, weights: dict[str, Tensor], metadata: dict[str, str], name: str = WEIGHTS_FILE) -> None:
        """Raises: StorageError."""
        self._put(name, lambda path: save_file(weights, path, metadata))

    def _put(self, name: str, write: Callable[[Path], object]) -> None:
        """Write via a temporary file: the largest model's state is 10 GB, more than one request allows."""
        with tempfile.TemporaryDirectory(prefix="samray-") as folder:
            path = Path(folder) / name
            try:
                write(path)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise StorageError(f"cannot write {name} to the temporary folder {folder}: {error}") from error
            storage.put_chunks(self.uri(name), _chunks(path))

    # --- metrics -----------------------------------------------------------------------------------------------------

    def read_metrics(self, until_step: int | None = None) -> list[dict[str, Any]]:
        """The lines up to this step; lines after the last save will be written again. Raises: StorageError."""
        try:
            text = storage.read_bytes(self.uri(METRICS_FILE)).decode()
        except NotFoundError:
            return []
        lines = [json.loads(line) for line in text.splitlines()]
        return [line for line in lines if until_step is None or line["step"] <= until_step]

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Rewrite all lines, because object stores cannot append. Raises: StorageError."""
        storage.put(self.uri(METRICS_FILE), "".join(json.dumps(line) + "\n" for line in lines).encode())

    def write_picture(self, name: str, png: bytes) -> None:
        """Raises: StorageError."""
        storage.put(self.uri(name), png)


def _state_name(position: Position) -> str:
    return f"state-{position.step:08d}.pt"


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
