"""The commands `samray evaluate points` and `samray evaluate proposals`: what they take and print."""

from __future__ import annotations

import json as jsonlib
import math
import platform
import time
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from samray import __version__, storage
from samray.cli_help import CommandWithSettings, HelpfulGroup, count, split_settings, two_columns
from samray.config import Config, load_config
from samray.errors import ConfigError, SamrayError

if TYPE_CHECKING:
    from samray.evaluate.failures import Failures
    from samray.evaluate.regions import RegionData
    from samray.sam.sam import Sam

evaluate_app = typer.Typer(
    name="evaluate",
    help="Say how good a model is on images whose regions are known.",
    cls=HelpfulGroup,
    rich_markup_mode="rich",
    no_args_is_help=True,
)

_PACKAGES = ("torch", "numpy", "pycocotools")

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Images with known regions: an OUTPUT of samray, or Parquet in its layout or in BSDS500's (columns jpeg, "
        "annotators): a file, folder, prefix or glob.",
    ),
]
Words = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings, listed below.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N images of DATA.")]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON, too; - prints only them.")
]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No bar.")]


class PointsCommand(CommandWithSettings):
    sections = ("model",)


@evaluate_app.command(cls=PointsCommand)
def points(
    data: Data,
    settings: Words = None,
    min_area: Annotated[int, typer.Option(min=0, metavar="PIXELS", help="Leave out smaller regions.")] = 500,
    limit: Limit = None,
    json: Json = None,
    no_progress: NoProgress = False,
) -> int:
    """One click at the centre of each region: how well does the answer fit? (SAM paper, section 7.1)

    The click is the pixel farthest from the outside of the region. miou: mean IoU over regions of the mask that the
    model scores best; miou_oracle: of the best of its three masks. Where several annotators marked an image, each
    one's regions count. At the image's own resolution.

    Examples:

      samray evaluate points bsds500/val.parquet

      samray evaluate points labels/ model.name=vit_b model.checkpoint=s3://weights/sam_vit_b_01ec64.pth --json -
    """
    from samray.evaluate.points import evaluate_points

    words, config = _settings([data, *(settings or ())], None, PointsCommand.sections)
    images, model = _open(words, limit, config)
    with _Bar(images, not no_progress) as bar:
        figures = evaluate_points(model, images, min_area=min_area, on_image=bar.step)
    rows = [
        ("mean IoU", f"{figures['miou']:.4f} of the mask that the model scores best"),
        ("", f"{figures['miou_oracle']:.4f} of the best of its three (oracle)"),
        ("regions", f"{figures['num_regions']:,} of at least {count(min_area, 'pixel')}, a click each"),
    ]
    _finish({**figures, "min_area": min_area}, rows, bar, _of_run(config, images, model), json)
    return 0


# --- what the commands share -----------------------------------------------------------------------------------------


def _settings(words: list[str], preset: str | None, sections: tuple[str, ...]) -> tuple[str, Config]:
    """DATA and the settings, from the words as typed. Raises: ConfigError, also for a setting without a part here."""
    overrides, (data, *extra) = split_settings(words, ["DATA"])
    for word in overrides:
        if word.partition(".")[0] not in sections:
            raise ConfigError(f"{word} has no part in this; it takes settings of {' and '.join(sections)}")
    return data, load_config(preset, None, overrides + extra)


def _open(data: str, limit: int | None, config: Config) -> tuple[RegionData, Sam]:
    """DATA first: what is wrong with it is told before a model is downloaded."""
    from samray.evaluate.regions import RegionData
    from samray.sam.checkpoints import load_model

    images = RegionData(data, limit)
    return images, load_model(config.model.name, config.model.checkpoint, config.model.device, config.model.dtype)


class _Bar:
    """Images done, on a terminal; and how long they took."""

    def __init__(self, images: RegionData, enabled: bool) -> None:
        from samray.evaluate.failures import Failures

        console = Console(stderr=True)
        self._bar = Progress(console=console, transient=True, disable=not (enabled and console.is_terminal))
        self._task = self._bar.add_task("images", total=len(images))
        self.failures = Failures()
        self.seconds = 0.0

    def __enter__(self) -> _Bar:
        self._began = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self.seconds = time.monotonic() - self._began

    def step(self, failures: Failures) -> None:
        self.failures = failures
        failed = f", {len(failures)} failed" if len(failures) else ""
        self._bar.update(self._task, advance=1, description=f"images{failed}")


def _of_run(config: Config, images: RegionData, model: Sam) -> dict[str, Any]:
    """What the figures were measured with and on."""
    from samray.sam.checkpoints import checkpoint_sha256

    given = config.model.checkpoint
    return {
        "model": config.model.name,
        "checkpoint": None if given is None else storage.redact(given),
        "checkpoint_sha256": checkpoint_sha256(config.model.name, given),
        "data": images.where,
        "layout": images.layout,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {
            "samray": __version__,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in _PACKAGES},
        },
    }


def _finish(
    figures: dict[str, Any], rows: list[tuple[str, str]], bar: _Bar, of_run: dict[str, Any], json: str | None
) -> None:
    """Print the figures, or where they are to be JSON on stdout only that, and write what is to be written.

    Raises: SamrayError where there is nothing to tell, StorageError.
    """
    failures = bar.failures
    told = [f"{number} {reason} ({failures.examples[reason]})" for reason, number in figures["failures"].items()]
    if figures["num_images"] == 0:
        raise SamrayError(f"none of {count(figures['num_failed'], 'image')} could be used: {'; '.join(told)}")
    if figures["num_regions"] == 0:
        raise SamrayError(f"DATA has no region of at least {count(figures['min_area'], 'pixel')} (--min-area)")
    whole = {**figures, **of_run, "seconds": round(bar.seconds, 3)}
    text = jsonlib.dumps({key: _plain(value) for key, value in whole.items()}, indent=2) + "\n"
    if json == "-":
        print(text, end="")
        return
    table = two_columns()
    for row in rows:
        table.add_row(*row)
    table.add_row("images", f"{figures['num_images']:,}")
    if told:
        table.add_row("failed images", f"{figures['num_failed']:,}: {'; '.join(told)}")
    table.add_row("model", f"{of_run['model']}, {of_run['checkpoint'] or 'its own weights'}")
    table.add_row("time", f"{bar.seconds:.1f} s on {of_run['device']}")
    Console(highlight=False).print(table)
    if json is not None:
        storage.put(storage.normalize(json), text.encode())


def _plain(value: Any) -> Any:
    """JSON knows no NaN: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
