"""`samray demo`: label photographs, and painted scenes with known masks, with the real pipeline; report how well."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask
from rich.console import Console
from rich.markup import escape

from samray.config import Config
from samray.errors import ConfigError
from samray.output.shards import done_shards, read_shard
from samray.scenes.photographs import Photograph, photograph_files
from samray.scenes.scene import Scene, make_scene
from samray.text import count, two_columns

if TYPE_CHECKING:
    from samray.pipeline.report import LabelReport

SIZES_HW = ((480, 640), (640, 480), (512, 512), (384, 768))
"""The scenes cycle through these sizes: different aspect ratios, as in photographs."""

PICTURE_HEIGHT: Final = 250
"""Height of the photographs in the demo's picture, pixels."""

NOTICE: Final = "PHOTOGRAPHS.txt"
"""Authors and licences of the photographs."""

_EMBEDDED = "tiny"
_NEXT_SETTINGS = ("model.name=vit_t", "masks.points_per_side=16")
"""Grid in the demo's last line. With 32 points per side, the default, a machine without a GPU would take four times as
long."""

Photographs = Sequence[tuple[Photograph, Path]]


@dataclass(frozen=True, slots=True)
class ProposalQuality:
    """How well the generated masks cover the known ones, on the painted scenes."""

    num_objects: int
    num_masks: int
    """All generated masks, whether they cover a known object or not."""
    mean_best_iou: float
    """Mean over known objects of the IoU with the best matching mask; 0 for objects that no mask touches."""
    average_recall: float
    """AR@1000, as in `samray evaluate proposals`."""


def run_demo(
    directory: Path, config: Config, num_scenes: int, *, show: bool = False, options: Sequence[str] = ()
) -> int:
    """Label photographs and scenes, compare, report; returns the exit code. A second call on the same directory labels
    nothing again; a call with another model labels the same images with it.

    show: open the report in the browser, if there is a display. options: the other words of this command line, for the
    one that is printed at the end.
    """
    from samray.evaluate.scenes import evaluate_clicks
    from samray.pipeline.report import print_report
    from samray.pipeline.run import label
    from samray.report.output import open_page
    from samray.sam.checkpoints import load_configured

    model = load_configured(config.model)
    console = Console(stderr=True, highlight=False)
    photographs, scenes = photograph_files(), make_scenes(num_scenes)
    write_images(directory, scenes, photographs)
    images = f"{count(len(photographs), 'photograph')} and {count(num_scenes, 'painted scene')}"
    console.print(f"{images} are in {directory / 'images'}", markup=False, soft_wrap=True)
    if not photographs:
        console.print("scikit-image is not installed, or without its photographs: only painted scenes are labelled")
    suffix = "" if config.model.name == _EMBEDDED else f"-{config.model.name}"
    labels = str(directory / f"labels{suffix}")
    report = label(str(directory / "images"), labels, config)
    if report.exit_code:
        print_report(report)
        return report.exit_code
    picture = directory / f"photographs{suffix}.jpg"
    num_on_photographs = draw_photographs(labels, photographs, picture)
    quality, clicks = compare(directory, labels), evaluate_clicks(model, scenes)
    page = _write_report(labels, quality, clicks, len(photographs))
    table = two_columns()
    if photographs:
        table.add_row("photographs", f"{len(photographs)}, with {num_on_photographs} masks: {escape(str(picture))}")
    _add_figures(table, report, num_scenes, quality, clicks)
    table.add_row("labels", escape(labels))
    table.add_row("report", escape(page))
    out = Console(highlight=False)
    out.print(table, soft_wrap=True)
    if show and not open_page(page):
        console.print("this machine has no display; open the report in any browser")
    if config.model.name == _EMBEDDED:
        # Outside of the table, which would wrap it, to be copied.
        words = "\nThe same with MobileSAM, a published model (downloads 41 MB; takes minutes without a GPU):"
        out.print(words, soft_wrap=True)
        out.print(next_command(directory, options), soft_wrap=True, markup=False)
    return 0


def _write_report(labels: str, quality: ProposalQuality, clicks: dict[str, Any], num_photographs: int) -> str:
    """The report of labels, with the figures about the scenes, photographs first; returns its location."""
    from samray.report.output import write_report
    from samray.report.page import Figure

    agreement = [
        Figure(f"{quality.mean_best_iou:.2f}", "mean IoU", f"of the best matching mask, {quality.num_objects} objects"),
        Figure(f"{quality.average_recall:.2f}", "average recall", "over IoU from 0.50 to 0.95"),
        Figure(f"{clicks['miou']:.2f}", "mean IoU of one click", f"on {clicks['num_regions']} whole objects"),
    ]
    return write_report(labels, num_first=num_photographs, agreement=agreement)


def _add_figures(
    table: Any, report: LabelReport, num_scenes: int, quality: ProposalQuality, clicks: dict[str, Any]
) -> None:
    per_scene = f"{quality.num_masks / num_scenes:.1f} masks per scene"
    table.add_row("scenes", f"{num_scenes} with shapes and textures that the model was not trained on, {per_scene}")
    covered = f"mean IoU {quality.mean_best_iou:.2f} of the best mask, average recall {quality.average_recall:.2f}"
    table.add_row("known objects", f"{quality.num_objects}: {covered}")
    table.add_row("one click", f"mean IoU {clicks['miou']:.2f} on {clicks['num_regions']} whole objects")
    if report.num_labelled:
        speed = f"{report.device_seconds / report.num_labelled:.2f} s per image in the model"
        table.add_row("speed", f"{speed}; {report.wall_s:.0f} s in total, including the start of Ray")
    else:
        table.add_row("speed", "nothing to label: an earlier demo did it")


def next_command(directory: Path, options: Sequence[str] = ()) -> str:
    """The command that does the same with MobileSAM, for any shell. options: as for `run_demo`."""
    program = [sys.executable, "-m", "samray"]
    if Path(sys.argv[0]).name == "samray":
        # By its name if the shell finds it, else as it was called, from a virtual environment for example.
        program = ["samray"] if shutil.which("samray") else [sys.argv[0]]
    replaced = tuple(setting.partition("=")[0] for setting in _NEXT_SETTINGS)
    kept = [word for word in options if not word.startswith(("model.", *replaced))]
    return shlex.join([*program, "demo", str(directory), *kept, *_NEXT_SETTINGS])


# --- images --------------------------------------------------------------------------------------------------------


def make_scenes(number: int) -> list[Scene]:
    """The demo's scenes: always the same, from the split that training never uses."""
    return [make_scene(10_000 + i, SIZES_HW[i % len(SIZES_HW)], split="heldout") for i in range(number)]


def write_images(directory: Path, scenes: Sequence[Scene], photographs: Photographs = ()) -> None:
    """Write directory/images/photographs/ and images/scenes/scene-*.jpg, the credits of the photographs, and the known
    masks of the scenes as COCO RLE to directory/known_masks.json.

    Raises ConfigError if the directory has the images of another demo, whose labels would not match these.
    """
    known = {f"scene-{i:03d}.jpg": [_encode(mask) for mask in scene.masks] for i, scene in enumerate(scenes)}
    text = json.dumps(known)
    truth, images = directory / "known_masks.json", directory / "images"
    names = {f"photographs/{file.name}" for _, file in photographs} | {f"scenes/{name}" for name in known}
    if truth.exists():
        existing = {file.relative_to(images).as_posix() for file in images.rglob("[!.]*") if file.is_file()}
        if truth.read_text() != text or existing != names:
            raise ConfigError(
                f"{directory} has the images of a different demo, or of an older samray's; choose another directory,"
                " as in `samray demo DIR`, or delete it"
            )
        return
    if images.exists():
        raise ConfigError(f"{images} exists and is not from a finished demo; choose another directory or delete it")
    (images / "scenes").mkdir(parents=True)
    # Labelled in the order of their names: the photographs come first.
    if photographs:
        (images / "photographs").mkdir()
        credits = "\n".join(photograph.credit for photograph, _ in photographs)
        (directory / NOTICE).write_text(f"The photographs come with scikit-image.\n\n{credits}\n")
    for _, file in photographs:
        shutil.copyfile(file, images / "photographs" / file.name)
    for name, scene in zip(known, scenes, strict=True):
        data = io.BytesIO()
        Image.fromarray(scene.image).save(data, "JPEG", quality=92)
        (images / "scenes" / name).write_bytes(data.getvalue())
    truth.write_text(text)  # last: marks that all images are written


# --- results -------------------------------------------------------------------------------------------------------


def draw_photographs(labels: str, photographs: Photographs, picture: Path) -> int:
    """Write a JPEG of the photographs, and below them the same with the masks in labels; returns the number of masks.

    Writes nothing without photographs.
    """
    from samray.report import pictures

    masks_of = dict(_labelled(labels))
    masks_of_each = [masks_of[file.name] for _, file in photographs]
    pixels = [np.asarray(Image.open(file).convert("RGB")) for _, file in photographs]
    if photographs:
        above = [pictures.plain(image, PICTURE_HEIGHT) for image in pixels]
        below = [
            pictures.draw_masks(image, pictures.masks_to_draw(masks), PICTURE_HEIGHT)
            for image, masks in zip(pixels, masks_of_each, strict=True)
        ]
        picture.write_bytes(pictures.picture([("", above), ("", below)]))
    return sum(map(len, masks_of_each))


def compare(directory: Path, labels: str) -> ProposalQuality:
    """Compare the masks in `labels` with the known ones of the scenes in directory."""
    from samray.evaluate.proposals import Marked, average_recall, best_ious

    known = json.loads((directory / "known_masks.json").read_text())
    marked: list[Marked] = []
    best: list[float] = []
    for name, records in _labelled(labels):
        if name in known:
            masks = [record["segmentation"] for record in records]
            marked.append(Marked(known[name], masks, [record["predicted_iou"] for record in records]))
            best += best_ious(known[name], masks).tolist()
    num_masks = sum(len(image.masks) for image in marked)
    if not best:
        return ProposalQuality(0, num_masks, 0.0, 0.0)
    return ProposalQuality(len(best), num_masks, float(np.mean(best)), average_recall(marked)["ar_1000"])


def _labelled(labels: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The name of each labelled image, without its folders, and its masks."""
    for shard in sorted(done_shards(labels)):
        for row in read_shard(labels, shard).select(["image", "annotations"]).to_pylist():
            yield row["image"]["file_name"].rpartition("/")[2], row["annotations"]


def _encode(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
