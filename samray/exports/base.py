"""The definition of a format: a class of options and some functions, in one file, plus one row in `formats`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ValidationError

from samray.config.base import Settings, SettingsError, allowed_values, as_typed
from samray.output import file_names as names

if TYPE_CHECKING:
    import pyarrow as pa

    from samray.exports.pieces import Files, Job, Piece

IMAGES_PER_PIECE: Final = 128
"""Images per piece: sa1b --tar and coco hold a piece in memory as text, of which polygons are the longest."""


class ExportOptions(BaseModel):
    """The options of a format: a subclass with a default for each field and its help text as docstring.

    `samray export --help`, the keywords of `samray.export` and their validation come from the fields. A field is a bool
    that defaults to False, or it may be None, which leaves the choice to the format.
    """

    model_config = Settings.model_config

    if not TYPE_CHECKING:  # type checkers keep the signature made from the fields

        def __init__(self, **values: Any) -> None:
            try:
                # pydantic's message shows field names and types; users know options.
                super().__init__(**values)
            except ValidationError as error:
                raise SettingsError([_sentence(type(self), problem) for problem in error.errors()]) from None

    def chosen(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON: part of the identity of an export."""
        # Without defaults: an option that is added later does not change the identity of older exports.
        return self.model_dump(exclude_defaults=True)


def as_option(name: str) -> str:
    """`--with-images` for `with_images`."""
    return f"--{name.replace('_', '-')}"


def _sentence(cls: type[ExportOptions], problem: Any) -> str:
    """Turn one of pydantic's error entries into a clause with the names of the command line."""
    if not problem["loc"]:  # from a model validator, about several options
        return str(problem["ctx"]["error"])
    name = str(problem["loc"][0])
    # null is how an option that is not given is stored; users do not type it.
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
    """A format: its options, and the functions that write its files."""

    help: str
    """One line for `samray export --help`."""
    options: type[ExportOptions] = ExportOptions
    write: Callable[[Job[Any], Piece, Iterable[pa.Table]], Files]
    """Yield the files of a piece, from its rows that did not fail."""
    sizes: Callable[[Any], tuple[int, int | None]] = _whole_pieces
    """From the options: images per piece, and images per assembled file (None: one file for all)."""
    names_files: Callable[[Any], bool] = lambda options: False
    """From the options: whether files are named after images, and could therefore collide."""
    stem_of: Callable[[str], str] = names.stem_of
    """The stem of an image's files, from the image's name."""
    endings: tuple[str, ...] = field(default=())
    """Extensions that the format appends to a stem, if not in `names.ENDINGS`."""
    assembled: Callable[[Job[Any], int], list[str]] = _nothing_assembled
    """The names of the files that are assembled from the pieces of one file number."""
    chunks: Callable[[Job[Any], str, list[Piece]], Iterator[bytes]] = _no_chunks
    """The content of one of those files."""
    check: Callable[[Job[Any]], None] = _no_check
    """Raises: ConfigError if the export is known to fail."""
