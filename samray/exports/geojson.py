"""GeoJSON: one file per image, NAME.geojson, a feature per mask.

Coordinates are longitude and latitude (RFC 7946), which GIS programs and web maps expect. --coordinates crs keeps the
image's own CRS and names it in the member `crs` of older GeoJSON, which GDAL and QGIS read. --coordinates pixels has
pixels of the image, from its upper left corner, as QuPath and other viewers of microscopy expect.

Masks of an image that does not say where it is are left out: its file has no features.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from samray.errors import ConfigError
from samray.exports.base import Format
from samray.exports.geometry import GeoOptions, NoPlaceError, as_geojson, check_geo, parsed_crs, polygons_of
from samray.exports.images import LabelledImage, images_of
from samray.exports.pieces import LeftOut

if TYPE_CHECKING:
    import pyarrow as pa

    from samray.exports.geometry import Coordinates
    from samray.exports.pieces import Files, Job, Piece


def check(job: Job[GeoOptions]) -> None:
    check_geo(job, _coordinates(job.options))


def _coordinates(options: GeoOptions) -> Coordinates:
    return options.coordinates or "wgs84"


def write(job: Job[GeoOptions], piece: Piece, tables: Iterable[pa.Table]) -> Files:
    """Write one file per image of the piece."""
    num_left_out = 0
    for table in tables:
        for image in images_of(table):
            try:
                collection = feature_collection(image, job.options)
            except NoPlaceError:
                num_left_out += len(image.ids)
                collection = {"type": "FeatureCollection", "name": image.file_name, "features": []}
            yield f"{job.stem(image)}.geojson", json.dumps(collection, allow_nan=False).encode()
    return LeftOut(num_masks=num_left_out)


def feature_collection(image: LabelledImage, options: GeoOptions) -> dict[str, Any]:
    """The content of the image's file. Raises: NoPlaceError; ConfigError if GeoJSON cannot name its CRS."""
    coordinates = _coordinates(options)
    crs = {}
    features = list(_features(image, coordinates, options.simplify))
    if coordinates == "crs" and image.geo is not None:
        crs = {"crs": {"type": "name", "properties": {"name": _urn(image.geo["crs"], image)}}}
    return {"type": "FeatureCollection", "name": image.file_name, **crs, "features": features}


def _features(image: LabelledImage, coordinates: Coordinates, simplify: float | None) -> Iterator[dict[str, Any]]:
    for index, polygons in enumerate(polygons_of(image, coordinates, simplify)):
        names = {}
        if image.labels:
            names = {"label": image.labels[index], "label_score": image.label_scores[index]}
        yield {
            "type": "Feature",
            "id": image.ids[index],
            "geometry": as_geojson(polygons),
            "properties": {
                "image_id": image.image_id,
                "area": image.area[index],
                "predicted_iou": image.predicted_iou[index],
                "stability_score": image.stability_score[index],
                **names,
            },
        }


def _urn(wkt: str, image: LabelledImage) -> str:
    # 100: nothing that is only similar.
    code = parsed_crs(wkt).to_epsg(confidence_threshold=100)
    if code is None:
        raise ConfigError(
            f"the CRS of image {image.image_id} has no EPSG code, which --coordinates crs needs in GeoJSON: use "
            "--format geoparquet, which stores any CRS, or --coordinates wgs84"
        )
    return f"urn:ogc:def:crs:EPSG::{code}"


FORMAT: Final = Format(
    help="one GeoJSON file per image, in longitude and latitude",
    options=GeoOptions,
    write=write,
    names_files=lambda options: True,
    endings=(".geojson",),
    check=check,
)
