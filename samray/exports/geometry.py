"""Masks as polygons in the coordinates of their image's CRS, for GeoJSON and GeoParquet.

The edges of pixels are the edges of polygons, as in GDAL's polygonize: in the image's own CRS they are exact. Converted
to longitude and latitude only the corners are; between two corners the line is straight there.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from samray.errors import ConfigError
from samray.exports.base import ExportOptions
from samray.output.schema import is_transform
from samray.rle.polygons import Ring, outlines, parted
from samray.rle.runs import runs_of_image

if TYPE_CHECKING:
    from samray.exports.images import LabelledImage
    from samray.exports.pieces import Job

Points = npt.NDArray[np.float64]
"""(N, 2) x, y of a closed ring; the last point is the first."""

Polygon = list[Points]
"""The outer ring, counter-clockwise where y points up, then the holes, clockwise."""

Coordinates = Literal["wgs84", "crs", "pixels"]

WGS84: Final = "OGC:CRS84"

_NAMES_FILE: Final = re.compile(r'(?i)(?:(?:grids|init|file|catalog)=|PARAMETERFILE\s*\[[^\]]*)[^\s"\]]*[/\\]')
"""A path or address in WKT, which PROJ would open."""

_PIXELS: Final = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


class GeoOptions(ExportOptions):
    coordinates: Coordinates | None = None
    """wgs84: longitude and latitude (the default of geojson); crs: the CRS of each image (the default of geoparquet);
    pixels: of the image, which needs no CRS."""
    simplify: float | None = Field(None, gt=0)
    """Simplify polygons by up to this many pixels; smaller files, but not exact."""


def check_geo(job: Job[Any], coordinates: Coordinates) -> None:
    """Raises: ConfigError if a package is not installed, or OUTPUT lacks the column `geo` and the export needs it."""
    options = job.options
    if coordinates != "pixels":
        if not job.plan.run.get("geo"):
            raise ConfigError(
                "this OUTPUT does not say where its images are: it has no column `geo`, which a run has if INPUT has "
                "files named *.tif or *.tiff when it begins, and samray[geo] is installed; --coordinates pixels needs "
                "none, and labelling into a new OUTPUT adds the column"
            )
        _need("rasterio", f"--format {job.format}")
    if options.simplify is not None:
        _need("shapely", "--simplify of this format")


def _need(package: str, what: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise ConfigError(f"{what} needs {package}: pip install 'samray[geo]'") from error


class NoPlaceError(Exception):
    """The image has no CRS, or coordinates that do not exist in the CRS asked for."""


def polygons_of(image: LabelledImage, coordinates: Coordinates, simplify: float | None) -> Iterator[list[Polygon]]:
    """The polygons of each mask; none for a mask without pixels. Raises: NoPlaceError."""
    crs, transform = georeference_of(image, coordinates)
    hw = image.height, image.width
    for components in outlines(runs_of_image(image.image_id, image.counts, hw), hw):
        polygons = [_closed(parted(component)) for component in components]
        if simplify is not None:
            polygons = _simplified(polygons, simplify)
        yield _placed(polygons, transform, crs if coordinates == "wgs84" else None)


def georeference_of(image: LabelledImage, coordinates: Coordinates) -> tuple[str | None, tuple[float, ...]]:
    """The CRS as WKT and the transform; in pixels there is no CRS. Raises: NoPlaceError."""
    if coordinates == "pixels":
        return None, _PIXELS
    geo = image.geo or {}
    crs, transform = geo.get("crs"), geo.get("transform")
    if not crs or transform is None or not is_transform(transform):
        raise NoPlaceError
    a, b, _, d, e, _ = transform
    if a * e - b * d == 0:  # pixels without an area
        raise NoPlaceError
    parsed_crs(crs)
    return crs, tuple(transform)


@lru_cache(64)
def parsed_crs(wkt: str) -> Any:
    """rasterio's CRS. Raises: NoPlaceError."""
    from rasterio.crs import CRS

    from samray.inputs.gdal_files import gdal_errors

    if _NAMES_FILE.search(wkt):
        raise NoPlaceError
    try:
        return CRS.from_wkt(wkt)
    except gdal_errors() as error:
        raise NoPlaceError from error


def _closed(rings: Sequence[Ring]) -> Polygon:
    return [np.concatenate([ring, ring[:1]]).astype(np.float64) for ring in rings]


def _simplified(polygons: list[Polygon], tolerance: float) -> list[Polygon]:
    """Simplified so that they stay valid: no ring crosses itself or another one, also of another polygon."""
    import shapely

    if not polygons:
        return []
    exact = shapely.MultiPolygon([(polygon[0], polygon[1:]) for polygon in polygons])
    simple = shapely.simplify(exact, tolerance, preserve_topology=True)
    return [
        [np.asarray(ring.coords, np.float64) for ring in (polygon.exterior, *polygon.interiors)]
        for polygon in getattr(simple, "geoms", [simple])
    ]


def _placed(polygons: list[Polygon], transform: Sequence[float], crs: str | None) -> list[Polygon]:
    """In the coordinates of the transform and, with crs, from there in longitude and latitude."""
    if not polygons:
        return []
    a, b, c, d, e, f = transform
    points = np.concatenate([ring for polygon in polygons for ring in polygon])
    xs = a * points[:, 0] + b * points[:, 1] + c
    ys = d * points[:, 0] + e * points[:, 1] + f
    if crs is not None:
        from rasterio.warp import transform as warp

        from samray.inputs.gdal_files import gdal_errors

        try:
            longitudes, latitudes = warp(parsed_crs(crs), WGS84, xs, ys)
        except gdal_errors() as error:  # such as a CRS of another planet
            raise NoPlaceError from error
        xs, ys = np.asarray(longitudes, np.float64), np.asarray(latitudes, np.float64)
    placed = np.stack([xs, ys], axis=1)
    if not np.isfinite(placed).all():
        raise NoPlaceError
    rings = iter(np.split(placed, np.cumsum([len(ring) for polygon in polygons for ring in polygon])[:-1]))
    return [_turned([next(rings) for _ in polygon]) for polygon in polygons]


def _turned(polygon: Polygon) -> Polygon:
    """With the outer ring counter-clockwise: a transform may mirror it, and axes of a CRS may point south or west."""
    xs, ys = (polygon[0] - polygon[0][0]).T
    is_clockwise = np.dot(xs[:-1], ys[1:]) < np.dot(xs[1:], ys[:-1])
    return [ring[::-1] for ring in polygon] if is_clockwise else polygon


def as_geojson(polygons: list[Polygon]) -> dict[str, Any] | None:
    """The geometry; None for a mask without pixels."""
    if not polygons:
        return None
    lists = [[ring.tolist() for ring in polygon] for polygon in polygons]
    if len(lists) == 1:
        return {"type": "Polygon", "coordinates": lists[0]}
    return {"type": "MultiPolygon", "coordinates": lists}


def as_wkb(polygons: list[Polygon]) -> bytes | None:
    """Well-known binary, little-endian; None for a mask without pixels."""
    if not polygons:
        return None
    parts = [
        struct.pack("<BII", 1, 3, len(polygon))
        + b"".join(struct.pack("<I", len(ring)) + ring.astype("<f8").tobytes() for ring in polygon)
        for polygon in polygons
    ]
    return parts[0] if len(parts) == 1 else struct.pack("<BII", 1, 6, len(parts)) + b"".join(parts)
