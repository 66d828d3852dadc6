"""GeoParquet 1.1: the flat table with a column `geometry` (WKB) instead of run lengths.

A file has one CRS: that of its images or, with --coordinates wgs84, longitude and latitude. If the images of a piece
have several, each gets a file of its own, `part-000000-1.parquet` and so on. With --coordinates pixels the CRS is
unknown (null). Masks of an image that does not say where it is are left out.
Source: https://geoparquet.org/releases/v1.1.0/
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from samray.exports.base import Format
from samray.exports.flat import flat_rows
from samray.exports.geometry import (
    GeoOptions,
    NoPlaceError,
    Polygon,
    as_wkb,
    check_geo,
    georeference_of,
    parsed_crs,
    polygons_of,
)
from samray.exports.images import images_of
from samray.exports.pieces import LeftOut

if TYPE_CHECKING:
    from samray.exports.geometry import Coordinates
    from samray.exports.pieces import Files, Job, Piece

_IMAGES_PER_FILE: Final = 256
"""Some 25,000 masks, whose polygons are held in memory as compressed Parquet."""

GEOMETRY: Final = pa.field("geometry", pa.binary())

BOX: Final = pa.field("bbox", pa.struct([(side, pa.float64()) for side in ("xmin", "ymin", "xmax", "ymax")]))
"""Bounding box per geometry, for readers that need only a part of the file."""

_GROUP_BYTES: Final = 2**24
"""Bytes of geometry per row group."""

_DROPPED: Final = ("size", "counts")


class GeoParquetOptions(GeoOptions):
    images_per_file: int | None = Field(None, gt=0)
    """Images per Parquet file; default 256."""


def check(job: Job[GeoParquetOptions]) -> None:
    check_geo(job, _coordinates(job.options))


def _coordinates(options: GeoOptions) -> Coordinates:
    return options.coordinates or "crs"


def write(job: Job[GeoParquetOptions], piece: Piece, tables: Iterable[pa.Table]) -> Files:
    """Write the piece's masks: one file for each CRS."""
    coordinates = _coordinates(job.options)
    files: dict[str | None, _File] = {}
    num_left_out = 0
    for table in tables:
        # Image by image: the polygons of many would be much larger than their file.
        for number, image in enumerate(images_of(table)):
            try:
                crs, _ = georeference_of(image, coordinates)
                member = _crs_json(crs, coordinates)
                geometries = list(polygons_of(image, coordinates, job.options.simplify))
            except NoPlaceError:
                num_left_out += len(image.ids)
                continue
            if not geometries:
                continue
            rows = flat_rows(table.slice(number, 1)).drop_columns(list(_DROPPED))
            crs = crs if coordinates == "crs" else None
            if crs not in files:
                files[crs] = _File(rows.schema, member)
            files[crs].add(rows, geometries)
    for number, file in enumerate(files.values()):
        suffix = f"-{number}" if number else ""
        yield f"part-{piece.number:06d}{suffix}.parquet", file.close()
    return LeftOut(num_masks=num_left_out)


class _File:
    """A Parquet file that is written in memory."""

    def __init__(self, columns: pa.Schema, crs: dict[str, Any]) -> None:
        """crs: the member `crs` of the metadata."""
        self._sink = pa.BufferOutputStream()
        schema = columns.append(GEOMETRY).append(BOX)
        # In the schema's metadata, which readers of a folder look at. Therefore without what is known only at the end.
        self._schema = schema.with_metadata({"geo": json.dumps(_metadata(crs))})
        self._writer = pq.ParquetWriter(self._sink, self._schema, compression="zstd", write_page_index=True)
        self._waiting: list[pa.Table] = []
        self._num_bytes = 0

    def add(self, rows: pa.Table, geometries: list[list[Polygon]]) -> None:
        wkb = pa.array(map(as_wkb, geometries), GEOMETRY.type)
        boxes = pa.array(map(_box_of, geometries), BOX.type)
        columns = [*rows.columns, wkb, boxes]
        self._waiting.append(pa.Table.from_arrays(columns, schema=self._schema))
        self._num_bytes += wkb.nbytes
        if self._num_bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks())
        self._waiting, self._num_bytes = [], 0

    def close(self) -> bytes:
        self._flush()
        self._writer.close()
        return bytes(self._sink.getvalue())


def _box_of(polygons: list[Polygon]) -> dict[str, float] | None:
    if not polygons:
        return None
    points = np.concatenate([polygon[0] for polygon in polygons])
    return dict(zip(("xmin", "ymin", "xmax", "ymax"), [*points.min(axis=0), *points.max(axis=0)], strict=True))


def _metadata(crs: dict[str, Any]) -> dict[str, Any]:
    column = {
        "encoding": "WKB",
        "geometry_types": ["Polygon", "MultiPolygon"],
        **crs,
        "orientation": "counterclockwise",
        "edges": "planar",
        "covering": {"bbox": {side.name: [BOX.name, side.name] for side in BOX.type}},
    }
    return {"version": "1.1.0", "primary_column": GEOMETRY.name, "columns": {GEOMETRY.name: column}}


def _crs_json(wkt: str | None, coordinates: Coordinates) -> dict[str, Any]:
    """Without `crs` the coordinates are longitude and latitude; null is an unknown CRS. Raises: NoPlaceError."""
    if coordinates == "wgs84":
        return {}
    return {"crs": None if wkt is None else _projjson(wkt)}


@lru_cache(64)
def _projjson(wkt: str) -> dict[str, Any]:
    from samray.inputs.gdal_files import gdal_errors

    try:
        crs_json: dict[str, Any] = parsed_crs(wkt).to_dict(projjson=True)
    except gdal_errors() as error:
        raise NoPlaceError from error
    if not crs_json:
        raise NoPlaceError
    return crs_json


FORMAT: Final = Format(
    help="GeoParquet with one row per mask, in the CRS of the images",
    options=GeoParquetOptions,
    sizes=lambda options: (options.images_per_file or _IMAGES_PER_FILE, None),
    write=write,
    check=check,
)
