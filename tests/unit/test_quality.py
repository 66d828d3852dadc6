"""`samray quality`: what was planted is found, nothing else is, and a check that died goes on."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import ndimage
from skimage import data

import samray
from jobs.benchmarks.quality import BORDERED, CAMERAS, DRIFTING, EVERY, Planter, camera_name
from jobs.synthetic_output import write_synthetic_output
from samray import storage
from samray.audit import job as audit_job
from samray.audit import regions as audit_regions
from samray.audit import run as audit_run
from samray.audit.drift import find_drift, holm, windows
from samray.audit.duplicates import MAX_DISTANCE, first_equal, first_match, first_near
from samray.audit.measure import Masks, prefixes
from samray.audit.outliers import distances, unusual_counts
from samray.audit.regions import Repeats, find_regions, repeats_in
from samray.cli.main import main
from samray.config import InputConfig, load_config
from samray.errors import ConfigError, StorageError
from samray.inputs.listing import list_images
from samray.output.plan import make_plan
from samray.output.quality_columns import quality_digest, values_of
from tests.support.exported import export, ten_images
from tests.support.labelled import label_missing
from tests.support.outputs import rows_of

NUM = 1600


def check(output: object, dest: object, **options: Any) -> samray.QualityReport:
    return samray.quality(str(output), str(dest), ray=False, progress=False, num_examples=2, **options)


def images_of(dest: Path) -> pa.Table:
    return pq.read_table(dest / "images")


def tables(dest: Path) -> dict[str, bytes]:
    return {str(file.relative_to(dest)): file.read_bytes() for file in dest.rglob("*.parquet")}


def write(folder: Path, *, plant: bool, num: int = NUM) -> Planter:
    planter = Planter(plant)
    options: dict[str, Any] = {"log_radius": (1.1, 1.4), "num_shapes": 10, "name_of": camera_name}
    write_synthetic_output(str(folder), num, 10, images_per_shard=200, edit=planter, **options)
    return planter


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality") / "planted"
    write(folder, plant=True)
    return folder


@pytest.fixture(scope="module")
def checked(planted: Path) -> Path:
    check(planted, planted.parent / "checked")
    return planted.parent / "checked"


# --- an output with faults, and one without --------------------------------------------------------------------------


def test_a_clean_output_raises_no_alarm(tmp_path: Path) -> None:
    write(tmp_path / "clean", plant=False)
    report = check(tmp_path / "clean", tmp_path / "dest")
    assert report.counts.pop("images") == NUM
    assert report.counts.pop("masks") > 5 * NUM
    assert report.counts.pop("tested_groups") == CAMERAS + 1 - 1  # one window alone has nothing to be compared with
    assert set(report.counts.values()) == {0}
    page = Path(report.page).read_text()
    assert "nothing found" in page
    assert "None of 10 groups drifts" in page


def test_every_planted_fault_is_found(planted: Path, checked: Path) -> None:
    images = images_of(checked).to_pylist()
    ids = [row["image_id"] for row in images]
    assert ids == list(range(NUM))
    repeats = {row["image_id"]: row["same_masks_as"] for row in images if row["same_masks_as"] is not None}
    assert repeats == {i: i - 1 for i in range(NUM) if i % EVERY == 251 and i % 200}
    empty = [row["image_id"] for row in images if row["few_masks"]]
    assert empty == [i for i in range(NUM) if i % EVERY == 501]
    assert all(row["num_masks"] == 0 for row in images if row["few_masks"])
    bordered = [row["image_id"] for row in images if row["repeated_masks"]]
    wanted = [i for i in range(NUM) if i % CAMERAS == BORDERED]
    assert set(bordered) <= set(wanted)
    assert len(bordered) > 0.95 * len(wanted)
    (region,) = pq.read_table(checked / "regions.parquet").to_pylist()
    assert region["prefix"] == f"camera-{BORDERED}/"
    assert (region["x0"], region["x1"]) == (0.0, 1.0)
    tests = [test for test in pq.read_table(checked / "groups.parquet").to_pylist() if test["drifts"]]
    of_iou = [test["group"] for test in tests if test["metric"] == "predicted_iou"]
    assert of_iou == [f"camera-{DRIFTING}/"]
    # The border itself is a large mask, which shows in the sizes of its camera's masks, and nowhere else.
    assert {test["group"] for test in tests} <= {f"camera-{DRIFTING}/", f"camera-{BORDERED}/"}
    assert all(row["in_drift"] for row in images if row["image_id"] % CAMERAS == DRIFTING)


def test_the_worst_images_can_be_labelled_exported_and_reported(planted: Path, checked: Path, tmp_path: Path) -> None:
    review = pq.read_table(checked / "review.parquet").to_pylist()
    assert [row["rank"] for row in review] == list(range(1, len(review) + 1))
    assert review[0]["few_masks"]
    assert review[0]["uri"] == camera_name(501)
    listed, _ = list_images(str(checked / "review.parquet"), InputConfig(allow_outside=True))
    assert [uri.rpartition("/")[2] for uri in listed["uri"].to_pylist()].count("0000501.jpg") == 1
    report = samray.export(
        str(planted),
        str(tmp_path / "flat"),
        format="flat",
        progress=False,
        ray=False,
        where="quality.repeated_masks > 0 and quality.same_masks_as is null and area > 0",
        quality=str(checked),
    )
    wanted = sum(row["repeated_masks"] > 0 and row["same_masks_as"] is None for row in images_of(checked).to_pylist())
    assert report.num_images == wanted > 0
    arguments = ["report", str(planted), "--out", str(tmp_path / "page.html"), "--images", "1"]
    assert main([*arguments, "--where", "quality.rank <= 3", "--quality", str(checked)]) == 0
    assert '<b>3</b><span class="what">images</span>' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("where", "message"),
    [("quality.outliar > 3", "did you mean outlier?"), ("quality.is_dark", "more with `samray quality --images`")],
)
def test_a_wrong_column_of_quality_is_one_sentence(
    planted: Path, checked: Path, tmp_path: Path, where: str, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        samray.export(
            str(planted), str(tmp_path / "dest"), format="flat", where=where, quality=str(checked), progress=False
        )
    assert message in str(error.value)
    with pytest.raises(ConfigError, match="has no finished `samray quality`"):
        samray.export(str(planted), str(tmp_path / "dest"), format="flat", where="quality.rank < 3", progress=False)


# --- resume and refusals ---------------------------------------------------------------------------------------------


def test_a_check_that_died_goes_on(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_job, "IMAGES_PER_PIECE", 400)
    whole = check(planted, tmp_path / "whole")
    assert whole.num_pieces == NUM // 400
    run_piece = audit_run.run_piece

    def dies(job: Any, piece: Any) -> Any:
        if piece.number == 2:
            # The first of its two files is there, the mark is not.
            storage.put(job.measured(piece, "-repeats"), b"torn")
            raise KeyboardInterrupt
        return run_piece(job, piece)

    monkeypatch.setattr(audit_run, "run_piece", dies)
    with pytest.raises(KeyboardInterrupt):
        check(planted, tmp_path / "killed")
    assert not (tmp_path / "killed" / "quality.json").exists()
    monkeypatch.setattr(audit_run, "run_piece", run_piece)
    again = check(planted, tmp_path / "killed")
    assert again.num_pieces_skipped == 2
    assert again.counts == whole.counts
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")


def test_refusals_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ten_images(str(tmp_path))
    dest = tmp_path / "dest"
    assert check(plan.output, dest).counts["failed"] == 1
    with pytest.raises(ConfigError, match="has a different check"):
        check(plan.output, dest, prefix_depth=2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(ConfigError, match="not a samray quality check"):
        check(plan.output, tmp_path / "other")
    shard = Path(plan.output, "annotations", "shard-000001.parquet")
    pq.write_table(pq.read_table(shard).slice(1), shard)
    with pytest.raises(StorageError, match="as planned"):
        check(plan.output, tmp_path / "fewer")
    shard.unlink()
    with pytest.raises(ConfigError, match="is not finished"):
        check(plan.output, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert main(["quality", plan.output, "--prefix-depth", "0"]) == 2
    capsys.readouterr()


def test_the_default_place_is_in_the_output(tmp_path: Path) -> None:
    plan = ten_images(str(tmp_path))
    samray.quality(plan.output, progress=False, ray=False)
    assert Path(plan.output, "_samray", "quality", "quality.html").exists()
    rows_of(plan.output)  # still a sound output
    report = export(plan, tmp_path / "coco", "coco", where="quality.rank <= 4")
    assert report.num_images + report.num_failed <= 5
    assert report.num_images >= 3
    assert export(plan, tmp_path / "flat", "flat", where="quality.image_id is not null and area > 0").num_images == 9
    # Another check in the same place: what was begun with the first one does not go on with it.
    shutil.rmtree(Path(plan.output, "_samray", "quality"))
    samray.quality(plan.output, progress=False, ray=False, prefix_depth=2)
    with pytest.raises(ConfigError, match=r"different export \(quality"):
        export(plan, tmp_path / "coco", "coco", where="quality.rank <= 4")


def test_another_check_in_the_same_place_is_read_anew(tmp_path: Path) -> None:
    folder = str(tmp_path)
    for rank in (1, 2):
        table = pa.table({"image_id": [7, 3], "rank": [9, rank]})
        storage.put(storage.join(folder, "images", "part-000000.parquet"), audit_job.parquet_bytes(table))
        storage.put(storage.join(folder, "quality.json"), b'{"images": %d}' % rank)
        ranks = values_of(folder, quality_digest(folder), "rank", pa.array([3, 4, None, 7]))
        assert ranks.to_pylist() == [rank, None, None, 9]


# --- with the images -------------------------------------------------------------------------------------------------


def jpeg(pixels: np.ndarray, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def photographs() -> dict[str, bytes]:
    coffee, cat, rocket = data.coffee(), data.chelsea(), data.rocket()
    resized = np.asarray(Image.fromarray(coffee).resize((450, 300), Image.Resampling.LANCZOS))
    return {
        "a/coffee.jpg": jpeg(coffee),
        "a/rocket.jpg": jpeg(rocket),
        "b/again.jpg": jpeg(coffee),
        "b/blank.jpg": jpeg(np.full((200, 300, 3), 90, np.uint8)),
        "b/blank2.jpg": jpeg(np.full((220, 300, 3), 90, np.uint8)),
        "b/blurred.jpg": jpeg(ndimage.gaussian_filter(cat, (4, 4, 0))),
        "b/broken.jpg": b"no image",
        "b/dark.jpg": jpeg((data.astronaut() * 0.12).astype(np.uint8)),
        "b/gone.jpg": jpeg(rocket[100:400, 50:500]),
        "b/resized.jpg": jpeg(resized, 70),
    }


def label_folder(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        storage.put(storage.join(str(root / "in"), name), content)
    config = load_config(None, None, ["output.images_per_shard=4"])
    plan = make_plan(str(root / "in"), str(root / "out"), config, config.identity())
    label_missing(plan, config)
    return plan.output


def test_duplicates_and_bad_images_are_found_by_their_pixels(tmp_path: Path) -> None:
    files = photographs()
    output = label_folder(tmp_path, files)
    other = label_folder(
        tmp_path / "second", {"x.jpg": files["a/rocket.jpg"], "y.jpg": jpeg(np.stack([data.moon()] * 3, 2))}
    )
    (tmp_path / "in" / "b" / "gone.jpg").unlink()
    report = check(output, tmp_path / "dest", images=True, against=other)
    names = sorted(files)
    rows = {names[row["image_id"]]: row for row in images_of(tmp_path / "dest").to_pylist()}

    def having(column: str) -> dict[str, Any]:
        return {name: row[column] for name, row in rows.items() if row[column] is not None and row[column] is not False}

    assert having("duplicate_of") == {"b/again.jpg": names.index("a/coffee.jpg")}
    assert having("near_duplicate_of").keys() == {"b/again.jpg", "b/resized.jpg"}
    assert having("is_blank").keys() == {"b/blank.jpg", "b/blank2.jpg"}
    assert having("is_blurred").keys() == {"b/blurred.jpg"}
    assert having("is_dark").keys() == {"b/dark.jpg"}
    assert having("in_against") == {"a/rocket.jpg": 0}
    assert rows["b/broken.jpg"]["brightness"] is None
    assert report.counts["duplicate_of"] == 1
    assert report.counts["unreadable"] == 1  # not the one that failed when it was labelled
    first = pq.read_table(tmp_path / "dest" / "review.parquet").slice(0, 4)["file_name"].to_pylist()
    assert set(first) == {"b/blank.jpg", "b/blank2.jpg", "b/blurred.jpg", "b/dark.jpg"}
    assert "data:image/jpeg" in Path(report.page).read_text()


# --- the parts -------------------------------------------------------------------------------------------------------


def test_prefixes_are_the_first_folders() -> None:
    names = pa.array(["a/b/c.jpg", "a/c.jpg", "c.jpg", "a\nb/c\nd.jpg", "c\nd.jpg", None])
    assert prefixes(names, 1).to_pylist() == ["a/", "a/", "", "a\nb/", "", ""]
    assert prefixes(names, 2).to_pylist() == ["a/b/", "a/", "", "a\nb/", "", ""]


def test_regions_are_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(6)
    pieces = []
    for before in (0, 100):
        repeats = Repeats()
        # Ten places that each image has a mask at, a little off, as of a camera that does not move.
        places = np.tile(np.stack([np.arange(10) * 60 + 7, np.arange(10) * 30 + 5], 1), (100, 1))
        places = places + rng.random((1000, 2))
        boxes = np.concatenate([places, np.tile([[30.0, 20.0]], (1000, 1))], axis=1)
        masks = Masks(np.repeat(np.arange(100), 10), boxes, np.full(1000, 450.0), np.tile([[640.0, 480.0]], (1000, 1)))
        repeats.add(masks, 0)
        pieces.append((repeats_in(repeats, pa.table({"prefix": ["a/"] * 100})), before))
    whole = find_regions(lambda: pieces, {"a/": 200})
    assert whole.table.num_rows >= 10
    monkeypatch.setattr(audit_regions, "MASKS_AT_ONCE", 300)
    parts = find_regions(lambda: pieces, {"a/": 200})
    assert parts.table.equals(whole.table)
    assert np.bincount(parts.images).tolist() == np.bincount(whole.images).tolist()


def test_near_duplicates_are_those_of_every_pair() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 2**63, 60).astype(np.uint64)
    # Up to 5 bits away from a seed: some within MAX_DISTANCE of each other, some not.
    hashes = np.concatenate([seeds, *([seeds ^ flips(rng, n) for n in range(1, 6)])])
    has = rng.random(len(hashes)) > 0.1
    nearest = first_near(hashes, has)
    # Plain: connect all pairs, and take the first of each component.
    parent = list(range(len(hashes)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i in range(len(hashes)):
        for j in range(i):
            if has[i] and has[j] and int(hashes[i] ^ hashes[j]).bit_count() <= MAX_DISTANCE:
                low, high = sorted((root(i), root(j)))
                parent[high] = low
    wanted = [root(i) if has[i] and root(i) != i else -1 for i in range(len(hashes))]
    assert nearest.tolist() == wanted
    assert 60 < (nearest >= 0).sum() < 300


def flips(rng: np.random.Generator, number: int) -> np.ndarray:
    masks = [sum(1 << int(bit) for bit in rng.choice(64, number, replace=False)) for _ in range(60)]
    return np.array(masks, np.uint64)


def test_numbers_of_masks_that_vary_much_are_no_alarm() -> None:
    rng = np.random.default_rng(5)
    # As of 200,000 images: a share of 20 possible masks that differs by image, a wide Poisson, always 20.
    for counts in (rng.binomial(20, rng.uniform(0.5, 1, 200_000)), rng.poisson(60, 200_000), np.full(200_000, 20)):
        planted = counts.astype(float)
        planted[[7, 8]] = 0, 1000
        z, median = distances("num_masks", planted, np.zeros(200_000, np.int64), 1)
        has_few, has_many = unusual_counts(planted, z, median)
        assert (np.flatnonzero(has_few).tolist(), np.flatnonzero(has_many).tolist()) == ([7], [8])


def test_equal_hashes_are_found() -> None:
    hashes = np.array([5, 7, 5, 7, 9, 5], np.uint64)
    has = np.array([True, True, True, False, True, True])
    assert first_equal(hashes, has).tolist() == [-1, -1, 0, -1, -1, 0]
    assert first_match(hashes, has, np.array([1, 9, 5, 5], np.uint64)).tolist() == [2, -1, 2, -1, 1, 2]
    assert first_match(hashes, has, np.zeros(0, np.uint64)).tolist() == [-1] * 6
    assert first_equal(hashes, np.zeros(6, bool)).tolist() == first_near(hashes, np.zeros(6, bool)).tolist() == [-1] * 6


def test_holm_is_the_textbook_one() -> None:
    # Holm, 1979: the smallest p times 4, the next times 3, ..., never falling.
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_drift_is_found_and_chance_is_not() -> None:
    rng = np.random.default_rng(3)
    group_of = np.repeat(np.arange(40), 300)
    names = [f"g{i}" for i in range(40)]
    values = rng.normal(size=len(group_of))
    groupings = {"prefix": (group_of, names), "window": windows(len(group_of))}
    assert not any(test.drifts for test in find_drift({"m": values}, groupings))
    shifted = values + 0.8 * (group_of == 7)
    assert [(t.kind, t.group) for t in find_drift({"m": shifted}, groupings) if t.drifts] == [("prefix", "g7")]
    # Significant with so many images, but too small to matter.
    slightly = rng.normal(size=100_000) + 0.1 * (np.arange(100_000) % 2)
    tests = find_drift({"m": slightly}, {"prefix": (np.arange(100_000) % 2, ["a", "b"])})
    assert all(test.p < 1e-6 and not test.drifts for test in tests)


def test_the_binned_distance_is_scipys() -> None:
    from scipy import stats

    rng = np.random.default_rng(4)
    group_of = (np.arange(6000) % 3 == 0).astype(np.int64)
    values = rng.gamma(2.0, size=6000) + 0.5 * group_of
    test = find_drift({"m": values}, {"prefix": (group_of, ["a", "b"])})[0]
    exact = stats.ks_2samp(values[group_of == 1], values[group_of == 0], method="asymp").statistic
    assert exact - 0.003 <= test.d <= exact + 1e-12
