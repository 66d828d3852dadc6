"""Masks that lie: every command answers with a sentence, never with a crash or with gigabytes.

An OUTPUT may be damaged, or come from somebody else. pycocotools trusts run lengths: it writes outside of its memory
where they sum to more than height * width, and reads outside of a string that stops inside a number.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

import samray
from samray.cli.main import main
from samray.errors import ImageError, StorageError
from samray.evaluate.regions import RegionData
from samray.exports.formats import FORMATS
from samray.imports import records
from samray.imports.records import counts_of, record_of
from samray.output.plan import Plan
from samray.output.schema import ImageRecord, records_to_table
from samray.output.shards import read_shard, replace_shard
from samray.output.verify import verify
from samray.output.verify_rows import check_mask
from samray.rle import runs
from samray.rle.polygons import join, outlines
from samray.rle.runs import MAX_CHARS, area, bbox_xywh, checked_runs, pixels, run_lengths
from tests.support import REPOSITORY
from tests.support.handmade import HEIGHT, WIDTH, annotation, blob, write_output
from tests.support.hostile import FAR, LIES, SIZES, SOUND, N, covering, rle, string_of

pytestmark = pytest.mark.slow

EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sa1b": ("sa1b", {}),
    "tar": ("sa1b", {"tar": True}),
    "coco": ("coco", {}),
    "polygons": ("coco", {"polygons": True}),
    "review": ("coco", {"confident": 0.1}),
    "yolo": ("yolo", {}),
    "flat": ("flat", {}),
    "label-map": ("label-map", {}),
    "geojson": ("geojson", {"coordinates": "pixels"}),
    "geoparquet": ("geoparquet", {"coordinates": "pixels"}),
}


def output_with(
    folder: Path, mask: dict[str, Any], hw: tuple[int, int] = (HEIGHT, WIDTH), categories: tuple[str, ...] = ()
) -> Plan:
    """Three images; the second one is of that size and has that mask after a sound one."""
    names, masks = ["a.png", "b.png", "c.png"], lambda index: [annotation(blob(index))]
    plan = write_output(str(folder), names, masks=masks, categories=categories)
    rows = read_shard(plan.output, 0).to_pylist()
    rewritten = [
        ImageRecord(**row["image"], uri=row["uri"], annotations=row["annotations"])
        for row in rows
    ]  # fmt: skip
    image = {**rows[1]["image"], "height": hw[0], "width": hw[1]}
    first = 65536 * image["image_id"]
    masks = [{**SOUND, "id": first}, {**SOUND, **mask, "id": first + 1}]
    rewritten[1] = ImageRecord(**image, uri=rows[1]["uri"], annotations=masks)
    replace_shard(plan.output, 0, records_to_table(rewritten, plan.run))
    return plan


def peak_kib(*, reset: bool = False) -> int:
    """The most memory that this process has had resident; reset: from now on.

    Not ru_maxrss, which a child inherits from the process that started it.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    match = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match
    return int(match[1])


CASES = {name: ({"segmentation": lie}, (HEIGHT, WIDTH)) for name, lie in LIES.items()} | {
    name: (covering(hw), hw) for name, hw in SIZES.items()
}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def hostile_output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return output_with(tmp_path_factory.mktemp("hostile"), *CASES[request.param])


def test_verify_names_the_mask(hostile_output: Plan) -> None:
    problems = verify(hostile_output.output, deep=True).problems
    assert any("image 1" in problem for problem in problems), problems
    assert all("image 0" not in problem and "image 2" not in problem for problem in problems), problems


@pytest.mark.parametrize("case", EXPORTS)
def test_exports_pass_nothing_on(hostile_output: Plan, tmp_path: Path, case: str) -> None:
    format, options = EXPORTS[case]
    with pytest.raises(StorageError, match=r"image 1\b.* has "):
        samray.export(hostile_output.output, str(tmp_path / "there"), format=format, progress=False, **options)


@pytest.mark.parametrize("case", CASES)
def test_pairs_of_image_and_phrase_pass_nothing_on(case: str, tmp_path: Path) -> None:
    plan = output_with(tmp_path, *CASES[case], categories=("thing",))
    with pytest.raises(StorageError, match=r"image 1\b.* has "):
        samray.export(plan.output, str(tmp_path / "there"), format="saco", progress=False)


def test_every_format_is_among_these() -> None:
    assert {format for format, _ in EXPORTS.values()} | {"saco"} == set(FORMATS)


@pytest.mark.parametrize("kind", ["bool", "rle"])
def test_the_data_set_raises_and_goes_on(hostile_output: Plan, kind: Any) -> None:
    dataset = samray.MaskDataset(hostile_output.output, masks=kind)
    with pytest.raises(StorageError, match=r"image 1\b|b\.png"):
        dataset[1]
    assert len(dataset[2][1]["boxes"]) == 1


def test_evaluate_counts_a_failed_image(hostile_output: Plan) -> None:
    one, two, three = RegionData(hostile_output.output)
    assert isinstance(two, ImageError)
    assert not isinstance(one, ImageError)
    assert not isinstance(three, ImageError)


def test_corrections_take_no_lie_over(hostile_output: Plan, tmp_path: Path) -> None:
    images = [{"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{name}.png"} for i, name in enumerate("abc")]
    annotations = [{"image_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]}]
    source = tmp_path / "corrected.json"
    source.write_text(json.dumps({"images": images, "annotations": annotations}))
    options: dict[str, Any] = {"corrects": hostile_output.output, "progress": False}
    try:
        samray.import_(str(source), str(tmp_path / "out"), **options)
    except StorageError as error:
        assert str(error).startswith("image 1")  # noqa: PT017
    else:  # of another size than the person's image
        assert [row["status"] for row in read_shard(str(tmp_path / "out"), 0).to_pylist()] == ["ok", "failed", "ok"]


def test_the_report_shows_the_others(hostile_output: Plan, tmp_path: Path) -> None:
    assert main(["report", hostile_output.output, "--out", str(tmp_path / "report.html")]) == 0


def test_one_process_meets_all_of_them_with_little_memory(tmp_path: Path) -> None:
    """Each command on an image of 2^30 pixels with masks from a few bytes, and on sizes that are refused."""
    script = """
import sys, json, torch
from pathlib import Path
import samray
from samray.errors import SamrayError
from samray.cli.main import main
from samray.output.verify import verify
from tests.unit.test_hostile_masks import CASES, EXPORTS, output_with, many_in_one, peak_kib
torch.set_num_threads(1)
plans = [output_with(Path(sys.argv[1]) / str(i), *CASES[name]) for i, name in enumerate(CASES) if name == "2^40 pixels"]
plans.append(many_in_one(Path(sys.argv[1]) / "many"))
before = peak_kib()
for plan in plans:
    verify(plan.output, deep=True)
    main(["report", plan.output, "--out", plan.output + ".html"])
    for name, (format, options) in EXPORTS.items():
        try:
            samray.export(plan.output, f"{plan.output}-{name}", format=format, progress=False, **options)
        except SamrayError as error:
            print(name, str(error)[:90])
    for masks in ("bool", "rle", "boxes"):
        try:
            samray.MaskDataset(plan.output, masks=masks, images=False)[0]
            samray.MaskDataset(plan.output, masks=masks, images=False)[1]
        except SamrayError as error:
            print(masks, str(error)[:90])
print(json.dumps([before, peak_kib()]))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    before, after = json.loads(done.stdout.splitlines()[-1])
    assert after < 2 * 2**20, f"{before} KiB, then {after} KiB"


def many_in_one(folder: Path) -> Plan:
    """An image of 2^30 pixels with two masks that cover it, each from a few characters."""
    hw = (2**13, 2**17)
    plan = output_with(folder, {}, hw)
    rows = read_shard(plan.output, 0).to_pylist()
    mask = covering(hw)
    first = 65536 * rows[1]["image"]["image_id"]
    hostile = [
        ImageRecord(**rows[1]["image"], uri=rows[1]["uri"], annotations=[{**mask, "id": first + i} for i in range(2)])
    ]
    kept = [ImageRecord(**row["image"], uri=row["uri"], annotations=row["annotations"]) for row in rows]
    replace_shard(plan.output, 0, records_to_table([kept[0], *hostile, kept[2]], plan.run))
    return plan


# --- what comes in --------------------------------------------------------------------------------------------------

POLYGONS: dict[str, Any] = {
    "far corners": [[0, 0, 1e9, 0, 1e9, 1e9]],
    "corners at 2^26": [[-(2**26), -(2**26), 2**26, -(2**26), 2**26, 2**26]],
    "huge floats": [[0, 0, 1e300, 0, 1e300, 1e300]],
    "NaN": [[0, 0, float("nan"), 4, 4, 4]],
    "infinity": [[0, 0, float("inf"), 4, 4, 4]],
    "an odd number": [[0, 0, 4, 0, 4, 4, 1]],
    "text": [["a", "b", "c", "d", "e", "f"]],
    "a huge whole number": [[0, 0, 10**400, 0, 4, 4]],
    "nested too deep": [[[[0, 0], [4, 0], [4, 4]]]],
    "many long ones": [[0, 0, 1e6, 0, 1e6, 1e6]] * 100,
    "plain runs that sum to more": rle([0, N + 1]),
    "plain runs that wrap": rle([2**63, 2**63, N]),
    "a negative plain run": rle([-1, N + 1]),
    "a plain run that is half a pixel": rle([0.5, N - 0.5]),
    "plain runs of text": rle(["1", str(N - 1)]),
    "a size of text": rle(string_of(0, N), (str(HEIGHT), str(WIDTH))),
    "a size that is no list": {"size": N, "counts": string_of(0, N)},
    "counts that are a mapping": {"size": [HEIGHT, WIDTH], "counts": {}},
    "no counts": {"size": [HEIGHT, WIDTH]},
    "a number": 5,
    "a text": "mask",
}


@pytest.mark.parametrize("segmentation", (LIES | POLYGONS).values(), ids=(LIES | POLYGONS).keys())
def test_an_annotation_that_lies_makes_a_failed_row(segmentation: Any) -> None:
    planned = {"image_id": 3, "file_name": "a.png", "uri": "/a.png"}
    hw = {"height": HEIGHT, "width": WIDTH}
    record, dropped = record_of(planned, hw, [SOUND, {**SOUND, "segmentation": segmentation}], "coco")
    assert (record.error or "").startswith("unreadable: annotation 1 is not valid: ")
    assert dropped == 0


@pytest.mark.parametrize("hw", [*SIZES.values(), (FAR, 1.0), (0.5, 3), ("4", "4"), (None, 4), (True, 4), ([4], 4)])
def test_an_image_of_an_impossible_size_is_a_failed_row(hw: tuple[Any, Any]) -> None:
    planned = {"image_id": 3, "file_name": "a.png", "uri": "/a.png"}
    record, _ = record_of(planned, {"height": hw[0], "width": hw[1]}, [SOUND], "coco")
    assert (record.error or "").startswith("unreadable: the image has the ")


def test_short_polygons_may_not_grow_into_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_IMAGE_CHARS", 2**20)
    before = peak_kib(reset=True)
    planned = {"image_id": 3, "file_name": "a.png", "uri": "/a.png"}
    slope = [[0, 0, 2**17, 1000, 2**17, 900]]
    record, _ = record_of(planned, {"height": 1000, "width": 2**17}, [{"segmentation": slope}] * 10_000, "coco")
    assert (record.error or "").startswith("too_large: its masks have more than ")
    assert peak_kib() < before + 2**20


def test_runs_without_a_pixel_are_joined() -> None:
    spelled = string_of(3, 5, 0, 2, 4, 0, 7, 0, 0, 1, N - 22, 0)
    counts = counts_of(rle(spelled), (HEIGHT, WIDTH))
    assert counts == string_of(3, 7, 11, 1, N - 22)


# --- properties -----------------------------------------------------------------------------------------------------


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """(H, W) bool, up to 12 x 12."""
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return np.array(bits).reshape(height, width)


@given(masks())
@settings(deadline=None, max_examples=200)
def test_the_decoder_agrees_with_pycocotools(mask: np.ndarray) -> None:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    runs = checked_runs(encoded["counts"].decode(), mask.shape)
    assert np.array_equal(pixels(runs, mask.shape), mask)
    assert area(runs) == coco_mask.area(encoded)
    assert bbox_xywh(runs, mask.shape) == coco_mask.toBbox(encoded).tolist()
    segmentation = {"size": list(mask.shape), "counts": encoded["counts"].decode()}
    assert counts_of(segmentation, mask.shape) == segmentation["counts"] == string_of(*runs.tolist())
    assert counts_of({**segmentation, "counts": [float(run) for run in runs]}, mask.shape) == segmentation["counts"]


@given(masks())
@settings(deadline=None, max_examples=100)
def test_outlines_filled_again_are_the_mask(mask: np.ndarray) -> None:
    if not mask.any():
        return
    (components,) = outlines([checked_runs(annotation(mask)["segmentation"]["counts"], mask.shape)], mask.shape)
    polygons = [join(rings).ravel().tolist() for rings in components]
    counts = counts_of(polygons, mask.shape)
    assert counts is not None
    assert np.array_equal(pixels(checked_runs(counts, mask.shape), mask.shape), mask)


@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=40), st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None, max_examples=200)
def test_any_string_is_a_mask_of_its_size_or_refused(text: str, height: int, width: int) -> None:
    try:
        runs = checked_runs(text, (height, width))
    except ValueError:
        mask = {**SOUND, "segmentation": rle(text, (height, width))}
        assert check_mask(mask, "coco") is not None
        return
    assert runs.min() >= 0
    assert runs.sum() == height * width == pixels(runs, (height, width)).size


@given(st.lists(st.lists(st.floats(width=32) | st.integers(-50, 50), max_size=10), max_size=3))
@settings(deadline=None, max_examples=150)
def test_any_polygon_is_a_mask_or_refused(polygons: list[list[float]]) -> None:
    try:
        counts = counts_of(polygons, (7, 9))
    except ValueError:
        return
    if counts is not None:
        assert pixels(checked_runs(counts, (7, 9)), (7, 9)).shape == (7, 9)


def test_a_string_may_be_long_but_not_endless() -> None:
    with pytest.raises(ValueError, match="at most"):
        checked_runs("0" * (MAX_CHARS + 1), (HEIGHT, WIDTH))
    assert run_lengths("0" * (MAX_CHARS + 1)) is None


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(min_codepoint=44, max_codepoint=114), max_size=20) | masks(), st.integers(1, 9)
        ),
        max_size=6,
    ),
    st.integers(1, 60),
)
@settings(deadline=None, max_examples=300)
def test_many_strings_are_checked_as_each_one_is(some: list[tuple[Any, int]], at_once: int) -> None:
    strings, sizes = [], []
    for value, side in some:
        if isinstance(value, str):
            strings.append(value)
            sizes.append((side, side))
        else:
            strings.append(coco_mask.encode(np.asfortranarray(value.astype(np.uint8)))["counts"].decode())
            sizes.append(value.shape)
    sound = True
    for text, hw in zip(strings, sizes, strict=True):
        try:
            checked_runs(text, hw)
        except ValueError:
            sound = False
    with mock.patch.object(runs, "_CHARS_AT_ONCE", at_once):
        counts = pa.array(["before", *strings], pa.string())[1:]
        assert runs.all_sound(counts, np.array([h * w for h, w in sizes], np.int64)) == sound
