"""--where in the commands: what it selects is what they write, and everything else is as without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

import samray
from samray.cli.main import main
from samray.config import InputConfig
from samray.errors import ConfigError
from samray.output.compact import compact
from samray.output.plan import Plan, load_plan
from samray.output.where import Where
from samray.report.output import write_report
from samray.train.data import open_masks
from samray.train.examples import MaskExamples
from samray.train.images import ImageExamples
from samray.train.settings import DataConfig, TrainSettings
from tests.support.exported import export, ten_images
from tests.support.outputs import rows_of

WHERE = "area > 355 and image_id % 3 <> 1 and width > 0"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return ten_images(str(tmp_path))


def selected(plan: Plan, min_area: int = 355) -> list[dict[str, Any]]:
    """The rows that WHERE selects, in plain Python."""
    rows = [row for row in rows_of(plan.output) if row["status"] == "ok" and row["image"]["image_id"] % 3 != 1]
    return [{**row, "annotations": [m for m in row["annotations"] if m["area"] > min_area]} for row in rows]


def test_the_selection_is_no_trivial_one(plan: Plan) -> None:
    wanted = selected(plan)
    num_masks = sum(len(row["annotations"]) for row in wanted)
    assert 0 < num_masks < sum(len(row["annotations"]) for row in rows_of(plan.output))
    assert 0 < len(wanted) < plan.num_images - 1


def test_an_export_has_only_what_is_selected(plan: Plan, tmp_path: Path) -> None:
    report = export(plan, tmp_path / "coco", "coco", where=WHERE)
    coco = json.loads((tmp_path / "coco" / "instances.json").read_text())
    wanted = selected(plan)
    assert [image["id"] for image in coco["images"]] == [row["image"]["image_id"] for row in wanted]
    masks = [mask["id"] + 1 for row in wanted for mask in row["annotations"]]
    assert [annotation["id"] for annotation in coco["annotations"]] == masks
    ok = [row for row in rows_of(plan.output) if row["status"] == "ok"]
    of_others = sum(len(row["annotations"]) for row in ok if row["image"]["image_id"] % 3 != 1)
    assert (report.num_images, report.num_masks, report.num_failed) == (len(wanted), len(masks), 1)
    assert report.num_images_not_selected == len(ok) - len(wanted)
    assert report.num_masks_not_selected == of_others - len(masks)


def test_another_expression_needs_another_dest(plan: Plan, tmp_path: Path) -> None:
    export(plan, tmp_path / "coco", "coco", where=WHERE)
    again = export(plan, tmp_path / "coco", "coco", where=WHERE)
    assert again.num_pieces_skipped == again.num_pieces
    assert again.num_masks == sum(len(row["annotations"]) for row in selected(plan))
    for other in ("area > 356", None):
        with pytest.raises(ConfigError, match="different export"):
            export(plan, tmp_path / "coco", "coco", where=other)


def test_masks_are_not_dropped_from_what_an_annotator_corrects(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for masks that the annotator removed"):
        export(plan, tmp_path / "coco", "coco", where=WHERE, confident=0.1)
    assert not (tmp_path / "coco").exists()
    assert export(plan, tmp_path / "coco", "coco", where="width > 0", confident=0.1).num_images > 0


def test_a_wrong_expression_claims_nothing(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = tmp_path / "dest"
    for command in (
        ["export", plan.output, str(dest), "--format", "coco"],
        ["compact", plan.output, str(dest)],
        ["report", plan.output, "--out", str(dest)],
    ):
        assert main([*command, "--where", "aera > 3"]) == 2
        assert "no column 'aera'; did you mean area?" in capsys.readouterr().err
        assert not dest.exists()


def test_a_compacted_selection_is_a_sound_output(plan: Plan, tmp_path: Path) -> None:
    dest = str(tmp_path / "dest")
    report = compact(plan.output, dest, 1200, where=Where(WHERE))
    assert rows_of(dest) == selected(plan)  # also checks every mask
    assert report.num_images == len(selected(plan))
    assert report.num_files > 1
    with pytest.raises(ConfigError, match="another selection"):
        compact(plan.output, dest, 1200)
    with pytest.raises(ConfigError, match="selects none of the 10 images"):
        compact(plan.output, str(tmp_path / "none"), 1200, where=Where("width > 9999"))
    # It is exported, loaded and compacted like any other.
    assert compact(dest, str(tmp_path / "again"), 10**6).num_files == 1
    assert rows_of(str(tmp_path / "again")) == selected(plan)
    assert compact(dest, str(tmp_path / "again"), 10**6).num_files_skipped == 1
    assert export(load_plan(dest), tmp_path / "coco", "coco").num_images == len(selected(plan))


def test_a_killed_compaction_of_a_selection_goes_on(plan: Plan, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    dest = str(tmp_path / "dest")
    with pytest.raises(KeyboardInterrupt):
        compact(plan.output, dest, 1200, stop, where=Where(WHERE))
    report = compact(plan.output, dest, 1200, where=Where(WHERE))
    assert report.num_files_skipped == 1
    assert rows_of(dest) == selected(plan)


@pytest.mark.parametrize("masks", ["boxes", "rle"])
def test_a_dataset_has_only_what_is_selected(plan: Plan, masks: Any) -> None:
    where = f"{WHERE} and point_coords[1][1] >= 0 and uri like '%photo%'"
    dataset = samray.MaskDataset(plan.output, images=False, masks=masks, where=where)
    wanted = selected(plan)
    targets = [target for _, target in DataLoader(dataset, batch_size=None)]
    assert [target["image_id"] for target in targets] == [row["image"]["image_id"] for row in wanted]
    assert [target["area"].tolist() for target in targets] == [
        [m["area"] for m in row["annotations"]] for row in wanted
    ]
    best = samray.MaskDataset(plan.output, images=False, masks=masks, where="area > 355", max_masks=1, min_area=360)
    assert all(len(target["area"]) <= 1 and (target["area"] >= 360).all() for _, target in DataLoader(best, None))
    with pytest.raises(ConfigError, match="selects none of the labelled images"):
        samray.MaskDataset(plan.output, where="width > 9999")


def test_the_report_is_about_the_selection(plan: Plan, tmp_path: Path) -> None:
    page = Path(write_report(plan.output, str(tmp_path / "page.html"), where=WHERE)).read_text()
    wanted = selected(plan)
    num_masks = sum(len(row["annotations"]) for row in wanted)
    assert "area &gt; 355 and image_id % 3 &lt;&gt; 1" in page
    assert f'<b>{len(wanted)}</b><span class="what">images</span>' in page
    assert f'<b>{num_masks}</b><span class="what">masks</span>' in page
    shown = [row["image"]["file_name"] for row in wanted]
    others = {row["image"]["file_name"] for row in rows_of(plan.output)} - set(shown)
    assert all(f'"name": "{name}"' in page for name in shown)
    assert not any(f'"name": "{name}"' in page for name in others)
    with pytest.raises(ConfigError, match="selects no labelled image"):
        write_report(plan.output, where="status = 'failed'")


def test_training_uses_only_what_is_selected(plan: Plan) -> None:
    config = DataConfig(where=WHERE, validation_fraction=0, min_area=1)
    examples = MaskExamples(plan.output, config, seed=0)
    wanted = [row for row in rows_of(plan.output) if row["image"]["image_id"] % 3 != 1 and row["annotations"]]
    assert examples.num_images == len(wanted)
    whole = [examples._masks(index) for index in range(examples.num_images)]
    areas = [sorted(sum(decoded_area(rle) for rle in masks[0]) for masks in whole if masks is not None)]
    assert areas == [sorted(sum(m["area"] for m in row["annotations"]) for row in selected(plan) if row["annotations"])]
    with pytest.raises(ConfigError, match="no column 'aera'"):
        MaskExamples(plan.output, DataConfig(where="aera > 3"), seed=0)
    with pytest.raises(ConfigError, match=r"data\.where selects labelled images and masks, and scenes have none"):
        open_masks(["scenes"], TrainSettings(data=config))
    with pytest.raises(ConfigError, match=r"data\.where selects labelled images and masks, but these images"):
        ImageExamples(plan.output, InputConfig(), config, seed=0)
    # A run that was begun before this setting existed is the same run.
    assert "where" not in TrainSettings().identity()["data"]
    assert TrainSettings(data=config).identity()["data"]["where"] == WHERE


def decoded_area(rle: dict[str, Any]) -> int:
    return int(coco_mask.area(rle))
