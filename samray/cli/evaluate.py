"""The commands `samray evaluate points` and `samray evaluate proposals`: arguments and printed results."""

from __future__ import annotations

import enum
import json as jsonlib
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from samray import __version__, storage
from samray.cli.help import CommandWithSettings, HelpfulGroup, split_settings
from samray.config import SECTIONS, Config, Sections, load_config
from samray.errors import ConfigError, SamrayError
from samray.evaluate import MIN_AREA
from samray.text import count, two_columns

if TYPE_CHECKING:
    from samray.evaluate.failures import Failures
    from samray.evaluate.pictures import Sheet
    from samray.evaluate.regions import RegionData
    from samray.evaluate.scenes import NamedScenes
    from samray.sam.sam import Sam

evaluate_app = typer.Typer(
    name="evaluate",
    help="Measure the quality of a model on images with known regions.",
    cls=HelpfulGroup,
    rich_markup_mode="rich",
    no_args_is_help=True,
)

_PACKAGES = ("torch", "numpy", "pycocotools")

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Images with known regions: an OUTPUT of samray, or Parquet in its or BSDS500's layout (columns jpeg, "
        "annotators): a file, folder, prefix or glob.",
    ),
]
Words = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings, listed below.")]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Use only the first N images of DATA.")]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Also write the results as JSON; - prints only the JSON.")
]
Picture = Annotated[
    str | None, typer.Option(metavar="FILE", help="Write a contact sheet of examples (.png, .jpg), worst to best.")
]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="Do not show progress.")]


class Protocol(enum.StrEnum):
    """How proposals are generated and ranked."""

    LABEL = "label"
    PAPER = "paper"


ProtocolOption = Annotated[
    Protocol,
    typer.Option(
        "--protocol",
        help="paper: as in the SAM paper, section 7.3. 64 x 64 points, NMS at 0.9, the 1,000 masks with the highest "
        "mean of predicted IoU and stability score.",
    ),
]
Frequencies = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="LVIS annotations (or JSON with their categories): also measure frequent, common and rare classes.",
    ),
]


class PointsCommand(CommandWithSettings):
    sections: ClassVar[Sections] = {"model": SECTIONS["model"]}


class ProposalsCommand(CommandWithSettings):
    sections: ClassVar[Sections] = {name: SECTIONS[name] for name in ("model", "masks")}


@evaluate_app.command(cls=PointsCommand)
def points(
    data: Data,
    settings: Words = None,
    min_area: Annotated[int, typer.Option(min=0, metavar="PIXELS", help="Ignore smaller regions.")] = MIN_AREA,
    limit: Limit = None,
    json: Json = None,
    picture: Picture = None,
    no_progress: NoProgress = False,
) -> int:
    """Click once at the centre of each region and measure how well the mask fits (SAM paper, section 7.1).

    The click is the pixel farthest from the region's boundary. miou: mean IoU over regions of the mask with the highest
    predicted IoU; miou_oracle: of the best of the three masks. If several annotators marked an image, the regions of
    each count. Measured at the image's own resolution.

    Examples:

      samray evaluate points bsds500/val.parquet

      samray evaluate points labels/ model.name=vit_b model.checkpoint=s3://weights/sam_vit_b_01ec64.pth --json -
    """
    from samray.evaluate.pictures import click_sheet, offer_clicks
    from samray.evaluate.points import evaluate_points

    words, config = parse_settings([data, *(settings or ())], None, PointsCommand.sections)
    run = _Run(words, limit, config, json, picture)
    sheet = click_sheet() if picture else None
    with run.bar(not no_progress) as on_image:
        figures = evaluate_points(
            run.model,
            run.images,
            min_area=min_area,
            on_image=on_image,
            on_answers=lambda image, answers: offer_clicks(sheet, image, answers) if sheet else None,
        )
    rows = [
        ("mean IoU", f"{figures['miou']:.4f} of the mask with the highest predicted IoU"),
        ("", f"{figures['miou_oracle']:.4f} of the best of the three masks (oracle)"),
        ("regions", f"{figures['num_regions']:,} of at least {count(min_area, 'pixel')}, one click each"),
    ]
    run.finish({**figures, "min_area": min_area}, rows, sheet)
    return 0


@evaluate_app.command(cls=ProposalsCommand)
def proposals(
    data: Data,
    settings: Words = None,
    preset: Annotated[
        str | None, typer.Option(help="Start from a preset. Without a preset, mask settings follow the model.")
    ] = None,
    protocol: ProtocolOption = Protocol.LABEL,
    frequencies: Frequencies = None,
    min_area: Annotated[int, typer.Option(min=0, metavar="PIXELS", help="Ignore smaller regions.")] = 0,
    limit: Limit = None,
    json: Json = None,
    picture: Picture = None,
    no_progress: NoProgress = False,
) -> int:
    """Generate all masks of each image and measure how many of its known regions they cover.

    Average recall over IoU 0.50 to 0.95 of the 10, 100 and 1000 masks per image with the highest predicted IoU, by
    pycocotools, class-agnostic. An image that several annotators marked counts once per annotator. The mask thresholds
    are those of `samray label`: lower thresholds give more masks and more recall.

    --protocol paper also ranks by stability. Its three mask settings are those of the paper unless the command line
    sets them.

    Examples:

      samray evaluate proposals labels/ --limit 200 --picture sheet.jpg

      samray evaluate proposals lvis/ --protocol paper model.name=vit_h

      samray evaluate proposals bsds500/val.parquet model.name=vit_b masks.box_nms_thresh=0.9 masks.pred_iou_thresh=0.5
    """
    from samray.evaluate.frequencies import read_frequencies
    from samray.evaluate.pictures import offer_masks, proposal_sheet
    from samray.evaluate.proposals import PAPER_MASKS, by_confidence_and_stability, by_predicted_iou, evaluate_proposals
    from samray.masks.generator import MaskGenerator

    paper = protocol is Protocol.PAPER
    defaults = [f"masks.{name}={value}" for name, value in PAPER_MASKS.items()] if paper else []
    words, config = parse_settings([data, *(settings or ())], preset, ProposalsCommand.sections, defaults)
    groups = None if frequencies is None else read_frequencies(frequencies)
    run = _Run(words, limit, config, json, picture)
    sheet = proposal_sheet() if picture else None
    with run.bar(not no_progress) as on_image:
        figures = evaluate_proposals(
            MaskGenerator(run.model, config.masks),
            run.images,
            min_area=min_area,
            rank=by_confidence_and_stability if paper else by_predicted_iou,
            frequencies=groups,
            on_image=on_image,
            on_masks=lambda image, masks: offer_masks(sheet, image, masks) if sheet else None,
        )
    used = {"protocol": protocol.value, "min_area": min_area, "masks": config.masks.model_dump(mode="json")}
    run.finish({**figures, **used}, _proposal_rows(figures), sheet)
    return 0


def _proposal_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    by_size = {size: figures[f"ar_1000_{size}"] for size in ("small", "medium", "large")}
    sizes = ", ".join(f"{size} {'-' if math.isnan(recall) else f'{recall:.4f}'}" for size, recall in by_size.items())
    return [
        ("AR@10", f"{figures['ar_10']:.4f}"),
        ("AR@100", f"{figures['ar_100']:.4f}"),
        ("AR@1000", f"{figures['ar_1000']:.4f}; {sizes}"),
        *_frequency_rows(figures),
        ("largest region", _largest_in_words(figures)),
        ("regions", f"{figures['num_regions']:,}"),
        ("masks", f"{figures['num_masks']:,}, {figures['num_masks'] / max(figures['num_images'], 1):.1f} per image"),
    ]


def _largest_in_words(figures: dict[str, Any]) -> str:
    shares = figures["largest_found_50"], figures["largest_found_70"]
    if any(map(math.isnan, shares)):
        return "-"
    return "found in {:.0%} of the images at IoU 0.5, in {:.0%} at 0.7".format(*shares)


def _frequency_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The recall of LVIS's groups of classes, if it was measured."""
    from samray.evaluate.proposals import FREQUENCIES

    return [
        (
            f"AR@1000, {group}",
            f"{figures[f'ar_1000_{group}']:.4f} of {count(number, 'region')}" if number else "no region",
        )
        for group in FREQUENCIES
        if (number := figures.get(f"num_regions_{group}")) is not None
    ]


# --- shared by the commands -----------------------------------------------------------------------------------------


def parse_settings(
    words: list[str], preset: str | None, sections: Sections, defaults: Sequence[str] = ()
) -> tuple[str, Config]:
    """DATA and the settings, from the arguments, which win over the defaults (section.key=value).

    Raises: ConfigError, also for settings of other sections.
    """
    overrides, (data, *extra) = split_settings(words, ["DATA"])
    for word in overrides:
        if word.partition(".")[0] not in sections:
            raise ConfigError(f"{word} does not apply here; this command takes settings of {' and '.join(sections)}")
    return data, load_config(preset, None, [*defaults, *overrides, *extra])


class _Run:
    """DATA, a model, and where the results go. Reports problems with DATA before a model is downloaded."""

    def __init__(self, data: str, limit: int | None, config: Config, json: str | None, picture: str | None) -> None:
        from samray.evaluate.failures import Failures
        from samray.evaluate.pictures import picture_format
        from samray.evaluate.regions import RegionData
        from samray.sam.checkpoints import load_configured

        self.config, self.json, self.picture = config, json, picture
        self.picture_format = picture_format(picture) if picture else ""
        self.images = RegionData(data, limit)
        self.model = load_configured(config.model)
        self.failures = Failures()
        self.seconds = 0.0

    @contextmanager
    def bar(self, enabled: bool) -> Iterator[Callable[[Failures], None]]:
        """Show on a terminal how many images are done; yields the callback to call after each image."""
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not (enabled and console.is_terminal)) as bar:
            task = bar.add_task("images", total=len(self.images))
            began = time.monotonic()

            def on_image(failures: Failures) -> None:
                self.failures = failures
                failed = f", {len(failures)} failed" if len(failures) else ""
                bar.update(task, advance=1, description=f"images{failed}")

            yield on_image
            self.seconds = time.monotonic() - began

    def finish(self, figures: dict[str, Any], rows: list[tuple[str, str]], sheet: Sheet | None) -> None:
        """Print the results, or only JSON if that goes to stdout; write the requested files.

        Raises: SamrayError if there are no results, StorageError.
        """
        examples = self.failures.examples
        reasons = "; ".join(f"{number} {reason} ({examples[reason]})" for reason, number in figures["failures"].items())
        if figures["num_images"] == 0:
            raise SamrayError(f"none of {count(figures['num_failed'], 'image')} could be used: {reasons}")
        if figures["num_regions"] == 0:
            least = count(max(figures["min_area"], 1), "pixel")
            raise SamrayError(
                f"DATA {self.images.where} has no region of at least {least}; lower --min-area or raise --limit"
            )
        if self.json == "-":
            print(self._as_json(figures), end="")
        else:
            table = two_columns()
            for row in rows:
                table.add_row(*row)
            table.add_row("images", f"{figures['num_images']:,}")
            if reasons:
                table.add_row("failed images", f"{figures['num_failed']:,}: {escape(reasons)}")
            table.add_row("model", escape(_model_in_words(self.config)))
            table.add_row("time", f"{self.seconds:.1f} s on {self.model.device}")
            Console(highlight=False).print(table)
        if self.json not in (None, "-"):
            storage.put(storage.normalize(str(self.json)), self._as_json(figures).encode())
        if self.picture and sheet is not None:
            storage.put(storage.normalize(self.picture), sheet.encode(self.picture_format))

    def _as_json(self, figures: dict[str, Any]) -> str:
        seconds = {"seconds": round(self.seconds, 3)}
        return as_json({**figures, **seconds}, self.config, self.images, self.model)


def _model_in_words(config: Config) -> str:
    files = _weights(config)
    adapter = "" if files["adapter"] is None else f" with the adapter {files['adapter']}"
    return f"{config.model.name}, {files['checkpoint'] or 'its own weights'}{adapter}"


def _weights(config: Config) -> dict[str, str | None]:
    """The settings that name files of weights, as they may be shown."""
    files = {"checkpoint": config.model.checkpoint, "adapter": config.model.adapter}
    return {key: None if file is None else storage.redact(file) for key, file in files.items()}


def write_json(
    where: str | None, figures: dict[str, Any], config: Config, images: RegionData | NamedScenes, model: Sam | None
) -> None:
    """Write the results as JSON to a file, to stdout for -, or not at all for None. Raises: StorageError."""
    if where == "-":
        print(as_json(figures, config, images, model), end="")
    elif where is not None:
        storage.put(storage.normalize(where), as_json(figures, config, images, model).encode())


def as_json(figures: dict[str, Any], config: Config, images: RegionData | NamedScenes, model: Sam | None) -> str:
    """The results, and what they were measured with and on. model: None leaves the keys about it null."""
    from samray.sam.weights_file import WeightsFile

    settings = config.model
    seconds = {"seconds": figures["seconds"]} if "seconds" in figures else {}
    content = {
        **{key: _plain(value) for key, value in figures.items() if key != "seconds"},
        "model": settings.name if model else None,
        **(_weights(config) if model else {"checkpoint": None, "adapter": None}),
        **(
            WeightsFile(settings.name, settings.checkpoint, settings.adapter).identity
            if model
            else {"checkpoint_sha256": None}
        ),
        "data": images.where,
        "layout": images.layout,
        "device": str(model.device) if model else None,
        "dtype": str(model.dtype).removeprefix("torch.") if model else None,
        **seconds,
        "versions": {
            "samray": __version__,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in _PACKAGES},
        },
    }
    return jsonlib.dumps(content, indent=2) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN: use null."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
