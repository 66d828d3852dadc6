"""The HTML page of `samray report` about a training: progress, data, settings.

Everything comes from the training's OUTPUT: train.json, position.json, metrics.jsonl.
"""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

import jinja2

from samray import storage
from samray.config import ModelConfig
from samray.errors import ConfigError
from samray.report.page import Figure, settings_tables
from samray.text import duration
from samray.train.curves import draw_curves
from samray.train.objectives import Objective, objective_of
from samray.train.settings import TRAIN_SECTIONS, TextConfig, TrainConfig, TrainSettings
from samray.train.store import Position, Store, is_training, weights_file

MAX_VALIDATIONS = 40
"""Rows of the table: the first ones, and the last ones."""


def write_train_report(output: str, out: str | None = None) -> str:
    """Write the page about a training's OUTPUT to `out` (a path or URI), by default OUTPUT/report.html; returns its
    URI.

    Raises: ConfigError if OUTPUT has no training or none that has begun, StorageError if it cannot be read.
    """
    if not is_training(output):
        raise ConfigError(f"{storage.redact(output)} has no training")
    store = Store(output)
    run = store.read_run()
    assert run is not None
    position = store.read_position()
    lines = store.read_metrics()
    if not lines:
        raise ConfigError(f"{storage.redact(output)} has a training without metrics so far; try again later")
    uri = out or store.uri("report.html")
    storage.put(uri, _render(store, run, position, lines).encode())
    return uri


def _render(store: Store, run: Mapping[str, Any], position: Position, lines: Sequence[dict[str, Any]]) -> str:
    settings = run["settings"]
    config = TrainConfig(**settings["train"])
    # For the next command.
    model = ModelConfig().model_copy(update={"checkpoint": settings["model"].get("checkpoint")})
    # Older trainings have no section `text`.
    text = TextConfig(**settings.get("text", {}))
    objective = objective_of(TrainSettings(train=config, text=text, model=model))
    validations = [line for line in lines if line["kind"] == "validation"]
    changed, all_settings = settings_tables(settings, TRAIN_SECTIONS)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("samray.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    where = storage.redact(store.output)
    return environment.get_template("train_report.html.j2").render(
        style=(resources.files("samray.report") / "templates" / "report.css").read_text("utf-8"),
        output=where,
        output_name=" / ".join(where.rpartition("//")[2].strip("/").split("/")[-2:]),
        model=settings["model"]["name"],
        checkpoint=run["identity"]["model"].get("checkpoint_sha256"),
        run=run,
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        progress=position.progress(config),
        headline=_headline(objective, position, lines, validations),
        curves=base64.b64encode(draw_curves(lines, objective.panels)).decode(),
        # The first shows where the training began, the last ones where it is.
        validations=[*validations[:1], *validations[1:][-MAX_VALIDATIONS:]],
        data=run["identity"]["data"]["uris"],
        shares=settings["data"]["shares"],
        columns=objective.columns,
        command=objective.next_command(settings["model"]["name"], storage.redact(store.uri(weights_file(config)))),
        changed=changed,
        settings=all_settings,
    )


def _headline(
    objective: Objective, position: Position, lines: Sequence[dict[str, Any]], validations: Sequence[dict[str, Any]]
) -> list[Figure]:
    figures = []
    if validations:
        first, last = validations[0], validations[-1]
        for key, what in objective.headline:
            change = f"{first[key]:.3f} at step {first['step']:,}" if last is not first else ""
            figures.append(Figure(f"{last[key]:.3f}", what, change))
    figures.append(Figure(f"{position.step:,}", "steps saved", duration(position.elapsed_s)))
    rates = [line["examples_per_s"] for line in lines if line.get("examples_per_s")]
    if rates:
        figures.append(Figure(f"{statistics.median(rates):.3g}", "examples per second", "median"))
    return figures
