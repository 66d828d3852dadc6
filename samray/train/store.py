"""What a training run keeps in OUTPUT, on any filesystem; every file appears whole or not at all.

train.json           settings, DATA, versions: the run's identity
weights.safetensors  the running average of the weights; `samray label model.checkpoint=` takes it
state-<step>.pt      model, average, optimizer: what a resumed run begins with
position.json        the step and the time of the state that counts; written after it
metrics.jsonl        a line of means every `train.log_every` steps, and one for each validation
curves.png           the same, drawn

One run at a time writes: two drivers on one OUTPUT would overwrite each other's steps.
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
from samray.storage.redaction import redact_json
from samray.storage.strict_json import parse_json
from samray.train.settings import TrainConfig

RUN_FILE, WEIGHTS_FILE, POSITION_FILE = "train.json", "weights.safetensors", "position.json"
METRICS_FILE, CURVES_FILE = "metrics.jsonl", "curves.png"
_STATE_NAME = re.compile(r"state-(\d{8,})\.pt")
_CHUNK_BYTES = 16 * 2**20
_PACKAGES = ("numpy", "pillow", "pyarrow", "ray", "torch")


@dataclass(slots=True)
class Position:
    """How far a run is."""

    step: int = 0
    """Steps done."""
    elapsed_s: float = 0.0
    """Spent in training, validation and saving, earlier runs included."""

    def progress(self, config: TrainConfig) -> float:
        """Share of the budget that is used up, 0 to 1: of steps or of minutes, whichever is further."""
        by_steps = self.step / config.steps if config.steps else 0.0
        by_time = self.elapsed_s / (60 * config.minutes) if config.minutes else 0.0
        return min(1.0, max(by_steps, by_time))


def is_training(output: str) -> bool:
    """Whether a folder or prefix is the OUTPUT of a training. Raises: StorageError."""
    return storage.exists(storage.join(storage.normalize(output), RUN_FILE))


class Store:
    """OUTPUT of one run. Picklable."""

    def __init__(self, output: str) -> None:
        self.output = storage.normalize(output)

    def uri(self, name: str) -> str:
        """Where a file is."""
        return storage.join(self.output, name)

    # --- the run -----------------------------------------------------------------------------------------------------

    def claim(
        self, identity: Mapping[str, Any], settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> bool:
        """Write train.json, or find the same identity there. Returns whether it was written.

        defaults: the identity of default settings, for those that a run begun earlier did not know.
        Raises: ConfigError where it is another, StorageError.
        """
        wanted = redact_json(identity)
        run, is_new = self.read_run(), False
        if run is None:
            if storage.exists(self.uri(POSITION_FILE)):
                raise ConfigError(
                    f"{storage.redact(self.output)} holds {POSITION_FILE}, but no {RUN_FILE} that says what it is; give"
                    " another OUTPUT, or empty this one"
                )
            full = {"identity": wanted, "settings": redact_json(settings), **versions(_PACKAGES)}
            is_new = storage.put_new(self.uri(RUN_FILE), json.dumps(full, indent=2, sort_keys=True).encode() + b"\n")
            run = self.read_run() or full
        run["identity"].get("data", {}).pop("image_root", None)  # stood there once
        refuse_differences(self.output, run["identity"], wanted, defaults or {})
        return is_new

    def give_back(self) -> None:
        """Undo a claim that nothing came of, so that the same OUTPUT may be given with better settings.

        Raises: StorageError.
        """
        names = storage.list_names(self.output)
        began = any(line["kind"] == "train" for line in self.read_metrics())
        if not began and not any(name == WEIGHTS_FILE or _STATE_NAME.fullmatch(name) for name in names):
            for name in (METRICS_FILE, CURVES_FILE, RUN_FILE):
                storage.delete(self.uri(name))

    def read_run(self) -> dict[str, Any] | None:
        """train.json; None where there is none. Raises: ConfigError where it is not ours, StorageError."""
        try:
            run = parse_json(storage.read_bytes(self.uri(RUN_FILE)))
            if not isinstance(run, dict) or "identity" not in run:
                raise ValueError("it is not samray's")
        except NotFoundError:
            return None
        except ValueError as error:
            where = storage.redact(self.uri(RUN_FILE))
            raise ConfigError(f"{where} cannot be understood: {error}; give another OUTPUT") from error
        return run

    # --- state and weights -------------------------------------------------------------------------------------------

    def read_position(self) -> Position:
        """How far the run is; at its beginning where nothing was saved. Raises: StorageError."""
        try:
            return Position(**json.loads(storage.read_bytes(self.uri(POSITION_FILE))))
        except NotFoundError:
            return Position()

    def read_state(self) -> dict[str, Any] | None:
        """As `write_state` was given it, on the CPU; None before the first save. Raises: StorageError."""
        position = self.read_position()
        if position == Position():
            return None
        data = storage.read_bytes(self.uri(_state_name(position)))
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return {**state, "position": position}

    def write_state(self, position: Position, state: Mapping[str, Any]) -> None:
        """The last of a save's files; then the states of earlier steps go. Raises: StorageError."""
        name = _state_name(position)
        self._put(name, lambda path: torch.save(dict(state), path))
        storage.put(self.uri(POSITION_FILE), json.dumps(dataclasses.asdict(position)).encode() + b"\n")
        for other in storage.list_names(self.output):
            found = _STATE_NAME.fullmatch(other)
            if found and int(found[1]) < position.step:
                storage.delete(self.uri(other))

    def write_weights(self, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Raises: StorageError."""
        self._put(WEIGHTS_FILE, lambda path: save_file(weights, path, metadata))

    def _put(self, name: str, write: Callable[[Path], object]) -> None:
        """By way of a temporary file: the largest model's state is 10 GB, more than one request holds."""
        with tempfile.TemporaryDirectory(prefix="samray-") as folder:
            path = Path(folder) / name
            try:
                write(path)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise StorageError(f"{name} cannot be written to {folder} on its way to OUTPUT: {error}") from error
            storage.put_chunks(self.uri(name), _chunks(path))

    # --- metrics -----------------------------------------------------------------------------------------------------

    def read_metrics(self, until_step: int | None = None) -> list[dict[str, Any]]:
        """The lines up to this step: what came after the last save will come again. Raises: StorageError."""
        try:
            text = storage.read_bytes(self.uri(METRICS_FILE)).decode()
        except NotFoundError:
            return []
        lines = [json.loads(line) for line in text.splitlines()]
        return [line for line in lines if until_step is None or line["step"] <= until_step]

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """All lines anew: object stores cannot append. Raises: StorageError."""
        storage.put(self.uri(METRICS_FILE), "".join(json.dumps(line) + "\n" for line in lines).encode())

    def write_curves(self, png: bytes) -> None:
        """Raises: StorageError."""
        storage.put(self.uri(CURVES_FILE), png)


def _state_name(position: Position) -> str:
    return f"state-{position.step:08d}.pt"


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
