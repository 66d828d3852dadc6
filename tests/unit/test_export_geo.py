"""GeoJSON and GeoParquet: masks land where GDAL and geopandas put the same pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import rasterio.features
import shapely
from affine import Affine
from rasterio.crs import CRS
from rasterio.warp import transform_geom
from shapely.geometry import mapping, shape

from samray.errors import ConfigError, StorageError
from samray.exports import coco
from samray.output.compact import compact
from samray.output.plan import Plan, load_plan
from samray.output.verify import verify
from tests.support.exported import export
from tests.support.handmade import HEIGHT, WIDTH, annotation, decoded, read_rows, write_output

UTM = CRS.from_epsg(32633).to_wkt()
OTHER = CRS.from_proj4("+proj=laea +lat_0=52 +lon_0=10 +ellps=GRS80 +units=m").to_wkt()
TRANSFORMS = {
    0: (0.5, 0.0, 500_000.0, 0.0, -0.5, 4_500_000.0),  # north up
    1: (0.3, 0.1, 400_000.0, 0.2, -0.4, 5_500_000.0),  # turned
    2: (0.5, 0.0, 500_000.0, 0.0, 0.5, 4_500_000.0),  # south up
}
PLACES = {
    1: {"crs": UTM, "transform": TRANSFORMS[0]},
    2: {"crs": UTM, "transform": TRANSFORMS[1]},
    3: {"crs": OTHER, "transform": TRANSFORMS[2]},
    6: {"crs": "not WKT", "transform": TRANSFORMS[0]},
    7: {"crs": UTM, "transform": None},
}
WITHOUT = (6, 7)
"""Places whose masks have no place; others without masks or failed."""

NAMES = [f"tile {i:02d}.tif" for i in range(8)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = tmp_path_factory.mktemp("geo")
    return write_output(str(root), NAMES, failed=(5,), geo=lambda index: PLACES.get(index))


def rows_with_geo(plan: Plan) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(row, PLACES[i]) for i, row in enumerate(read_rows(plan.output)) if i in (1, 2, 3)]


def by_gdal(mask: dict[str, Any], transform: Affine) -> shapely.Geometry:
    """The polygons of GDAL's polygonize."""
    pixels = decoded(mask).astype(np.uint8)
    shapes = rasterio.features.shapes(pixels, mask=pixels.astype(bool), connectivity=4, transform=transform)
    return shapely.unary_union([shape(geometry) for geometry, _ in shapes])


def assert_equal(actual: shapely.Geometry, wanted: shapely.Geometry, pixel: float) -> None:
    """Within 1e-6 of a pixel."""
    assert actual.is_valid
    assert shapely.hausdorff_distance(actual.boundary, wanted.boundary) < 1e-6 * pixel
    assert actual.symmetric_difference(wanted).area < 1e-6 * pixel * max(1, wanted.length)


def test_geoparquet_is_where_gdal_and_geopandas_put_the_pixels(plan: Plan, tmp_path: Path) -> None:
    report = export(plan, tmp_path / "geo", "geoparquet")
    rows = rows_with_geo(plan)
    num_masks = sum(len(row["annotations"]) for row, _ in rows)
    assert (report.num_masks, report.num_failed) == (num_masks, 1)
    assert report.num_left_out == sum(len(read_rows(plan.output)[i]["annotations"]) for i in (4, *WITHOUT))
    # Two CRSs, and so two files.
    files = sorted((tmp_path / "geo").glob("*.parquet"))
    assert [file.name for file in files] == ["part-000000-1.parquet", "part-000000.parquet"]
    frames = {file.name: geopandas.read_parquet(file) for file in files}
    assert frames["part-000000.parquet"].crs == CRS.from_epsg(32633)
    assert CRS.from_user_input(frames["part-000000-1.parquet"].crs) == CRS.from_wkt(OTHER)
    geometries = {
        mask_id: geometry
        for frame in frames.values()
        for mask_id, geometry in zip(frame["mask_id"], frame.geometry, strict=True)
    }
    for row, geo in rows:
        for mask in row["annotations"]:
            exported = geometries.pop(mask["id"])
            assert_equal(exported, by_gdal(mask, Affine(*geo["transform"])), pixel=0.3)
            assert all(polygon.exterior.is_ccw for polygon in getattr(exported, "geoms", [exported]))
    assert not geometries
    frame = frames["part-000000.parquet"]
    assert {"image_id", "file_name", "area", "predicted_iou"} < set(frame.columns)
    assert "counts" not in frame.columns
    boxes = pd.json_normalize(pq.read_table(files[1], columns=["bbox"])["bbox"].to_pylist())
    np.testing.assert_array_equal(boxes, frame.bounds)


def test_geojson_is_in_longitude_and_latitude(plan: Plan, tmp_path: Path) -> None:
    report = export(plan, tmp_path / "json", "geojson")
    assert report.num_images == 7
    for row, geo in rows_with_geo(plan):
        path = tmp_path / "json" / row["image"]["file_name"].replace(".tif", ".geojson")
        collection = json.loads(path.read_text())
        assert list(collection) == ["type", "name", "features"]
        for feature, mask in zip(collection["features"], row["annotations"], strict=True):
            assert feature["id"] == mask["id"]
            assert feature["properties"]["area"] == mask["area"]
            geometry = shape(feature["geometry"])
            assert all(polygon.exterior.is_ccw for polygon in getattr(geometry, "geoms", [geometry]))
            wanted = by_gdal(mask, Affine(*geo["transform"]))
            # Back in the CRS, where a pixel has a size.
            back = shape(transform_geom("OGC:CRS84", geo["crs"], mapping(geometry)))
            assert shapely.hausdorff_distance(back.boundary, wanted.boundary) < 1e-6
    empty = json.loads((tmp_path / "json" / NAMES[6].replace(".tif", ".geojson")).read_text())
    assert empty["features"] == []


def test_geojson_may_keep_the_crs_or_have_pixels(plan: Plan, tmp_path: Path) -> None:
    export(plan, tmp_path / "crs", "geojson", coordinates="crs", where="image.file_name < 'tile 03'")
    frame = geopandas.read_file(tmp_path / "crs" / "tile 02.geojson")
    assert frame.crs == CRS.from_epsg(32633)
    (row, geo) = rows_with_geo(plan)[1]
    for geometry, mask in zip(frame.geometry, row["annotations"], strict=True):
        assert_equal(geometry, by_gdal(mask, Affine(*geo["transform"])), pixel=0.3)
    with pytest.raises(ConfigError, match=r"no EPSG code"):
        export(plan, tmp_path / "custom", "geojson", coordinates="crs")
    report = export(plan, tmp_path / "pixels", "geojson", coordinates="pixels")
    assert report.num_left_out == 0
    row = read_rows(plan.output)[7]
    features = json.loads((tmp_path / "pixels" / "tile 07.geojson").read_text())["features"]
    for feature, mask in zip(features, row["annotations"], strict=True):
        assert_equal(shape(feature["geometry"]), by_gdal(mask, Affine.identity()), pixel=1)


def test_simplified_polygons_are_valid_and_near(plan: Plan, tmp_path: Path) -> None:
    export(plan, tmp_path / "exact", "geoparquet", coordinates="pixels")
    export(plan, tmp_path / "simple", "geoparquet", coordinates="pixels", simplify=1.0)
    exact, simple = (geopandas.read_parquet(tmp_path / name) for name in ("exact", "simple"))
    assert simple.crs is None
    assert simple.geometry.is_valid.all()
    assert simple.geometry.count_coordinates().sum() < 0.8 * exact.geometry.count_coordinates().sum()
    # Every corner that is left is one of the exact outline, and what is gone is within the tolerance.
    for before, after in zip(exact.geometry, simple.geometry, strict=True):
        assert after.boundary.distance(shapely.points(shapely.get_coordinates(before))).max() <= 1 + 1e-9


def test_coco_polygons_may_be_simplified(plan: Plan, tmp_path: Path) -> None:
    for name, options in (("exact", {}), ("simple", {"simplify": 1.5})):
        export(plan, tmp_path / name, "coco", polygons=True, **options)
    exact, simple = (
        json.loads((tmp_path / name / "instances.json").read_text())["annotations"] for name in ("exact", "simple")
    )
    lengths = [sum(len(ring) for mask in masks for ring in mask["segmentation"]) for masks in (exact, simple)]
    assert lengths[1] < 0.8 * lengths[0]
    with pytest.raises(ConfigError, match="--simplify needs --polygons"):
        coco.CocoOptions(simplify=1.0)


def test_an_output_without_places_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), ["a.png", "b.png"])
    assert "geo" not in read_rows(plan.output)[0]
    for format in ("geojson", "geoparquet"):
        with pytest.raises(ConfigError, match=r"no column `geo`.*--coordinates pixels"):
            export(plan, tmp_path / format, format)
        assert not (tmp_path / format).exists()
    assert export(plan, tmp_path / "pixels", "geojson", coordinates="pixels").num_images == 2


def test_a_damaged_place_is_reported_and_its_masks_are_left_out(tmp_path: Path) -> None:
    damaged = [[1.0, 2.0], [1.0, None, 0.0, 0.0, 1.0, 0.0], [float("nan")] * 6]
    plan = write_output(str(tmp_path), NAMES[:4], geo=lambda i: {"crs": UTM, "transform": damaged[i % 3]})
    problems = verify(plan.output).problems
    assert len(problems) == 4
    assert "tile" not in problems[0]
    assert "expected six numbers" in problems[0]
    for format in ("geojson", "geoparquet"):
        report = export(plan, tmp_path / format, format)
        assert (report.num_masks, report.num_left_out) == (0, 6)


def test_places_are_verified_and_survive_compacting(plan: Plan, tmp_path: Path) -> None:
    assert not verify(plan.output, deep=True).problems
    dest = tmp_path / "compact"
    compact(plan.output, str(dest), 10**6)
    rows = read_rows(dest)
    assert [row["geo"] for row in rows] == [row["geo"] for row in read_rows(plan.output)]
    assert rows[1]["geo"] == {"crs": UTM, "transform": list(TRANSFORMS[0])}
    assert rows[0]["geo"] is None
    assert load_plan(str(dest)).run["geo"]


def test_degrees_are_longitude_and_latitude_in_every_format(tmp_path: Path) -> None:
    geo = {"crs": CRS.from_epsg(4326).to_wkt(version="WKT2_2019"), "transform": (1e-4, 0, 11.0, 0, -1e-4, 48.0)}
    plan = write_output(str(tmp_path), ["a.tif", "b.tif"], geo=lambda i: geo)
    (mask,) = read_rows(plan.output)[1]["annotations"]
    wanted = by_gdal(mask, Affine(*geo["transform"]))
    for format, coordinates in (
        ("geojson", "wgs84"),
        ("geojson", "crs"),
        ("geoparquet", "wgs84"),
        ("geoparquet", "crs"),
    ):
        dest = tmp_path / f"{format} {coordinates}"
        export(plan, dest, format, coordinates=coordinates)
        if format == "geojson":
            frame = geopandas.read_file(dest / "b.geojson")
        else:
            frame = geopandas.read_parquet(dest / "part-000000.parquet")
        assert CRS.from_user_input(frame.crs).is_geographic
        assert_equal(frame.geometry[0], wanted, pixel=1e-4)


MARS = (
    'GEOGCS["Mars 2000",DATUM["D_Mars_2000",SPHEROID["Mars_2000_IAU_IAG",3396190.0,169.89444722361179]],'
    'PRIMEM["Reference_Meridian",0.0],UNIT["Degree",0.0174532925199433]]'
)
NAMES_A_FILE = CRS.from_epsg(3857).to_wkt().replace("+nadgrids=@null", "+nadgrids=/etc/hostname")


def test_a_crs_that_cannot_be_converted_leaves_only_its_images_out(tmp_path: Path) -> None:
    assert "nadgrids=/etc" in NAMES_A_FILE
    north_up = (0.01, 0.0, 10.0, 0.0, -0.01, 20.0)
    places: dict[int, dict[str, Any]] = {
        1: {"crs": MARS, "transform": north_up},
        2: {"crs": 'LOCAL_CS["site",UNIT["metre",1]]', "transform": north_up},
        3: {"crs": NAMES_A_FILE, "transform": north_up},
        5: {"crs": UTM, "transform": (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)},
        6: {"crs": UTM, "transform": (1e100, 0.0, 1e100, 0.0, -1e100, 1e100)},
        7: {"crs": UTM, "transform": TRANSFORMS[0]},
    }
    plan = write_output(str(tmp_path), NAMES, geo=places.get)
    for format in ("geojson", "geoparquet"):
        report = export(plan, tmp_path / format, format, coordinates="wgs84")
        assert (report.num_masks, report.num_left_out) == (3, 9)
    kept = export(plan, tmp_path / "crs", "geoparquet")
    assert kept.num_masks == 3 + 1 + 2 + 2  # and those on Mars, of the site, and at the end of the world
    for file in (tmp_path / "crs").glob("*.parquet"):
        assert geopandas.read_parquet(file).crs is not None


def test_rings_run_counter_clockwise_where_axes_point_south_and_west(tmp_path: Path) -> None:
    krovak = {"crs": CRS.from_epsg(5513).to_wkt(), "transform": (0.5, 0.0, 1_043_000.0, 0.0, 0.5, 743_000.0)}
    plan = write_output(str(tmp_path), NAMES[:4], geo=lambda index: krovak)
    export(plan, tmp_path / "json", "geojson")
    features = json.loads((tmp_path / "json" / "tile 03.geojson").read_text())["features"]
    assert len(features) == 3
    for feature in features:
        geometry = shape(feature["geometry"])
        assert geometry.is_valid
        assert 14 < geometry.centroid.x < 15
        assert all(polygon.exterior.is_ccw for polygon in getattr(geometry, "geoms", [geometry]))


def test_simplified_neighbours_do_not_overlap(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plan = write_output(str(tmp_path), ["a.png"], masks=lambda index: [annotation(rng.random((HEIGHT, WIDTH)) < 0.6)])
    for tolerance in (1.0, 2.0, 4.0):
        export(plan, tmp_path / f"{tolerance}", "geoparquet", coordinates="pixels", simplify=tolerance)
        assert geopandas.read_parquet(tmp_path / f"{tolerance}").geometry.is_valid.all()


@pytest.mark.parametrize(
    "change",
    [{"predicted_iou": float("nan")}, {"bbox": [0.0, float("inf"), 1.0, 1.0]}, {"point_coords": [[1.0, float("nan")]]}],
)
def test_a_number_that_json_cannot_hold_is_one_sentence(tmp_path: Path, change: dict[str, Any]) -> None:
    plan = write_output(
        str(tmp_path), ["a.png"], masks=lambda index: [{**annotation(np.ones((HEIGHT, WIDTH))), **change}]
    )
    for format, options in (("geojson", {"coordinates": "pixels"}), ("coco", {})):
        with pytest.raises(StorageError, match=f"image 0 has a {next(iter(change))} that is not a finite number"):
            export(plan, tmp_path / format, format, **options)
