"""The command `samray evaluate instances`: arguments and printed tables."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from samray import storage
from samray.cli.evaluate import Data, Json, Limit, NoProgress, Words, parse_settings, write_json
from samray.cli.help import CommandWithSettings
from samray.config import SECTIONS, Sections
from samray.errors import ConfigError, SamrayError
from samray.text import count, two_columns

if TYPE_CHECKING:
    import torch

    from samray.config import Config
    from samray.evaluate.confusion import Confusion
    from samray.evaluate.failures import Failures
    from samray.evaluate.regions import RegionData
    from samray.sam.sam import Sam

_NAMES_SHOWN: Final = 20
_MATRIX_SHOWN: Final = 6
_WIDTH: Final = 16


class InstancesCommand(CommandWithSettings):
    sections: ClassVar[Sections] = {name: SECTIONS[name] for name in ("model", "masks", "labels")}


def instances(
    data: Data,
    settings: Words = None,
    masks: Annotated[
        str | None,
        typer.Option(metavar="OUTPUT", help="Judge the masks of this output instead of labelling the images now."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Start from a preset. Without a preset, mask settings follow the model.")
    ] = None,
    max_masks: Annotated[
        int, typer.Option(min=1, metavar="N", help="Use the N best masks per image and name. LVIS uses 300.")
    ] = 100,
    limit: Limit = None,
    json: Json = None,
    picture: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the confusion matrix as a picture (.png, .jpg).")
    ] = None,
    no_progress: NoProgress = False,
) -> int:
    """Compare masks and their names with known regions and theirs: COCO's mask AP, and which name is taken for which.

    AP, AP50 and AP75 by pycocotools: of each name, their mean, and class-agnostic, for which names do not count. Masks
    are ranked by label_score, or by predicted_iou if they have none. The confusion matrix pairs masks with regions at
    an IoU of at least 0.5.

    The images of DATA are labelled with the given settings, or --masks names an output of the same images: they are
    matched by file_name, and no model is loaded. DATA needs a name per region: `names` in BSDS500's layout, `label` in
    an OUTPUT, where `samray import` keeps the categories of COCO and LVIS.

    Examples:

      samray evaluate instances truth/ --masks labels/ --picture confusion.png

      samray evaluate instances clothes.parquet --preset fast --limit 100 --json all.json

      samray evaluate instances lvis/ --masks labels/ --max-masks 300 --json -
    """
    from samray.evaluate.pictures import confusion_picture, picture_format
    from samray.evaluate.regions import RegionData
    from samray.sam.checkpoints import choose_device

    if masks is not None and (settings or preset):
        raise ConfigError("--masks judges masks that exist, so settings and --preset do not apply: leave them out")
    data, config = parse_settings([data, *(settings or ())], preset, InstancesCommand.sections)
    kind = picture_format(picture) if picture else ""
    images = RegionData(data, limit, with_pixels=masks is None)
    output = None if masks is None else RegionData(masks, with_pixels=False)
    model = _load_sam(config) if output is None else None
    with _bar(len(images), not no_progress) as on_image:
        by = model or choose_device(config.model.device)
        figures, confusion, failures = _judge(images, output, by, config, max_masks, on_image)
    _check_any(figures, failures, images.where)
    if json != "-":
        _print(figures, confusion, failures)
    write_json(json, figures, config, images, model)
    if picture:
        storage.put(storage.normalize(picture), confusion_picture(confusion, kind))
    return 0


def _load_sam(config: Config) -> Sam | None:
    """The model that makes the masks; None if `labels.by` makes them itself."""
    from samray.sam.checkpoints import load_configured

    if not config.labels.needs_sam:
        return None
    return load_configured(config.model)


def _judge(
    images: RegionData,
    output: RegionData | None,
    model: Sam | torch.device,
    config: Config,
    max_masks: int,
    on_image: Callable[[Failures], None],
) -> tuple[dict[str, Any], Confusion, Failures]:
    """The figures, of the masks of output or of those that model finds now; and which images failed."""
    from samray.evaluate.instances import evaluate_instances, generator_of, labelled, matched

    began = time.monotonic()
    settings = None
    if output is not None:
        pairs, failures = matched(images, output, on_image)
    else:
        settings = config.model_dump(mode="json", include={"masks", "labels"})
        pairs, failures = labelled(generator_of(model, config), images, on_image)
    figures, confusion = evaluate_instances(pairs, max_masks=max_masks)
    figures |= {
        "max_masks": max_masks,
        "masks_of": None if output is None else output.where,
        "settings": settings,
        "confusion": confusion.as_dict(),
        **failures.figures(),
        "seconds": time.monotonic() - began,
    }
    return figures, confusion, failures


@contextmanager
def _bar(total: int, enabled: bool) -> Iterator[Callable[[Failures], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task("images", total=total)
        yield lambda failures: bar.advance(task)


def _check_any(figures: dict[str, Any], failures: Failures, where: str) -> None:
    """Raises: SamrayError if there is nothing to judge by."""
    if figures["num_images"] == 0:
        failed = count(figures["num_failed"], "image")
        raise SamrayError(f"none of {failed} could be used: {_reasons(failures)}")
    if figures["num_regions"] == 0:
        raise SamrayError(f"DATA {where} has no regions to compare with; raise --limit if there is one")


def _reasons(failures: Failures) -> str:
    return "; ".join(f"{number} {reason} ({failures.examples[reason]})" for reason, number in failures.reasons.items())


def _print(figures: dict[str, Any], confusion: Confusion, failures: Failures) -> None:
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("name")
    for head in ("AP", "AP50", "AP75", "regions", "masks"):
        table.add_column(head, justify="right")
    by_name = figures["names"]
    for name, of_name in list(by_name.items())[:_NAMES_SHOWN]:
        aps = [_figure(of_name[key]) for key in ("ap", "ap_50", "ap_75")]
        table.add_row(escape(name), *aps, f"{of_name['num_regions']:,}", f"{of_name['num_masks']:,}")
    if len(by_name) > _NAMES_SHOWN:
        table.add_row(f"and {len(by_name) - _NAMES_SHOWN:,} more, with --json", style="dim")
    num_judged = sum(of_name["num_regions"] > 0 for of_name in by_name.values())
    table.add_row(f"mean of {count(num_judged, 'name')}", *(_figure(figures[key]) for key in ("ap", "ap_50", "ap_75")))
    agnostic = [_figure(figures[f"{key}_agnostic"]) for key in ("ap", "ap_50", "ap_75")]
    table.add_row("class-agnostic", *agnostic, f"{figures['num_regions']:,}", f"{figures['num_masks']:,}")
    console.print(table)
    merged = confusion.merged(_MATRIX_SHOWN)
    matrix = Table(box=None, pad_edge=False, title="regions (rows) and the masks that cover them", title_justify="left")
    matrix.add_column("", no_wrap=True)
    for word in merged.words:
        matrix.add_column(escape(word), justify="right", overflow="ellipsis", no_wrap=True)
    for word, counts in zip(merged.words, merged.matrix(merged.words).tolist(), strict=True):
        matrix.add_row(escape(word[:_WIDTH]), *(f"{number:,}" if number else "" for number in counts))
    console.print(matrix)
    rest = two_columns()
    rest.add_row("images", f"{figures['num_images']:,}")
    if failures.reasons:
        rest.add_row("failed images", f"{figures['num_failed']:,}: {escape(_reasons(failures))}")
    if not any(of_name["num_masks"] for of_name in by_name.values()):
        rest.add_row("names", "no mask has a name: set labels.by, or give an OUTPUT that has names")
    console.print(rest)


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
