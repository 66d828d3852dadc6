"""What a format is: a class of options and some functions. A file defines one, and a row in `formats` registers it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ValidationError

from samray.config.base import Settings, SettingsError, allowed_values, as_typed
from samray.exports import names

if TYPE_CHECKING:
    import pyarrow as pa

    from samray.exports.pieces import Done, Files, Job, Piece

IMAGES_PER_PIECE: Final = 128
"""Images that one task exports at a time; sa1b --tar and coco hold them in memory as text, polygons are the longest."""


class ExportOptions(BaseModel):
    """The options of a format: a subclass with a default for each field, and below each field its help text.

    `samray export --help`, the keywords of `samray.export` and the checks of both come from the fields. A field is a
    bool that defaults to False, or it may be None, which leaves the choice to the format.
    """

    model_config = Settings.model_config

    if not TYPE_CHECKING:  # for type checkers the signature stays the one made from the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise SettingsError([_sentence(type(self), problem) for problem in error.errors()]) from None

    def chosen(self) -> dict[str, Any]:
        """The options that are not at their default, as JSON: what the identity of an export holds."""
        return self.model_dump(exclude_defaults=True)


def as_option(name: str) -> str:
    """`--with-images` for `with_images`."""
    return f"--{name.replace('_', '-')}"


def _sentence(cls: type[ExportOptions], problem: Any) -> str:
    """One of pydantic's error entries as a clause in the words of the command line."""
    if not problem["loc"]:  # two options disagree: the validator's own words
        return str(problem["ctx"]["error"])
    name = str(problem["loc"][0])
    allowed = allowed_values(cls.model_fields[name]).removesuffix(" or null")
    return f"{as_option(name)}={as_typed(problem['input'])} is not allowed; it takes {allowed}"


def _whole_pieces(options: Any) -> tuple[int, int | None]:
    return IMAGES_PER_PIECE, None


def _nothing_assembled(job: Job[Any], file: int) -> list[str]:
    return []


def _no_chunks(job: Job[Any], name: str, pieces: list[Piece]) -> Iterator[bytes]:
    yield from ()


def _no_check(job: Job[Any]) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A format: its options, and the functions that make its files."""

    help: str
    """One line for `samray export --help`."""
    options: type[ExportOptions] = ExportOptions
    write: Callable[[Job[Any], Piece, Iterator[pa.Table], Done], Files]
    """The files of a piece, given its rows that did not fail."""
    sizes: Callable[[Any], tuple[int, int | None]] = _whole_pieces
    """Given the options: images per piece, and images per file that is assembled from pieces (None: one for all)."""
    names_files: bool = False
    """Whether files have the names of images, so that two images might want the same one."""
    stem_of: Callable[[str], str] = names.stem_of
    """The stem of an image's files, given the image's name."""
    endings: tuple[str, ...] = field(default=())
    """What the format puts behind a stem, if it is not in `names.ENDINGS`."""
    assembled: Callable[[Job[Any], int], list[str]] = _nothing_assembled
    """The names of the files that the pieces of one file number are assembled to."""
    chunks: Callable[[Job[Any], str, list[Piece]], Iterator[bytes]] = _no_chunks
    """The content of one of those."""
    check: Callable[[Job[Any]], None] = _no_check
    """Raises: ConfigError if the export is known to fail."""
