"""The command `samray evaluate oneshot`: arguments and printed table."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from samray.cli.evaluate import Data, Json, Limit, NoProgress, Words, parse_settings, write_json
from samray.cli.help import CommandWithSettings
from samray.config import SECTIONS, Sections


class OneshotCommand(CommandWithSettings):
    sections: ClassVar[Sections] = {name: SECTIONS[name] for name in ("model", "masks", "labels")}
    has_presets = False


def oneshot(
    data: Data,
    settings: Words = None,
    classes: Annotated[int, typer.Option(min=1, metavar="N", help="Use the N most frequent classes.")] = 5,
    images_per_class: Annotated[int, typer.Option(min=2, metavar="N", help="Use N random images of each class.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Repeat N times with other examples.")] = 2,
    min_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Ignore images in which the class covers less than this.")
    ] = 0.005,
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this design, or histogram; may be defaults again.")
    ] = None,
    limit: Limit = None,
    json: Json = None,
    no_progress: NoProgress = False,
) -> int:
    """Give one random example of each class and measure how well the class is found in other images.

    Compares the designs of labels.by=example with a colour histogram. IoU per class: intersections over unions, summed
    over the images searched; averaged over classes and seeds. DATA needs a class name per region: `names` in BSDS500's
    layout, `label` in an OUTPUT. The word scenes means 100 painted scenes, whose objects come again.

    Examples:

      samray evaluate oneshot scenes

      samray evaluate oneshot clothes.parquet

      samray evaluate oneshot labels/ --classes 3 --seeds 5 --method persam model.name=vit_b labels.max_instances=20
    """
    from samray.evaluate.oneshot import evaluate_oneshot, sample_classes
    from samray.evaluate.regions import RegionData
    from samray.evaluate.scenes import SCENES, NamedScenes
    from samray.sam.checkpoints import load_configured

    methods = _checked_methods(method)
    # The examples come from DATA.
    defaults = ["labels.by=example", "labels.example=DATA", "labels.example_mask=DATA", "labels.name=class"]
    data, config = parse_settings([data, *(settings or ())], None, OneshotCommand.sections, defaults)
    images = NamedScenes(limit) if data == SCENES else RegionData(data, limit)
    model = load_configured(config.model)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=no_progress or not console.is_terminal) as bar:
        reading = bar.add_task("reading", total=len(images))
        sample, failures = sample_classes(
            images, num_classes=classes, images_per_class=images_per_class, min_fraction=min_fraction,
            on_image=lambda failures: bar.advance(reading),
        )  # fmt: skip
        searching = bar.add_task("searching", total=seeds * len(sample) * len(methods))
        figures = evaluate_oneshot(
            model, config, sample, methods=methods, num_seeds=seeds, on_search=lambda: bar.advance(searching)
        )
    num_images = {name: len(images_of_class) for name, images_of_class in sample.items()}
    figures |= {"num_seeds": seeds, "images": num_images, **failures.figures()}
    if json != "-":
        _print(figures)
    write_json(json, figures, config, images, model)
    return 0


def _checked_methods(names: list[str] | None) -> list[str]:
    """Each once; all of them by default. Raises: ConfigError."""
    from samray.errors import ConfigError
    from samray.evaluate.oneshot import METHODS

    names = list(dict.fromkeys(names or METHODS))
    if unknown := [name for name in names if name not in METHODS]:
        raise ConfigError(f"--method {unknown[0]} is not one of {', '.join(METHODS)}")
    return names


def _print(figures: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("method")
    for head in ("mean IoU", "± seeds", *figures["images"]):
        table.add_column(head, justify="right")
    for method, scores in figures["methods"].items():
        by_class = [f"{iou:.3f}" for iou in scores["classes"].values()]
        table.add_row(method, f"{scores['mean']:.3f}", f"{scores['std']:.3f}", *by_class)
    table.add_row("images", "", "", *(str(number) for number in figures["images"].values()), style="dim")
    Console(highlight=False).print(table)
