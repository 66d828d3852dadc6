"""`samray evaluate edges`: the matching, the figures, and what it reads."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from samray.cli.main import main
from samray.errors import ConfigError, ImageError
from samray.evaluate import edge_matching
from samray.evaluate.edge_data import EdgeData, FolderMaps
from samray.evaluate.edge_matching import EdgeCounts, count_matches, match_pixels, thresholds_of
from samray.evaluate.edge_scores import best_f, edge_scores
from samray.evaluate.edges import evaluate_edges, map_in_data
from samray.masks.edge_png import decode_edges, encode_edges
from tests.support import REPOSITORY

KNOWN = REPOSITORY.parent / "shared" / "data" / "edges" / "ucm_known.parquet"
HW = (60, 80)


def line(row: int, columns: slice = slice(10, 70)) -> np.ndarray:
    pixels = np.zeros(HW, bool)
    pixels[row, columns] = True
    return pixels


def counts_of(mask: np.ndarray) -> str:
    return str(coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode())


def write_data(path: Path, rows: list[tuple[str, np.ndarray | None, list[np.ndarray]]]) -> str:
    """Rows of name, edge map and boundaries."""
    table = [
        {
            "file_name": name,
            "width": HW[1],
            "height": HW[0],
            "boundaries": [counts_of(mask) for mask in boundaries],
            "map_png": None if edges is None else encode_edges(edges, 8),
        }
        for name, edges, boundaries in rows
    ]
    kinds = [pa.string(), pa.int32(), pa.int32(), pa.list_(pa.string()), pa.binary()]
    pq.write_table(pa.Table.from_pylist(table, pa.schema(list(zip(table[0], kinds, strict=True)))), path)
    return str(path)


# --- matching ---------------------------------------------------------------------------------------------------------


def test_a_shifted_line_matches_within_the_distance_only() -> None:
    max_distance = 3.5 / np.hypot(*HW)
    for shift, is_near in ((0, True), (3, True), (4, False)):
        for matched in match_pixels(line(20), line(20 + shift), max_distance):
            assert 58 <= matched.sum() <= 60 if is_near else not matched.any()  # the random outliers may cost a pixel


def test_pixels_match_one_to_one() -> None:
    both = line(20) | line(22)
    of_edges, of_boundary = match_pixels(both, line(21), max_distance=3 / np.hypot(*HW))
    assert 58 <= of_edges.sum() == of_boundary.sum() <= 60
    assert not (of_edges & ~both).any()


def test_the_matching_is_as_cheap_as_a_dense_solvers() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random(HW) < 0.02, rng.random(HW) < 0.02
    reach = 5.0
    distance = np.hypot(*(np.argwhere(first)[:, None] - np.argwhere(second)[None]).transpose(2, 0, 1))
    gain = np.where(distance <= reach, 100 * reach - distance, 0)
    rows, columns = linear_sum_assignment(gain, maximize=True)
    wanted = int((gain[rows, columns] > 0).sum())
    matched, _ = match_pixels(first, second, reach / np.hypot(*HW))
    assert wanted - 2 <= matched.sum() <= wanted, "the random outliers may cost a pixel or two"


def test_each_annotator_counts_for_recall_and_any_for_precision() -> None:
    edges = np.where(line(20) | line(40), 0.6, 0.0)
    counts = count_matches(edges, [line(20), line(20) | line(50)], np.array([0.5, 0.7]))
    assert counts.boundary.tolist() == [180, 180]
    assert counts.edge.tolist() == [120, 0]
    assert counts.matched_boundary.tolist() == [pytest.approx(120, abs=4), 0]
    assert counts.matched_edge.tolist() == [pytest.approx(60, abs=2), 0]


def test_thick_edges_are_thinned() -> None:
    edges = np.zeros(HW)
    edges[18:23, 5:75] = 1
    assert 60 <= count_matches(edges, [line(20)], np.array([0.5])).edge[0] <= 75


@pytest.mark.skipif(not KNOWN.exists(), reason=f"{KNOWN} is not there: NOT compared with the benchmark's own results")
@pytest.mark.slow
def test_an_image_scores_as_in_the_benchmarks_own_result_files() -> None:
    for image, row in zip(EdgeData(str(KNOWN), 2), pq.read_table(KNOWN).to_pylist(), strict=False):
        edges = decode_edges(map_in_data(image), image.hw, image.name)
        around = thresholds_of(99)[round(100 * row["threshold"]) - 2 :][:3]
        counts = count_matches(edges, image.boundary_masks(), around)
        best = best_f(around, counts)
        assert best.threshold == pytest.approx(row["threshold"])
        for name in ("recall", "precision", "f"):
            assert getattr(best, name) == pytest.approx(row[name], abs=0.005), name
        # The published ratios are of the same numbers of pixels: thresholds, thinning and annotators are the same.
        for ratio, pixels in (("recall", counts.boundary[1]), ("precision", counts.edge[1])):
            matched = row[ratio] * pixels
            assert matched == pytest.approx(round(matched), abs=1e-6 * matched + 1e-3), ratio


# --- figures ----------------------------------------------------------------------------------------------------------


def random_counts(rng: np.random.Generator, num: int) -> EdgeCounts:
    edge = np.sort(rng.integers(50, 2000, num))[::-1]
    boundary = np.full(num, 1500)
    matched = np.sort(rng.choice(1400, num, replace=False))[::-1]  # recall falls with the threshold
    return EdgeCounts(matched, boundary, (edge * np.linspace(0.3, 0.9, num)).astype(np.int64), edge.copy())


def plain_figures(thresholds: np.ndarray, counts: list[EdgeCounts]) -> dict[str, float]:
    """The benchmark's collect_eval_bdry and maxF, loop by loop."""

    def f(r: float, p: float) -> float:
        return 2 * p * r / (p + r + (p + r == 0))

    sums = np.zeros((4, len(thresholds)))
    at_best = np.zeros(4)
    for one in counts:
        columns = np.array([one.matched_boundary, one.boundary, one.matched_edge, one.edge])
        sums += columns
        of_image = [f(r, p) for r, p in zip(columns[0] / columns[1], columns[2] / columns[3], strict=True)]
        at_best += columns[:, of_image.index(max(of_image))]
    recall, precision = sums[0] / sums[1], sums[2] / sums[3]
    best = (f(recall[0], precision[0]), thresholds[0])
    for i in range(1, len(thresholds)):
        for d in np.linspace(0, 1, 100):
            r, p = (v[i] * d + v[i - 1] * (1 - d) for v in (recall, precision))
            best = max(best, (f(r, p), thresholds[i] * d + thresholds[i - 1] * (1 - d)), key=lambda pair: pair[0])
    area = 0.0
    for wanted in np.linspace(0, 1, 101):
        for i in range(len(thresholds) - 1):  # recall falls with the threshold
            if recall[i + 1] <= wanted <= recall[i]:
                part = (wanted - recall[i + 1]) / (recall[i] - recall[i + 1])
                area += 0.01 * (precision[i + 1] + part * (precision[i] - precision[i + 1]))
                break
    ois = f(at_best[0] / at_best[1], at_best[2] / at_best[3])
    return {"ods": best[0], "ods_threshold": best[1], "ois": ois, "ap": area}


def test_the_figures_are_those_of_the_benchmarks_loops() -> None:
    rng = np.random.default_rng(3)
    thresholds = thresholds_of(9)
    counts = [random_counts(rng, 9) for _ in range(5)]
    scores = edge_scores(thresholds, counts)
    for name, value in plain_figures(thresholds, counts).items():
        assert scores[name] == pytest.approx(value), name


def test_of_thresholds_with_the_same_map_the_first_is_the_best() -> None:
    """Rounding once chose a point between two of them."""
    for matched in range(1, 60):
        same = np.full(4, matched)
        counts = EdgeCounts(np.append(1, same), np.full(5, 97), np.append(1, same), np.append(90, np.full(4, 61)))
        assert best_f(thresholds_of(5), counts).threshold == thresholds_of(5)[1]


def test_r50_is_the_recall_at_half_precision() -> None:
    hundred = np.full(3, 100)
    counts = EdgeCounts(np.array([90, 60, 20]), hundred, np.array([40, 60, 80]), hundred)
    assert edge_scores(thresholds_of(3), [counts])["r50"] == pytest.approx(0.75)


def test_maps_without_edges_score_zero() -> None:
    none = np.zeros(3, np.int64)
    scores = edge_scores(thresholds_of(3), [EdgeCounts(none, np.full(3, 10), none, none)])
    assert {scores[name] for name in ("ods", "ois", "ap", "r50")} == {0.0}


# --- data and command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 16])
def test_a_map_survives_its_png(bits: int) -> None:
    edges = np.random.default_rng(0).random(HW)
    assert np.abs(decode_edges(encode_edges(edges, bits), HW, "x") - edges).max() <= 0.5 / (2**bits - 1)


def test_a_map_of_another_size_or_kind_is_an_error_of_the_image() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", HW[::-1]).save(buffer, "PNG")
    for data in (encode_edges(np.zeros((3, 3)), 8), buffer.getvalue(), b"\x89PNG\r\n\x1a\n", b""):
        with pytest.raises(ImageError, match="edge map of x"):
            decode_edges(data, HW, "x")


def test_maps_are_found_by_the_stem_of_the_image(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "2.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    data = write_data(tmp_path / "d.parquet", [(n, None, []) for n in ("b/1.jpg", "x/2.jpg", "1.jpg", "3.jpg")])
    maps, images = FolderMaps(str(tmp_path)), list(EdgeData(data))
    assert maps(images[0]) == b"b/1.png"
    assert maps(images[1]) == b"2.PNG"
    with pytest.raises(ImageError, match="2 maps"):
        maps(images[2])
    with pytest.raises(ImageError, match="no map"):
        maps(images[3])


def test_images_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    good = np.where(line(20), 1.0, 0.0)
    rows = [("1.jpg", good, [line(20)]), ("2.jpg", None, [line(20)]), ("3.jpg", good, [])]
    images = EdgeData(write_data(tmp_path / "d.parquet", rows))
    figures = evaluate_edges(images, map_in_data, 3)
    assert figures["ods"] == pytest.approx(1, abs=0.04)
    assert (figures["num_images"], figures["failures"]) == (1, {"missing": 1, "empty": 1})
    assert [one["name"] for one in figures["per_image"]] == ["1.jpg"]


def test_a_boundary_that_does_not_fit_is_an_error_of_the_image(tmp_path: Path) -> None:
    rows = [("1.jpg", np.zeros(HW), [np.ones((4, 4), bool)])]
    figures = evaluate_edges(EdgeData(write_data(tmp_path / "d.parquet", rows)), map_in_data, 3)
    assert figures["failures"] == {"unreadable": 1}


def test_the_command_evaluates_a_folder_of_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "d.parquet", [("1.jpg", None, [line(20)]), ("2.jpg", None, [line(30)])])
    (tmp_path / "maps").mkdir()
    for name, row in (("1", 20), ("2", 50)):
        (tmp_path / "maps" / f"{name}.png").write_bytes(encode_edges(np.where(line(row), 1.0, 0.0), 16))
    words = [data, "--maps", str(tmp_path / "maps"), "--thresholds", "3", "--no-ray", "--json", "-"]
    assert main(["evaluate", "edges", *words]) == 0
    figures: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert figures["ods"] == pytest.approx(0.5, abs=0.02)
    assert figures["num_images"] == 2
    assert main(["evaluate", "edges", *words[:-2]]) == 0
    assert f"{figures['ods']:.4f}" in capsys.readouterr().out


def test_data_without_boundaries_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"width": [1], "height": [1]}), tmp_path / "d.parquet")
    assert main(["evaluate", "edges", str(tmp_path / "d.parquet")]) == 2
    assert "no boundaries" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ortools.graph.python", None)
    edge_matching._solver.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'samray\[edges\]'"):
        edge_matching.check_installed()
    edge_matching._solver.cache_clear()


@pytest.mark.parametrize("width", ["large", "view"])
def test_text_and_bytes_of_any_arrow_type_are_read(tmp_path: Path, width: str) -> None:
    table = pq.read_table(write_data(tmp_path / "plain.parquet", [("a", line(20).astype(np.float32), [line(20)])]))
    text, data = (pa.large_string(), pa.large_binary()) if width == "large" else (pa.string_view(), pa.binary_view())
    columns = {
        **{name: table[name] for name in ("file_name", "width", "height")},
        "boundaries": pa.array(table["boundaries"].to_pylist(), pa.list_(text)),
        "map_png": pa.array(table["map_png"].to_pylist(), data),
    }
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    images = EdgeData(str(tmp_path / "d.parquet"))
    assert images.has_maps
    (image,) = images
    assert (image.boundary_masks()[0] == line(20)).all()


def test_a_map_of_too_many_pixels_is_a_failed_image() -> None:
    """A file of 100 bytes that says 20,000 x 20,000: Pillow's own error is no ImageError."""
    size = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    with pytest.raises(ImageError, match="more pixels than Pillow opens"):
        decode_edges(data, (20_000, 20_000), "a.jpg")
