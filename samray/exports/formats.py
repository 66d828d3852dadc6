"""The table of formats: what each is called, which options it takes, and the functions that make it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from samray.config.base import did_you_mean
from samray.errors import ConfigError
from samray.exports import coco, flat, label_map, names, sa1b, yolo
from samray.exports.pieces import Done, ExportOptions, Files, Job, Piece

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES_PER_PIECE: Final = 128
"""What a task exports at a time; sa1b --tar and coco hold it in memory as text, of which polygons are the longest."""

IMAGES_PER_TABLE: Final = 1024
"""Of a flat table: some 100,000 masks a file, held in memory as compressed Parquet."""


def _nothing_assembled(job: Job, file: int) -> list[str]:
    return []


def _no_chunks(job: Job, name: str, pieces: list[Piece]) -> Iterator[bytes]:
    yield from ()


def _no_check(job: Job) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One row of the table."""

    options: frozenset[str] = frozenset()
    """The fields of `ExportOptions` that mean something here."""
    write: Callable[[Job, Piece, Iterator[pa.Table], Done], Files]
    """The files of a piece, given its rows that did not fail."""
    images_per_piece: int = IMAGES_PER_PIECE
    names_files: bool = False
    """Whether files have the names of images, so that two might want the same one."""
    stem_of: Callable[[str], str] = names.stem_of
    """Those names, of the images' own."""
    assembled: Callable[[Job, int], list[str]] = _nothing_assembled
    """The names of the files that the pieces of one file number are put together to."""
    chunks: Callable[[Job, str, list[Piece]], Iterator[bytes]] = _no_chunks
    """What one of those holds."""
    check: Callable[[Job], None] = _no_check
    """Raises: ConfigError for what is known to fail."""


FORMATS: Final[dict[str, Format]] = {
    "sa1b": Format(options=frozenset({"tar", "with_images", "images_per_file"}), write=sa1b.write, names_files=True),
    "coco": Format(
        options=frozenset({"polygons", "images_per_file", "confident", "stable"}),
        write=coco.write,
        assembled=coco.assembled,
        chunks=coco.chunks,
    ),
    "yolo": Format(
        options=frozenset({"with_images", "simplify"}),
        write=yolo.write,
        names_files=True,
        assembled=yolo.assembled,
        chunks=yolo.chunks,
        check=yolo.check,
        stem_of=yolo.stem_of,
    ),
    "flat": Format(
        options=frozenset({"partitions", "images_per_file"}), write=flat.write, images_per_piece=IMAGES_PER_TABLE
    ),
    "label-map": Format(options=frozenset({"on_top"}), write=label_map.write, names_files=True),
}
"""Name -> how it is made."""


def format_of(name: str, options: ExportOptions) -> Format:
    """Raises: ConfigError for a name that is none, an option that means nothing there, or a value that cannot be."""
    if name not in FORMATS:
        raise ConfigError(f"there is no format {name!r}{did_you_mean(name, FORMATS)}; formats are {', '.join(FORMATS)}")
    for option, value in asdict(options).items():
        if value is None or value is False:  # 0 equals False, and is to be refused
            continue
        if option not in FORMATS[name].options:
            others = [other for other, row in FORMATS.items() if option in row.options]
            raise ConfigError(f"{as_option(option)} is an option of {' and '.join(others)}, not of {name}")
        if option in ("confident", "stable"):
            if not 0 <= value <= 1:
                raise ConfigError(f"{as_option(option)}={value} is not allowed: it is from 0 to 1")
        elif isinstance(value, int | float) and value <= 0:
            raise ConfigError(f"{as_option(option)}={value} is not allowed: it must be above 0")
    if name == "sa1b" and options.images_per_file and not options.tar:
        raise ConfigError("--images-per-file needs --tar: without it each image has a JSON file of its own")
    if options.on_top not in (None, "area", "predicted_iou"):
        raise ConfigError(f"--on-top={options.on_top} is not allowed: it is area or predicted_iou")
    return FORMATS[name]


def as_option(name: str) -> str:
    """`--with-images` of `with_images`."""
    return f"--{name.replace('_', '-')}"


def sizes_of(name: str, options: ExportOptions) -> tuple[int, int | None]:
    """How many images a piece has, and a file that is put together of pieces; None where that holds all."""
    row = FORMATS[name]
    if options.images_per_file and row.assembled is _nothing_assembled:
        return options.images_per_file, None  # one piece is one file
    return row.images_per_piece, options.images_per_file
