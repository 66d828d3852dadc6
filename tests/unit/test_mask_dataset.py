"""MaskDataset and read_image: what they return, what they leave out, and that they read no more than they must.

The file is long because its cases share their helpers.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

import samray
from samray import MaskDataset, storage
from samray.config import load_config
from samray.errors import ConfigError, StorageError
from samray.inputs.decode import decode_image
from samray.output import lookup, mask_dataset, shards
from samray.output.append import join_images
from samray.output.plan import Plan, make_plan
from samray.output.schema import ImageRecord, records_to_table
from samray.output.verify import verify
from tests.support.handmade import annotation as mask_of
from tests.support.handmade import blob, write_output
from tests.support.labelled import BLACK, BROKEN, image_bytes, label_missing, make_input, make_output

IDS = [i for i in range(10) if i != BROKEN]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = make_output(str(tmp_path_factory.mktemp("labelled")))
    report = verify(plan.output, deep=True)
    assert report.ok, report.problems
    assert report.num_failed == 1
    return plan


def row_of(plan: Plan, image_id: int) -> dict[str, Any]:
    rows = [row for shard in range(plan.num_shards) for row in shards.read_shard(plan.output, shard).to_pylist()]
    return next(row for row in rows if row["image"]["image_id"] == image_id)


def test_items_are_as_torchvision_lays_them_out(plan: Plan) -> None:
    dataset = MaskDataset(plan.output)
    assert isinstance(dataset, torch.utils.data.Dataset)
    assert len(dataset) == len(IDS)
    assert [dataset[i][1]["image_id"] for i in range(len(dataset))] == IDS
    for image, target in dataset:
        row = row_of(plan, target["image_id"])
        pixels = decode_image(image_bytes(target["image_id"]), 10**6)
        assert image.dtype == torch.uint8
        assert image.is_contiguous()
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
        annotations = row["annotations"]
        number = len(annotations)
        assert target["masks"].shape == (number, *pixels.shape[:2])
        assert target["masks"].dtype == torch.bool
        for mask, annotation in zip(target["masks"], annotations, strict=True):
            assert np.array_equal(mask.numpy(), coco_mask.decode(annotation["segmentation"]))
        assert target["masks"].sum((1, 2)).tolist() == target["area"].tolist() == [a["area"] for a in annotations]
        boxes = np.array([a["bbox"] for a in annotations]).reshape(-1, 4)
        assert target["boxes"].dtype == torch.float32
        assert np.array_equal(target["boxes"].numpy(), np.c_[boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
        for name, dtype in (("labels", torch.int64), ("iscrowd", torch.int64), ("area", torch.int64)):
            assert (target[name].dtype, target[name].shape) == (dtype, (number,))
        assert target["labels"].eq(1).all()
        assert not target["iscrowd"].any()
        assert target["predicted_iou"].tolist() == pytest.approx([a["predicted_iou"] for a in annotations])
        assert target["stability_score"].tolist() == pytest.approx([a["stability_score"] for a in annotations])
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    assert dataset[-1][1]["image_id"] == IDS[-1]


def test_images_and_targets_by_themselves_are_those_of_the_items(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = MaskDataset(plan.output, transforms=lambda image, target: None)
    plain = MaskDataset(plan.output)
    with pytest.raises(ConfigError, match="opened with images=False"):
        MaskDataset(plan.output, images=False).image(0)
    wanted = plain[-1]
    assert torch.equal(dataset.image(-1), wanted[0])
    monkeypatch.setattr(MaskDataset, "image", lambda *_: pytest.fail("read the image"))
    target = dataset.target(-1)
    assert target["image_id"] == wanted[1]["image_id"] == IDS[-1]
    assert torch.equal(target["masks"], wanted[1]["masks"])
    with pytest.raises(IndexError):
        dataset.target(len(dataset))


def test_an_image_without_masks_is_an_item_unless_left_out(plan: Plan) -> None:
    target = MaskDataset(plan.output)[IDS.index(BLACK)][1]
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 16, 24 + BLACK)
    without = MaskDataset(plan.output, keep_empty=False, images=False, masks="boxes")
    assert [target["image_id"] for _, target in without] == [i for i in IDS if i != BLACK]


def test_boxes_only_reads_and_decodes_no_run_lengths(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[str]] = []
    original = lookup.read_row_group

    def recording(*arguments: Any) -> pa.Table:
        table = original(*arguments)
        read.append([field.name for field in table.schema.field("annotations").type.value_type])
        return table

    monkeypatch.setattr("samray.output.mask_dataset.read_row_group", recording)
    monkeypatch.setattr(mask_dataset, "pixels", lambda *_: pytest.fail("decoded"))
    full = MaskDataset(plan.output, images=False, masks="rle")
    for (_, target), (image, boxes) in zip(full, MaskDataset(plan.output, images=False, masks="boxes"), strict=True):
        assert image is None
        assert target["segmentation"] == [a["segmentation"] for a in row_of(plan, target["image_id"])["annotations"]]
        assert boxes.keys() == target.keys() - {"segmentation"}
        assert all(torch.equal(torch.as_tensor(boxes[name]), torch.as_tensor(target[name])) for name in boxes)
    assert ["bbox", "area", "predicted_iou", "stability_score"] in [sorted(names, key=names.index) for names in read]
    assert any("segmentation" in names for names in read)


def varied(plan: Plan) -> None:
    """Give the masks of the first shard scores of their own."""
    table = shards.read_shard(plan.output, 0)
    rows = table.to_pylist()
    for row in rows:
        for i, mask in enumerate(row["annotations"]):
            mask.update(predicted_iou=0.7 + 0.1 * ((i + 1) % 3), stability_score=0.9 + 0.01 * i)
    changed = pa.Table.from_pylist(rows, schema=table.schema)
    shards.replace_shard(plan.output, 0, changed)


def test_filters_keep_what_passes_in_its_order(tmp_path: Path) -> None:
    plan = make_output(str(tmp_path))
    varied(plan)
    masks = row_of(plan, 0)["annotations"]
    assert [round(mask["predicted_iou"], 1) for mask in masks] == [0.8, 0.9, 0.7]

    def kept(**filters: Any) -> list[int]:
        _, target = MaskDataset(plan.output, images=False, **filters)[0]
        assert len(target["masks"]) == len(target["boxes"]) == len(target["area"])
        areas = [mask["area"] for mask in masks]
        return [areas.index(area) for area in target["area"].tolist()]

    assert kept() == [0, 1, 2]
    assert kept(min_predicted_iou=0.75) == [0, 1]
    assert kept(min_stability=0.905) == [1, 2]
    assert kept(min_area=sorted(mask["area"] for mask in masks)[1]) == [
        i for i in range(3) if masks[i]["area"] > min(mask["area"] for mask in masks)
    ]
    assert kept(max_masks=2) == [0, 1]
    assert kept(max_masks=1) == [1]
    assert kept(max_masks=5, min_predicted_iou=0.95) == []


def test_transforms_get_both(plan: Plan) -> None:
    def flip(image: torch.Tensor, target: dict[str, Any]) -> Any:
        return image.flip(-1), {**target, "masks": target["masks"].flip(-1)}

    image, target = MaskDataset(plan.output, transforms=flip)[0]
    plain_image, plain = MaskDataset(plan.output)[0]
    assert torch.equal(image.flip(-1), plain_image)
    assert torch.equal(target["masks"].flip(-1), plain["masks"])


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_images_in_tars_and_parquet(tmp_path: Path, kind: str) -> None:
    plan = make_output(str(tmp_path), kind)
    dataset = MaskDataset(plan.output)
    assert len(dataset) == 9
    first = dataset[0][0]
    for image, target in dataset:
        name = row_of(plan, target["image_id"])["image"]["file_name"]
        pixels = decode_image(image_bytes(int(Path(name).stem.rpartition("_")[2])), 10**6)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)
    (tmp_path / "in").rename(tmp_path / "moved")
    with pytest.raises(StorageError, match=r"image 0 cannot be read: .*image_root"):
        dataset[0]
    moved = MaskDataset(plan.output, image_root=(str(tmp_path / "in"), str(tmp_path / "moved")))
    assert torch.equal(moved[0][0], first)


def test_images_that_joined_later_from_a_tar(tmp_path: Path) -> None:
    plan = make_output(str(tmp_path))
    config = load_config(None, None, ["output.images_per_shard=4"])
    tars = make_input(str(tmp_path / "more"), "tar")
    plan, changes = join_images(plan, tars, config, config.identity(), append=True, redo_changed=False)
    assert changes.num_new == 10
    label_missing(plan, config)
    dataset = MaskDataset(plan.output)
    ids = [target["image_id"] for _, target in dataset]
    assert ids[:9] == IDS
    assert len(ids) == 18
    for image, target in dataset:
        row = samray.read_image(plan.output, target["image_id"])
        name = row["image"]["file_name"]
        assert ("::" in row["uri"]) == (target["image_id"] > 9)
        pixels = decode_image(image_bytes(int(Path(name).stem.rpartition("_")[2])), 10**6)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_images_that_moved_or_changed(tmp_path: Path) -> None:
    plan = make_output(str(tmp_path))
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=r"image 0 cannot be read: .*does not exist; if the images"):
        MaskDataset(plan.output)[0]
    moved = MaskDataset(plan.output, image_root=(str(tmp_path / "in"), str(tmp_path / "elsewhere") + "/"))
    assert moved[0][0].shape == (3, 16, 24)
    (tmp_path / "elsewhere" / "img_000.png").write_bytes(image_bytes(1))
    with pytest.raises(StorageError, match="is 25x16 now, but was 24x16"):
        moved[0]
    with pytest.raises(ConfigError, match="does not start with /nowhere"):
        MaskDataset(plan.output, image_root=("/nowhere", "/x"))[0]


def test_sam_boxes_become_exclusive(tmp_path: Path) -> None:
    plan = make_output(str(tmp_path), "files", "masks.bbox_convention=sam")
    table = shards.read_shard(plan.output, 0)
    x, y, w, h = table["annotations"][0].as_py()[0]["bbox"]
    assert MaskDataset(plan.output, images=False)[0][1]["boxes"][0].tolist() == [x, y, x + w + 1, y + h + 1]


def test_wrong_use_is_one_clear_sentence(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="masks='polygons' is not one of 'bool', 'rle', 'boxes'"):
        MaskDataset(plan.output, masks="polygons")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="image_root='/new' must be a pair"):
        MaskDataset(plan.output, image_root="/new")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_masks=-1 must be 0 or more"):
        MaskDataset(plan.output, max_masks=-1)
    with pytest.raises(ConfigError, match="is not the output of a samray run"):
        MaskDataset(str(tmp_path))
    with pytest.raises(ConfigError, match="no image_id 77 among its 10 images"):
        samray.read_image(plan.output, 77)


def test_a_run_that_is_not_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = make_output(str(tmp_path))
    storage.delete(shards.shard_uri(plan.output, 0))
    dataset = MaskDataset(plan.output)
    assert [target["image_id"] for _, target in dataset] == list(range(4, 10))
    assert "1 of 3 shards are not there yet" in caplog.text
    with pytest.raises(ConfigError, match=r"image 2 of .* is not labelled yet: shard-000000\.parquet is missing"):
        samray.read_image(plan.output, 2)
    for shard in (1, 2):
        storage.delete(shards.shard_uri(plan.output, shard))
    with pytest.raises(ConfigError, match="has no labelled images yet"):
        MaskDataset(plan.output)


def test_damaged_shards_are_reported(tmp_path: Path) -> None:
    plan = make_output(str(tmp_path))
    uri = shards.shard_uri(plan.output, 1)
    data = storage.read_bytes(uri)
    dataset = MaskDataset(plan.output)
    storage.put(uri, b"PAR1 torn")
    with pytest.raises(StorageError, match=r"shard-000001\.parquet is damaged"):
        MaskDataset(plan.output)
    with pytest.raises(StorageError, match=r"shard-000001\.parquet is damaged"):
        dataset[4]
    with pytest.raises(StorageError, match=r"shard-000001\.parquet is damaged"):
        samray.read_image(plan.output, 4)
    storage.put(uri, data)
    assert dataset[4][1]["image_id"] == 5
    table = shards.read_shard(plan.output, 1)
    storage.delete(uri)
    shards.commit_shard(plan.output, 1, table.slice(0, 3))
    with pytest.raises(StorageError, match="has 3 rows, expected 4"):
        MaskDataset(plan.output)
    with pytest.raises(StorageError, match=r"shard-000001\.parquet lacks image 7"):
        samray.read_image(plan.output, 7)


def test_read_image_returns_rows_as_they_lie(plan: Plan) -> None:
    for image_id in range(10):
        row = samray.read_image(plan.output, image_id)
        assert row == row_of(plan, image_id)
        assert row["status"] == ("failed" if image_id == BROKEN else "ok")


# --- many images ---------------------------------------------------------------------------------------------------


def large_output(root: Path, number: int = 2000) -> Plan:
    """One shard of many row groups: 20 masks per image, each of 300 random characters; without image files."""
    (root / "list.txt").write_text("".join(f"/photos/{i}.jpg\n" for i in range(number)))
    config = load_config(None, None, [f"output.images_per_shard={number}"])
    plan = make_plan(str(root / "list.txt"), str(root / "labels"), config, config.identity())
    rng = np.random.default_rng(0)
    letters = rng.integers(48, 112, 300 * number, dtype=np.uint8).tobytes().decode()

    def mask(image: int, index: int) -> dict[str, Any]:
        first = int(rng.integers(0, len(letters) - 300))
        return {
            "segmentation": {"size": [1024, 1024], "counts": letters[first : first + 300]},
            "bbox": [1.0, 2.0, 3.0, float(image)],
            "area": image + index,
            "predicted_iou": 0.9,
            "stability_score": 0.95,
            "point_coords": [[1.0, 1.0]],
            "crop_box": [0.0, 0.0, 1024.0, 1024.0],
        }

    records = [
        ImageRecord(
            image_id=i,
            width=1024,
            height=1024,
            file_name=f"{i}.jpg",
            uri=f"/photos/{i}.jpg",
            annotations=[] if i % 500 == 77 else [mask(i, index) for index in range(20)],
            error="empty: no bytes" if i % 500 == 77 else None,
        )
        for i in range(number)
    ]
    assert shards.commit_shard(plan.output, 0, records_to_table(records, plan.run))
    return plan


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return large_output(tmp_path_factory.mktemp("large"))


@pytest.mark.slow
def test_random_access_reads_one_group_and_holds_a_few(large: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = shards.shard_uri(large.output, 0)
    footer = lookup.read_footer(uri, storage.file_size(uri))
    assert footer.num_row_groups > 10
    reads: list[int] = []
    original = lookup.read_row_group

    def recording(uri: str, size: int, footer: Any, group: int, columns: Any = None) -> pa.Table:
        reads.append(group)
        return original(uri, size, footer, group, columns)

    monkeypatch.setattr("samray.output.lookup.read_row_group", recording)
    monkeypatch.setattr("samray.output.mask_dataset.read_row_group", recording)
    dataset = MaskDataset(large.output, images=False, masks="boxes")
    with_failed = len(reads)
    assert 0 < with_failed <= 4  # the narrow status column of the groups in which an image failed, and no other
    assert len(dataset) == 1996
    reads.clear()
    order = np.random.default_rng(0).permutation(len(dataset))[:40]
    for i in order:
        _, target = dataset[int(i)]
        assert target["boxes"][:, 3].tolist() == [target["image_id"] + 2.0] * 20
    assert len(reads) <= len(order)
    reads.clear()
    ids = [target["image_id"] for _, target in dataset]
    assert ids == [i for i in range(2000) if i % 500 != 77]
    assert len(reads) <= footer.num_row_groups  # in order, each group once
    assert samray.read_image(large.output, 1234)["image"]["image_id"] == 1234
    assert len(set(reads)) <= footer.num_row_groups


def test_read_image_touches_one_row_group(large: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = shards.shard_uri(large.output, 0)
    size = storage.file_size(uri)
    assert size is not None
    footer = lookup.read_footer(uri, size)
    taken: list[int] = []
    original = lookup.read_row_group

    def recording(uri: str, size: int, footer: Any, group: int, columns: Any = None) -> pa.Table:
        if uri.endswith("shard-000000.parquet"):
            taken.append(group)
        return original(uri, size, footer, group, columns)

    monkeypatch.setattr(lookup, "read_row_group", recording)
    for image_id in (0, 1999, 777):
        taken.clear()
        row = samray.read_image(large.output, image_id)
        assert row["image"]["image_id"] == image_id
        assert len(taken) == 1
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    largest = max(sum(g.column(i).total_compressed_size for i in range(g.num_columns)) for g in groups)
    assert largest < size / 10
    assert len({g.num_rows for g in groups[:-1]}) == 1


def test_the_index_takes_eight_bytes_an_image(large: Plan) -> None:
    dataset = MaskDataset(large.output, images=False)
    index = dataset._index
    assert index.shards.nbytes + index.rows.nbytes == 8 * len(dataset)
    assert len(pickle.dumps(dataset)) < 8 * len(dataset) + 4000


# --- workers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(plan: Plan, method: str) -> None:
    dataset = MaskDataset(plan.output)
    wanted = [(image.clone(), target["image_id"], target["masks"]) for image, target in dataset]
    loader = DataLoader(
        dataset, batch_size=4, num_workers=2, collate_fn=MaskDataset.collate, multiprocessing_context=method
    )
    batches = list(loader)
    assert [len(images) for images, _ in batches] == [4, 4, 1]
    got = [pair for images, targets in batches for pair in zip(images, targets, strict=True)]
    for (image, image_id, masks), (loaded, target) in zip(wanted, got, strict=True):
        assert target["image_id"] == image_id
        assert torch.equal(image, loaded)
        assert torch.equal(masks, target["masks"])


def test_a_pickled_dataset_is_the_same(plan: Plan) -> None:
    dataset = MaskDataset(plan.output, max_masks=2)
    dataset[0]
    again = pickle.loads(pickle.dumps(dataset))
    for (image, target), (other_image, other) in zip(dataset, again, strict=True):
        assert torch.equal(image, other_image)
        assert torch.equal(target["masks"], other["masks"])


def test_labels_are_the_names_of_the_run(tmp_path: Path) -> None:
    names = ("dog", "cat")
    marks: list[tuple[str | None, float | None]] = [("cat", 0.5), (None, None), ("dog", 0.25)]

    def masks(index: int) -> list[dict[str, Any]]:
        annotations = [mask_of(blob(index + i)) for i in range(3 * (index != 1))]
        return [{**m, "label": n, "label_score": s} for m, (n, s) in zip(annotations, marks, strict=False)]

    plan = write_output(str(tmp_path), ["a.png", "b.png"], masks=masks, categories=names)
    for kind in ("bool", "rle", "boxes"):
        dataset = pickle.loads(pickle.dumps(MaskDataset(plan.output, images=False, masks=kind)))
        assert dataset.classes == ["__background__", "dog", "cat", "object"]
        target, empty = dataset.target(0), dataset.target(1)
        assert [dataset.classes[label] for label in target["labels"]] == ["cat", "object", "dog"]
        assert target["label_score"].tolist() == pytest.approx([0.5, float("nan"), 0.25], nan_ok=True)
        assert (empty["labels"].dtype, empty["labels"].shape) == (torch.int64, (0,))
    one = MaskDataset(plan.output, images=False, max_masks=1).target(0)
    assert len(one["labels"]) == len(one["label_score"]) == 1


def test_an_output_without_names_has_one_class(plan: Plan) -> None:
    dataset = MaskDataset(plan.output)
    assert dataset.classes == ["__background__", "object"]
    assert "label_score" not in dataset.target(0)


def test_a_label_that_the_run_did_not_ask_for_is_damage(tmp_path: Path) -> None:
    mask = {**mask_of(blob(0)), "label": "wolf", "label_score": 0.5}
    plan = write_output(str(tmp_path), ["a.png"], masks=lambda _: [mask], categories=("dog",))
    with pytest.raises(StorageError, match="has the name 'wolf', which is not one of those asked for"):
        MaskDataset(plan.output).target(0)
