"""Reading images in parts: the same pixels as reading them whole, bands and stretch, georeference, hostile files."""

from __future__ import annotations

import contextlib
import io
import itertools
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import pytest
import rasterio
import tifffile
from affine import Affine
from PIL import Image, ImageOps
from rasterio.crs import CRS
from rasterio.enums import Resampling

from samray.config import Config, InputConfig
from samray.errors import ConfigError, ImageError, StorageError
from samray.inputs.decode import decode_image
from samray.inputs.decode_apart import decode_apart, decode_with_geo
from samray.inputs.raster_files import RasterFile, _upright_transform, geo_of
from samray.inputs.raster_files import decode_image as decode_with_bands
from samray.inputs.rasters import check_extra, open_raster
from samray.output.identity import refuse_differences
from samray.output.schema import records_to_table
from samray.pipeline.labeler import EncodedImage, ShardLabeler
from samray.pipeline.preflight import check_label

CONFIG = InputConfig()
HEIGHT, WIDTH = 60, 90
RNG = np.random.default_rng(0)
RGBA = RNG.integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
DEEP = RNG.integers(0, 65536, (HEIGHT, WIDTH, 5), np.uint16)


def pillow(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_tiff(values: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(RGBA[:, :, :3])
    return pillow(image, kind, tiffinfo={274: orientation}) if kind == "TIFF" else pillow(image, kind, exif=exif)


RGB_IMAGE = Image.fromarray(RGBA[:, :, :3])
NORMAL = RNG.normal(0, 300, (HEIGHT, WIDTH))
FILES = {
    **{f"{kind} turned {o}": turned(kind, o) for kind in ("JPEG", "PNG", "TIFF") for o in range(1, 9)},
    **{mode: pillow(RGB_IMAGE.convert(mode), "TIFF") for mode in ("1", "L", "CMYK", "P")},
    "white is zero": pillow(RGB_IMAGE.convert("L"), "TIFF", tiffinfo={262: 0}),
    "LZW": pillow(RGB_IMAGE, "TIFF", compression="tiff_lzw"),
    "JPEG in TIFF": pillow(RGB_IMAGE, "TIFF", compression="jpeg"),
    "grey JPEG": pillow(RGB_IMAGE.convert("L"), "JPEG"),
    "CMYK JPEG": pillow(RGB_IMAGE.convert("CMYK"), "JPEG"),
    "progressive JPEG": pillow(RGB_IMAGE, "JPEG", progressive=True),
    "palette PNG": pillow(RGB_IMAGE.quantize(30), "PNG", transparency=3),
    "RGBA PNG": pillow(Image.fromarray(RGBA), "PNG"),
    "16-bit PNG": pillow(Image.fromarray(DEEP[:, :, 0]), "PNG"),
    "WebP": pillow(RGB_IMAGE, "WEBP"),
    "tiled BigTIFF": as_tiff(RGBA[:, :, :3], photometric="rgb", tile=(16, 16), bigtiff=True),
    "planes": as_tiff(np.ascontiguousarray(RGBA[:, :, :3].transpose(2, 0, 1)), photometric="rgb"),
    "16-bit RGB": as_tiff(DEEP[:, :, :3], photometric="rgb"),
    "16-bit, white is zero": as_tiff(DEEP[:, :, 0], photometric="miniswhite"),
    **{alpha: as_tiff(RGBA, photometric="rgb", extrasamples=[alpha]) for alpha in ("assocalpha", "unassalpha")},
    **{kind: as_tiff(NORMAL.astype(kind), photometric="minisblack") for kind in ("int8", "int16", "int32", "float32")},
    "uint32": as_tiff(DEEP[:, :, 0].astype(np.uint32) * 9, photometric="minisblack"),
}


def read(data: bytes, config: InputConfig = CONFIG) -> np.ndarray:
    """The whole image, in this process."""
    file = RasterFile(io_file(data), config.bands, config.stretch, 10**9)
    file.prepare()
    return file.read(0, 0, file.width, file.height)


def io_file(data: bytes) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(data)
    file.flush()
    return file


@pytest.mark.parametrize("name", FILES)
def test_a_part_has_the_same_pixels_as_the_whole(name: str) -> None:
    whole = decode_image(FILES[name], 10**9)
    height, width = whole.shape[:2]
    file = RasterFile(io_file(FILES[name]), None, None, 10**9)
    assert (file.height, file.width) == (height, width)
    file.prepare()
    np.testing.assert_array_equal(file.read(0, 0, width, height), whole)
    np.testing.assert_array_equal(file.read(7, 11, width - 20, height - 5), whole[11 : height - 5, 7 : width - 20])
    file.close()


def test_a_raster_is_read_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(FILES["tiled BigTIFF"])
    with open_raster(path, CONFIG) as raster:
        assert (raster.height, raster.width, raster.crs, raster.transform) == (HEIGHT, WIDTH, None, None)
        np.testing.assert_array_equal(raster.read(3, 5, 40, 50), RGBA[5:50, 3:40, :3])
        raster._child.close()  # dies between two reads
        np.testing.assert_array_equal(raster.read(3, 5, 40, 50), RGBA[5:50, 3:40, :3])
    with open_raster(FILES["RGBA PNG"], CONFIG) as raster:
        np.testing.assert_array_equal(raster.read(0, 0, WIDTH, HEIGHT), decode_image(FILES["RGBA PNG"], 10**9))
    with pytest.raises(ImageError, match=r"more than input\.max_pixels=100"):
        open_raster(path, CONFIG, max_pixels=100)


def stretched(band: np.ndarray, low: float, high: float) -> np.ndarray:
    """0..255 by percentiles, in the plainest way."""
    low, high = np.percentile(band.astype(float), [low, high])
    return np.clip((band - low) * 255 / (high - low), 0, 255)


def test_bands_and_stretch_choose_what_is_red_green_and_blue(tmp_path: Path) -> None:
    data = as_tiff(DEEP, photometric="minisblack", planarconfig="contig", tile=(32, 32))
    with pytest.raises(ImageError, match=r"5 values per pixel.*input\.bands=\[4,3,2\]"):
        decode_image(data, 10**9)
    with pytest.raises(ImageError, match=r"5 bands of uint16.*input\.bands=\[4,3,2\]"):
        read(data)
    plain = InputConfig(bands=[4, 3, 2])
    np.testing.assert_array_equal(read(data, plain), (DEEP[:, :, [3, 2, 1]].astype(np.uint32) + 128) // 257)
    config = InputConfig(bands=[5, 1, 2], stretch=[2, 98])
    pixels = decode_apart(data, config)
    wanted = np.stack([stretched(DEEP[:, :, band], 2, 98) for band in (4, 0, 1)], axis=2)
    assert np.abs(pixels - wanted).max() <= 0.5
    # Parts are stretched by the values of the whole image.
    with open_raster(data, config) as raster:
        np.testing.assert_array_equal(raster.read(8, 5, 20, 50), pixels[5:50, 8:20])
    grey = read(data, InputConfig(bands=[2], stretch=[0, 100]))
    np.testing.assert_array_equal(grey[:, :, 0], grey[:, :, 2])
    with pytest.raises(ImageError, match=r"names band 6, but this image has 5 bands"):
        read(data, InputConfig(bands=[6]))
    # For other formats, too: of a photo its three colours.
    photo = read(FILES["JPEG turned 6"], InputConfig(bands=[3, 2, 1]))
    np.testing.assert_array_equal(photo, decode_image(FILES["JPEG turned 6"], 10**9)[:, :, ::-1])


def test_channels_of_a_microscope_are_bands(tmp_path: Path) -> None:
    channels = np.ascontiguousarray(DEEP[:, :, :4].transpose(2, 0, 1))
    path = tmp_path / "cells.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:  # each channel with its pyramid
        writer.write(channels, tile=(16, 16), subifds=1, metadata={"axes": "CYX"}, photometric="minisblack")
        writer.write(channels[:, ::2, ::2], tile=(16, 16), subfiletype=1, photometric="minisblack")
    data = path.read_bytes()
    np.testing.assert_array_equal(read(data), decode_image(data, 10**9))  # the first channel
    pixels = read(data, InputConfig(bands=[4, 1, 3]))
    np.testing.assert_array_equal(pixels, (DEEP[:, :, [3, 0, 2]].astype(np.uint32) + 128) // 257)
    config = InputConfig(bands=[2], stretch=[1, 99])
    assert np.abs(read(data, config)[:, :, 0] - stretched(channels[1], 1, 99)).max() <= 0.51
    with pytest.raises(ImageError, match="this image has 4 bands of uint16"):
        read(data, InputConfig(bands=[5]))


def test_pixels_without_a_value_do_not_count_for_the_stretch(tmp_path: Path) -> None:
    values = RNG.normal(500, 20, (HEIGHT, WIDTH)).astype(np.float32)
    values[:20] = -9999
    values[20:25] = np.nan
    path = tmp_path / "dem.tif"
    options = {"driver": "GTiff", "count": 1, "dtype": "float32", "nodata": -9999}
    with rasterio.open(path, "w", height=HEIGHT, width=WIDTH, **options) as file:
        file.write(values, 1)
    grey = read(path.read_bytes(), InputConfig(stretch=[1, 99]))[:, :, 0]
    assert not grey[:25].any()
    assert np.abs(grey[25:] - stretched(values[25:], 1, 99)).max() <= 0.51


def test_a_large_image_is_stretched_by_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("gdal_files", "unpacked_files"):
        monkeypatch.setattr(f"samray.inputs.{module}.MAX_SAMPLE", 500)
    for data in (FILES["16-bit RGB"], FILES["16-bit PNG"]):
        pixels = read(data, InputConfig(stretch=[5, 95]))
        np.testing.assert_array_equal(pixels, read(data, InputConfig(stretch=[5, 95])))
        assert 0.03 < (pixels == 255).mean() < 0.08


def test_a_sample_is_that_of_an_overview_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pyramid.tif"
    geotiff(path, tiled=True, blockxsize=16, blockysize=16)
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4], Resampling.nearest)
    # Nearest: a quarter of the pixels. Of the two overviews the one that has enough of them.
    with rasterio.open(path, overview_level=0) as file:
        expected = file.read().transpose(1, 2, 0)
    assert expected.shape == (HEIGHT // 2, WIDTH // 2, 3)
    monkeypatch.setattr("samray.inputs.gdal_files.MAX_SAMPLE", 1000)
    raster = RasterFile(io_file(path.read_bytes()), None, (2, 98), 10**9)
    raster.prepare()
    assert raster._chosen is not None
    assert raster._chosen.limits == [tuple(np.percentile(expected[::2, ::2, band], [2, 98])) for band in range(3)]


def geotiff(path: Path, **options: Any) -> bytes:
    transform = Affine(0.5, 0.1, 500_000, 0.2, -0.5, 4_500_000)
    profile = {"driver": "GTiff", "height": HEIGHT, "width": WIDTH, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
    with rasterio.open(path, "w", transform=transform, **profile, **options) as file:
        file.write(RGBA[:, :, :3].transpose(2, 0, 1))
    return path.read_bytes()


def test_a_geotiff_says_where_it_is(tmp_path: Path) -> None:
    data = geotiff(tmp_path / "geo.tif")
    pixels, geo = decode_with_geo(data, CONFIG)
    np.testing.assert_array_equal(pixels, RGBA[:, :, :3])
    assert geo is not None
    assert CRS.from_wkt(geo["crs"]) == CRS.from_epsg(32633)
    assert geo["transform"] == [0.5, 0.1, 500_000, 0.2, -0.5, 4_500_000]
    with open_raster(data, CONFIG) as raster:
        assert raster.geo == geo
    assert decode_with_geo(FILES["LZW"], CONFIG)[1] is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_place_of_a_turned_image_is_that_of_its_upright_pixels(orientation: int) -> None:
    stored = (0.5, 0.1, 500_000.0, 0.2, -0.5, 4_500_000.0)
    upright = _upright_transform(stored, WIDTH, HEIGHT, orientation)
    numbers = np.arange(HEIGHT * WIDTH, dtype=np.int32).reshape(HEIGHT, WIDTH)
    # Pillow turns an image whose values are the numbers of its pixels.
    image = Image.fromarray(numbers)
    image.getexif()[274] = orientation
    turned = np.asarray(ImageOps.exif_transpose(image))
    for row, column in ((0, 0), (3, 40), (turned.shape[0] - 1, turned.shape[1] - 2)):
        from_row, from_column = divmod(int(turned[row, column]), WIDTH)
        there = Affine(*stored) @ (from_column + 0.5, from_row + 0.5)
        assert Affine(*upright) @ (column + 0.5, row + 0.5) == pytest.approx(there, rel=1e-12)


def test_a_file_cannot_make_gdal_open_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.tif"
    geotiff(secret)
    vrt = (
        f'<VRTDataset rasterXSize="{WIDTH}" rasterYSize="{HEIGHT}"><VRTRasterBand dataType="Byte" band="1">'
        f"<SimpleSource><SourceFilename>{secret}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    for data in (vrt.encode(), f"GTIFF_DIR:1:{secret}".encode(), b"/vsicurl/http://127.0.0.1:1/a.tif"):
        with pytest.raises(ImageError):
            read(data)
    # A tag names a file with overviews, which GDAL would read for a sample.
    evil = tmp_path / "evil.tif"
    with rasterio.open(evil, "w", driver="GTiff", height=HEIGHT * 2, width=WIDTH * 2, count=3, dtype="uint8") as file:
        file.write(np.zeros((3, HEIGHT * 2, WIDTH * 2), np.uint8))
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(secret))
    monkeypatch.setattr("samray.inputs.gdal_files.MAX_SAMPLE", 100)
    raster = RasterFile(io_file(evil.read_bytes()), None, (0, 100), 10**9)
    raster.prepare()
    assert raster._chosen is not None
    assert raster._chosen.limits == [(0, 0)] * 3
    # Files next to it do not count: overviews, masks, georeference, statistics.
    allowed = tmp_path / "own.tif"
    allowed.write_bytes(FILES["LZW"])
    (tmp_path / "own.tfw").write_text("1\n0\n0\n-1\n7\n7\n")
    (tmp_path / "own.tif.aux.xml").write_text("<PAMDataset><SRS>EPSG:4326</SRS></PAMDataset>")
    (tmp_path / "own.tif.msk").write_bytes(secret.read_bytes())
    with open_raster(allowed, CONFIG) as raster:
        assert raster.geo is None
        np.testing.assert_array_equal(raster.read(0, 0, WIDTH, HEIGHT), RGBA[:, :, :3])
    with pytest.raises(StorageError, match="No such file"):
        open_raster("/vsicurl/http://127.0.0.1:1/a.tif", CONFIG)


@pytest.mark.parametrize("name", ["LZW", "tiled BigTIFF", "RGBA PNG", "JPEG turned 1"])
def test_a_damaged_file_is_an_error_of_the_image(name: str) -> None:
    data = FILES[name]
    for cut in (4, 40, len(data) // 2, len(data) - 300):
        with pytest.raises(ImageError) as caught:
            read(data[:cut])
        assert caught.value.reason in ("truncated", "unreadable", "not_an_image")
    noise = bytearray(data)
    noise[len(data) // 3 : len(data) // 2] = RNG.bytes(len(data) // 2 - len(data) // 3)
    with contextlib.suppress(ImageError):
        assert read(bytes(noise)).shape == (HEIGHT, WIDTH, 3)


def test_what_is_too_large_to_be_held_whole_is_read_by_rows_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samray.inputs.unpacked_files.MAX_WHOLE_PIXELS", 1000)
    exif = Image.Exif()
    exif[274] = 6
    turned_photo = pillow(RGB_IMAGE.resize((6, 4)).resize((WIDTH, HEIGHT)), "JPEG", exif=exif)
    for photo in (turned_photo, FILES["progressive JPEG"], FILES["grey JPEG"]):
        np.testing.assert_array_equal(read(photo), decode_image(photo, 10**9))
    for name in ("CMYK JPEG", "WebP", "palette PNG"):
        with pytest.raises(ImageError, match=r"are read whole, up to 1000; convert it to a tiled TIFF"):
            read(FILES[name])


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
@pytest.mark.parametrize("size", [(641, 431), (17, 33), (1, 1), (16, 700)])
def test_a_jpeg_read_by_rows_has_the_pixels_of_pillow(
    size: tuple[int, int], subsampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GDAL, which read them before, enlarges the colours in another way."""
    monkeypatch.setattr("samray.inputs.unpacked_files._by_pillow", None)
    for quality, progressive, restart in itertools.product((30, 95), (False, True), (0, 1)):
        photo = pillow(
            RGB_IMAGE.resize(size), "JPEG", quality=quality, progressive=progressive, subsampling=subsampling,
            restart_marker_rows=restart,
        )  # fmt: skip
        np.testing.assert_array_equal(read(photo), decode_image(photo, 10**9))


def test_without_libvips_a_jpeg_is_read_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvips", None)
    photo = FILES["JPEG turned 6"]
    np.testing.assert_array_equal(read(photo), decode_image(photo, 10**9))
    monkeypatch.setattr("samray.inputs.unpacked_files.MAX_WHOLE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"without libvips JPEGs are read whole, up to 1000; install it on every node"):
        read(photo)


def test_a_size_that_lies_is_refused_before_pixels_are_read() -> None:
    png = FILES["RGBA PNG"]
    head = b"IHDR" + struct.pack(">II", 2**31 - 1, 2**31 - 1) + png[24:29]
    lie = png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]
    with pytest.raises(ImageError, match="pixels, more than"):
        open_raster(lie, CONFIG)


def test_the_row_of_a_geotiff_says_where_it_is(tmp_path: Path) -> None:
    class Nothing:
        stage_seconds: ClassVar[dict[str, float]] = {}

        def generate(self, images: list[np.ndarray]) -> list[list[Any]]:
            return [[] for _ in images]

    labeler = ShardLabeler(lambda points_per_batch: Nothing(), max_pixels=10**6, bands=(3, 2, 1))
    files = {"geo.tif": geotiff(tmp_path / "geo.tif"), "plain.tif": FILES["LZW"], "photo.png": FILES["RGBA PNG"]}
    images = [EncodedImage(image_id=i, file_name=name, uri=name, data=files[name]) for i, name in enumerate(files)]
    records = labeler.label(images).records
    assert [record.error for record in records] == [None] * 3
    assert labeler.decode(images[0]).tolist() == RGBA[:, :, 2::-1].tolist()
    with_column = records_to_table(records, {"identity": {}, "geo": True})["geo"].to_pylist()
    assert with_column[0]["transform"] == [0.5, 0.1, 500_000, 0.2, -0.5, 4_500_000]
    assert with_column[1:] == [None, None]
    assert "geo" not in records_to_table(records, {"identity": {}}).column_names


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(ConfigError, match=r"input.bands needs rasterio: pip install 'samray\[geo\]'"):
        check_extra("input.bands")
    with pytest.raises(ConfigError, match="the column geo of this OUTPUT needs rasterio"):
        check_label("in", "out", Config(), None, with_model=False, is_new=False, has_geo=True)
    with pytest.raises(ImageError, match=r"pip install 'samray\[geo\]'"):
        read(FILES["LZW"])
    # Other formats need it only for the rows of images that are too large for Pillow.
    np.testing.assert_array_equal(read(FILES["grey JPEG"]), decode_image(FILES["grey JPEG"], 10**9))


def test_a_new_setting_counts_as_its_default_and_a_used_one_is_part_of_the_run() -> None:
    plain, chosen = Config(), Config(input=InputConfig(bands=[4, 3, 2], stretch=[2, 98]))
    assert not {"bands", "stretch"} & plain.identity()["input"].keys()
    refuse_differences("out", plain.identity(), Config().identity(), plain.default_identity())
    with pytest.raises(ConfigError, match=r"input\.bands: null there, \[4, 3, 2\] now"):
        refuse_differences("out", plain.identity(), chosen.identity(), chosen.default_identity())
    for wrong in ({"bands": [1, 2]}, {"bands": [0]}, {"stretch": [98, 2]}, {"stretch": [2, 101]}, {"stretch": [1]}):
        with pytest.raises(ConfigError, match=r"input\.(bands|stretch) = .* is not allowed; it takes"):
            InputConfig(**wrong)


def test_a_place_that_is_damaged_is_none(tmp_path: Path) -> None:
    keys = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633)
    for scale in (float("nan"), float("inf")):
        tags = [(33550, "d", 3, (scale, scale, 0.0)), (33922, "d", 6, (0.0,) * 3 + (5e5, 4.5e6, 0.0))]
        data = as_tiff(RGBA[:, :, :3], photometric="rgb", extratags=[*tags, (34735, "H", len(keys), keys)])
        geo = geo_of(data)
        assert geo is not None
        assert geo["transform"] is None  # what verify would report
        assert CRS.from_wkt(geo["crs"]) == CRS.from_epsg(32633)


def test_complex_numbers_are_not_decoded(tmp_path: Path) -> None:
    for kind in ("complex_int16", "complex64"):
        path = tmp_path / f"{kind}.tif"
        options = {"driver": "GTiff", "count": 2, "dtype": kind, "height": HEIGHT, "width": WIDTH}
        with rasterio.open(path, "w", **options) as file:
            file.write(np.ones((2, HEIGHT, WIDTH), np.complex64))
        with pytest.raises(ImageError, match="not decoded") as caught:
            decode_with_bands(path.read_bytes(), 10**9, [1])
        assert caught.value.reason == "unsupported"


def test_what_goes_wrong_with_bands_is_an_error_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[Exception] = [ValueError("a CRS"), OSError(28, "No space left on device"), MemoryError()]

    def prepare(file: RasterFile) -> None:
        raise raised[0]

    monkeypatch.setattr(RasterFile, "prepare", prepare)
    for reason in ("unreadable", "out_of_memory", "out_of_memory"):
        with pytest.raises(ImageError) as caught:
            decode_with_bands(FILES["LZW"], 10**9, [1])
        assert caught.value.reason == reason
        del raised[0]


def test_a_place_needs_no_space_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = geotiff(tmp_path / "geo.tif")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: pytest.fail("a copy of the file on the disk"))
    assert geo_of(data) is not None
