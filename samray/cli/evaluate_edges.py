"""The command `samray evaluate edges`: arguments and printed results."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from samray import __version__, storage
from samray.cli.evaluate import Json, Limit, NoProgress, Words, evaluate_app
from samray.cli.export import Address
from samray.cli.help import CommandWithSettings, split_settings
from samray.config import Sections
from samray.config.edges import EDGE_SECTIONS, EdgesConfig, load_edges_config
from samray.errors import ConfigError, SamrayError
from samray.text import count, two_columns

if TYPE_CHECKING:
    from samray.evaluate.edge_data import EdgeData
    from samray.evaluate.edges import MapSource


Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Parquet with the boundaries that people drew, in BSDS500's layout: width, height, annotators with "
        "boundary (or boundaries), and jpeg (the image) or map_png (its edge map).",
    ),
]
Maps = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Evaluate these edge maps: grey PNG files, 8 or 16 bits, named like the images (100007.png).",
    ),
]
OnRay = Annotated[
    bool, typer.Option("--ray/--no-ray", help="Match the images in parallel on Ray, or one after another here.")
]


class EdgesCommand(CommandWithSettings):
    sections: ClassVar[Sections] = {name: EDGE_SECTIONS[name] for name in ("model", "edges")}
    has_presets: ClassVar[bool] = False


@evaluate_app.command(cls=EdgesCommand)
def edges(
    data: Data,
    settings: Words = None,
    maps: Maps = None,
    thresholds: Annotated[int, typer.Option(min=1, max=999, metavar="N", help="Thresholds between 0 and 1.")] = 99,
    limit: Limit = None,
    json: Json = None,
    ray: OnRay = True,
    address: Address = None,
    no_progress: NoProgress = False,
) -> int:
    """Compare edge maps with the boundaries that people drew (SAM paper, section 7.2), as the BSDS500 benchmark does.

    Prints ODS, OIS, AP and R50. The maps come from --maps, else from the column map_png of DATA, else from the model,
    by the method of `samray edges`. Needs pip install 'samray[edges]'.

    Time: about 20 ms of a CPU core per image, threshold and annotator. --thresholds 33 changes the figures by less than
    0.003.

    Examples:

      samray evaluate edges bsds500/val.parquet

      samray evaluate edges bsds500/test.parquet --maps edges/ --json edges.json

      samray evaluate edges bsds500/val.parquet model.name=vit_h --thresholds 33
    """
    from samray.evaluate.edge_data import EdgeData
    from samray.evaluate.edge_matching import check_installed
    from samray.evaluate.edges import evaluate_edges

    overrides, (data, *extra) = split_settings([data, *(settings or ())], ["DATA"], EdgesCommand.sections)
    config = load_edges_config(None, overrides + extra, EdgesCommand.sections)
    # Before DATA is read and a model is loaded.
    check_installed()
    images = EdgeData(data, limit)
    source, made_by = _map_source(images, maps, config)
    began = time.monotonic()
    with _bars(len(images), not no_progress) as (on_map, on_image):
        figures = evaluate_edges(
            images,
            source,
            thresholds,
            on_ray=ray and (len(images) > 1 or address is not None),
            address=address,
            on_map=on_map,
            on_image=lambda failures: on_image(len(failures)),
        )
    seconds = time.monotonic() - began
    if figures["num_images"] == 0:
        reasons = "; ".join(f"{number} {reason}" for reason, number in figures["failures"].items())
        raise SamrayError(f"none of {count(figures['num_failed'], 'image')} could be used: {reasons}")
    figures = {**figures, "thresholds": thresholds, "data": images.where, **made_by}
    figures |= {"seconds": round(seconds, 3), "versions": {"samray": __version__}}
    if json != "-":
        _print(figures)
    if json is not None:
        _write(json, jsonlib.dumps(figures, indent=2) + "\n")
    return 0


def _write(file: str, text: str) -> None:
    if file == "-":
        print(text, end="")
    else:
        storage.put(storage.normalize(file), text.encode())


def _map_source(images: EdgeData, maps: str | None, config: EdgesConfig) -> tuple[MapSource, dict[str, Any]]:
    """The source of the maps, and its description in the results. Raises: ConfigError if there is none."""
    from samray.evaluate.edge_data import FolderMaps
    from samray.evaluate.edges import map_in_data

    if maps is not None:
        folder = FolderMaps(maps)
        return folder, {"maps": folder.where}
    if images.has_maps:
        return map_in_data, {"maps": "map_png"}
    if not images.has_images:
        raise ConfigError(f"DATA {images.where} has neither jpeg nor map_png; give edge maps with --maps FOLDER")
    from samray.evaluate.edge_model import ModelMaps

    source = ModelMaps(config)
    return source, {"maps": None, **source.figures()}


@contextmanager
def _bars(num_images: int, enabled: bool) -> Iterator[tuple[Callable[[], None], Callable[[int], None]]]:
    """Two bars on a terminal, maps and matching; yields what to call after each map, and after each image."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    enabled = enabled and console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not enabled) as bar:
        maps, matching = bar.add_task("edge maps", total=num_images), bar.add_task("matching", total=num_images)

        def on_image(num_failed: int) -> None:
            failed = f", {num_failed} failed" if num_failed else ""
            bar.update(matching, advance=1, description=f"matching{failed}")

        yield lambda: bar.update(maps, advance=1), on_image


def _print(figures: dict[str, Any]) -> None:
    table = two_columns()
    table.add_row("ODS", f"{figures['ods']:.4f} (one threshold for all images: {figures['ods_threshold']:.3g}; recall "
                         f"{figures['ods_recall']:.4f}, precision {figures['ods_precision']:.4f})")  # fmt: skip
    table.add_row("OIS", f"{figures['ois']:.4f} (the best threshold of each image)")
    table.add_row("AP", f"{figures['ap']:.4f}")
    table.add_row("R50", f"{figures['r50']:.4f} (recall at a precision of 0.5)")
    table.add_row("images", f"{figures['num_images']:,}, {count(figures['thresholds'], 'threshold')}")
    if figures["num_failed"]:
        reasons = ", ".join(f"{number} {reason}" for reason, number in figures["failures"].items())
        table.add_row("failed images", f"{figures['num_failed']:,}: {reasons}")
    adapter = f" with the adapter {figures['adapter']}" if figures.get("adapter") else ""
    table.add_row("maps", escape(figures["maps"] or f"model {figures['model']}{adapter}"))
    table.add_row("time", f"{figures['seconds']:.1f} s")
    Console(highlight=False).print(table)
