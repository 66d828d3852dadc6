"""Selection of images and masks by one SQL expression, `--where`, as DuckDB or Polars would read it.

    samray export labels/ coco/ --format coco --where "area > 0.01 * width * height and label in ('dog', 'cat')"

A term (what `and` joins) with a column of the masks selects masks; a term with columns of the image alone selects
images. An image stays when its last mask goes, as an image without masks: `num_selected > 0` drops it, too. A failed
image has no width, height and masks. As in SQL, a comparison with null is neither true nor false, and selects nothing.

sqlglot parses the text, in DuckDB's dialect, and this module computes the tree with pyarrow, from a list of allowed
nodes. Why not an engine: DuckDB and Polars also read files, the environment and other tables, which a label set's user
must not be able to make a shared job do, and they are tens to hundreds of megabytes on every node. sqlglot is pure
Python without dependencies, takes 0.1 s to import (only when an expression is given), and knows the precedence and the
quoting of SQL better than a parser of our own. A text that is not on the list cannot run: there is nothing to run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from samray import storage
from samray.config.base import did_you_mean
from samray.errors import ConfigError, StorageError
from samray.output.quality_columns import default_quality_folder, quality_columns, quality_digest, values_of
from samray.output.where_nodes import QUALITY, Values, evaluate, parse, shown

if TYPE_CHECKING:
    from sqlglot import exp

Bools = npt.NDArray[np.bool_]

NUM_MASKS: Final = "num_masks"
NUM_SELECTED: Final = "num_selected"
_COUNTS: Final = {NUM_MASKS: pa.int64(), NUM_SELECTED: pa.int64()}
_MASKS: Final = "annotations.list.element."
_NOT_SELECTABLE: Final = ("segmentation",)
"""Fields of a mask that no expression may use: run-length strings are most of an output's bytes, and mean nothing in
SQL."""


@dataclass(frozen=True, slots=True)
class Where:
    """A selection of images and of their masks. Small and picklable."""

    text: str
    quality: str | None = None
    """Where a `samray quality` of the output is, for the columns of quality."""
    digest: str = ""
    """Its `quality_digest`, if the expression uses it."""

    @property
    def uses_quality(self) -> bool:
        return any(name.startswith(QUALITY) for term in _terms(self.text) for name in term.names)

    def to_json(self) -> dict[str, str]:
        """Identity of the selection: part of the identity of an output that is made from it."""
        identity = {"where": storage.redact(self.text)}
        if not (self.quality and self.uses_quality):
            return identity
        # With the digest: a job must not go on with the columns of a later check in the same place.
        return identity | {"quality": f"{storage.redact(self.quality)}, SHA-256 {self.digest[:16]}"}

    def check(self, schema: pa.Schema) -> None:
        """Check the expression against the columns of an output (`schema_of`).

        Raises: ConfigError that says what is wrong, and names the closest column.
        """
        images, masks = image_columns(schema), mask_columns(schema)
        for column in (column for term in _terms(self.text) for column in term.columns):
            if column[1].startswith(QUALITY):
                self._check_quality(column[1].removeprefix(QUALITY))
            else:
                _check_column(column, images, masks, self.text)
        for term in _terms(self.text):
            if NUM_SELECTED in term.names and any(name in masks for name in term.names):
                raise ConfigError(
                    f"where: {NUM_SELECTED} counts the masks that the other terms select: it cannot be in one term "
                    f"with a column of the masks, as in {shown(term.tree)}"
                )
        # Types are found wrong on no rows as well as on many.
        try:
            self.flags(schema.empty_table())
        except RecursionError:
            raise ConfigError("where: too many operations within one term") from None

    def _check_quality(self, name: str) -> None:
        if self.quality is None:
            raise ConfigError(f"where: quality.{name} needs a `samray quality` of the output")
        known = quality_columns(self.quality, self.digest)
        if name not in known:
            raise ConfigError(
                f"where: no column 'quality.{name}'{did_you_mean(name, known)}; columns of quality are "
                f"{', '.join(known)} (more with `samray quality --images`)"
            )

    def columns(self, schema: pa.Schema) -> list[str]:
        """The Parquet columns that `flags` needs."""
        images, masks = image_columns(schema), mask_columns(schema)
        names = {name for term in _terms(self.text) for name in term.names}
        paths = {images[name] for name in names & images.keys()}
        paths |= {"image.image_id"} if self.uses_quality else set()
        paths |= {_MASKS + name for name in names & masks.keys()}
        if names & _COUNTS.keys() and not names & masks.keys():
            paths.add(_MASKS + "id")
        return sorted(paths)

    @property
    def selects_masks(self) -> bool:
        """Whether a term may drop masks of a selected image."""
        return any(not term.of_images for term in _terms(self.text))

    @property
    def selects_images(self) -> bool:
        """Whether a term may drop images."""
        return any(term.of_images for term in _terms(self.text))

    def flags(self, table: pa.Table) -> tuple[Bools, Bools]:
        """Which images (N,) and which of their M masks (M,) are selected; all masks of a dropped image are dropped.

        table: rows with at least `columns`. Raises: ConfigError for values of types that do not go together.
        """
        frame = _Frame(table, self.quality, self.digest)
        images = np.ones(table.num_rows, bool)
        masks = np.ones(frame.num_masks, bool)
        late = []
        for term in _terms(self.text):
            if NUM_SELECTED in term.names:
                late.append(term)
            elif term.of_images:
                images &= self._flag(term, frame, table.num_rows, of_masks=False)
            else:
                masks &= self._flag(term, frame, frame.num_masks, of_masks=True)
        if late:
            frame.num_selected = np.bincount(frame.parents[masks], minlength=table.num_rows)
            for term in late:
                images &= self._flag(term, frame, table.num_rows, of_masks=False)
        return images, masks & images[frame.parents]

    def _flag(self, term: _Term, frame: _Frame, length: int, *, of_masks: bool) -> Bools:
        result = evaluate(term.tree, lambda name: frame.column(name, of_masks=of_masks))
        if isinstance(result, pa.Scalar):
            result = pa.repeat(result, length)
        if not pa.types.is_boolean(result.type):
            raise ConfigError(f"where: {shown(term.tree)} is not a condition: compare it with something")
        return np.asarray(pc.fill_null(result, False).to_numpy(zero_copy_only=False), bool)

    def apply(self, table: pa.Table) -> pa.Table:
        """The selected images, each with its selected masks. table: of `schema_of` a run."""
        return self.take(table, *self.flags(table))

    def take(self, table: pa.Table, images: Bools, masks: Bools) -> pa.Table:
        """`apply`, from the table's `flags`."""
        if self.selects_masks:
            table = keep_masks(table, masks)
        return table if images.all() else table.filter(pa.array(images))


def make_where(text: str | None, output: str, quality: str | None = None) -> Where | None:
    """A selection of an output; None selects all. quality: where its `samray quality` is, if not where that is by
    default. Raises: ConfigError for quality without an expression, a wrong expression, or a check that is not there;
    StorageError."""
    if text is None:
        if quality is not None:
            raise ConfigError("--quality is for an expression with columns of quality: use it with --where")
        return None
    where = Where(text, default_quality_folder(output) if quality is None else storage.normalize(quality))
    return replace(where, digest=quality_digest(str(where.quality))) if where.uses_quality else where


def drops_masks(where: Where | None, run: Mapping[str, Any]) -> bool:
    """Whether a selection may have dropped masks of its images: where, or one that a compacted output (`Plan.run`) was
    made with."""
    texts = [] if where is None else [where.text]
    before = run.get("compacted_where")
    while before:
        texts += [before["where"]] if "where" in before else []
        before = before.get("of")
    return any(Where(text).selects_masks for text in texts)


def keep_masks(table: pa.Table, masks: Bools) -> pa.Table:
    """The rows with only some of their masks. masks: (M,), over all rows."""
    annotations = table["annotations"].combine_chunks()
    parents = pc.list_parent_indices(annotations).to_numpy()
    ends = np.cumsum(np.bincount(parents[masks], minlength=table.num_rows))
    kept = annotations.flatten().filter(pa.array(masks))
    lists = type(annotations).from_arrays(
        pa.array(np.concatenate([[0], ends]), annotations.offsets.type), kept, type=annotations.type
    )
    return table.set_column(table.schema.get_field_index("annotations"), table.schema.field("annotations"), lists)


def image_columns(schema: pa.Schema) -> dict[str, str]:
    """Name in an expression -> Parquet column, of the columns with one value per image, without the counts."""
    of_image = {field.name: f"image.{field.name}" for field in schema.field("image").type}
    return of_image | {field.name: field.name for field in schema if field.name not in ("image", "annotations")}


def mask_columns(schema: pa.Schema) -> dict[str, pa.DataType]:
    """The columns with one value per mask."""
    fields = schema.field("annotations").type.value_type
    return {field.name: field.type for field in fields if field.name not in _NOT_SELECTABLE}


@dataclass(frozen=True, slots=True)
class _Term:
    """The operands of `and`."""

    tree: exp.Expr
    columns: tuple[tuple[str, str], ...]
    """(qualifier or "", name) of each column, in lower case; the name of one of quality with its qualifier."""

    @property
    def names(self) -> set[str]:
        return {name for _, name in self.columns}

    @property
    def of_images(self) -> bool:
        """Whether it uses no column of masks."""
        return not any(name in _MASK_NAMES for name in self.names)


_MASK_NAMES: Final = frozenset(
    ("id", "bbox", "area", "predicted_iou", "stability_score", "point_coords", "crop_box", "label", "label_score")
)


@lru_cache(16)
def _terms(text: str) -> tuple[_Term, ...]:
    return tuple(_Term(tree, tuple(columns)) for tree, columns in parse(text))


def _check_column(column: tuple[str, str], images: dict[str, str], masks: dict[str, Any], text: str) -> None:
    """Raises: ConfigError for a column that the output does not have."""
    qualifier, name = column
    known = {"": {*images, *masks, *_COUNTS}, "image": {*images, *_COUNTS}, "annotations": {*masks}}
    if qualifier not in known:
        near = did_you_mean(qualifier, [word for word in known if word])
        raise ConfigError(
            f"where: unknown table {qualifier!r}{near}; columns are those of image, annotations and quality"
        )
    if name in known[qualifier]:
        return
    if name in ("label", "label_score"):
        raise ConfigError(f"where: this output has no names, so there is no column {name!r}; `samray name` adds them")
    if name in _NOT_SELECTABLE:
        raise ConfigError(f"where: {name} cannot be used in an expression; use area and bbox")
    raise ConfigError(
        f"where: no column {name!r}{did_you_mean(name, sorted(known[qualifier]))}; columns of an image are "
        f"{', '.join([*images, *_COUNTS])}, of a mask {', '.join(masks)}"
        + (". Text is in single quotes" if f'"{name}"' in text.lower() else "")
    )


class _Frame:
    """Columns by name, one value per image or per mask."""

    def __init__(self, table: pa.Table, quality: str | None, digest: str) -> None:
        self._table, self._quality, self._digest = table, quality, digest
        self.num_selected: npt.NDArray[np.int64] | None = None
        self._masks: pa.StructArray | None = None
        self.parents = np.zeros(0, np.int64)
        self._num_masks = np.zeros(table.num_rows, np.int64)
        if "annotations" in table.column_names:
            annotations = table["annotations"].combine_chunks()
            self._masks = annotations.flatten()
            self.parents = np.asarray(pc.list_parent_indices(annotations).to_numpy(), np.int64)
            self._num_masks = np.bincount(self.parents, minlength=table.num_rows)

    @property
    def num_masks(self) -> int:
        return len(self.parents)

    def column(self, name: str, *, of_masks: bool) -> Values:
        if name in _MASK_NAMES:
            assert self._masks is not None
            if self._masks.type.get_field_index(name) < 0:
                raise StorageError(f"masks of a shard have no {name!r}; `samray verify` shows which")
            return self._masks.field(name)
        column = self._image_column(name)
        return column.take(pa.array(self.parents)) if of_masks else column

    def _image_column(self, name: str) -> pa.Array:
        if name == NUM_SELECTED:
            return pa.array(self._num_masks if self.num_selected is None else self.num_selected)
        if name == NUM_MASKS:
            return pa.array(self._num_masks)
        if name.startswith(QUALITY):
            assert self._quality is not None
            ids = self._image_column("image_id")
            return values_of(self._quality, self._digest, name.removeprefix(QUALITY), ids)
        if name in self._table.column_names:
            return self._table[name].combine_chunks()
        values = pc.struct_field(self._table["image"].combine_chunks(), name)
        # width * height of a large image is more than 32 bits hold.
        return values.cast(pa.int64()) if values.type == pa.int32() else values
