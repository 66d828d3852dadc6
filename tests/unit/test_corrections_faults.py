"""Corrections that cannot be taken: images that fail and say why, and commands that are refused in one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from samray.cli.main import main
from samray.errors import ConfigError
from samray.imports import corrections
from samray.output.plan import Plan
from samray.output.shards import shard_uri
from tests.support.handmade import HEIGHT, WIDTH, annotation, blob, write_output
from tests.support.reviewed import NAMES, export, five_images, import_, masks_of, rows_of, write


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return five_images(str(tmp_path))


def test_images_whose_corrections_cannot_be_understood_fail_and_say_why(plan: Plan, tmp_path: Path) -> None:
    content = export(plan, tmp_path / "there", confident=0.9)
    by_name = {image["file_name"]: image for image in content["images"]}
    by_name["a/0.png"]["width"] = 7
    by_name["b/0.png"]["width"] = None
    content["annotations"].append({"id": 1, "image_id": by_name["a/1.png"]["id"], "segmentation": [["x"]]})
    report = import_(write(tmp_path / "x.json", content), tmp_path / "new", plan, confident=0.9)
    assert report.failures == {"truncated": 1, "unreadable": 3}
    rows = rows_of(tmp_path / "new")
    assert rows["a/0.png"]["error"] == "unreadable: the corrected image is 7x24, the labelled one 31x24"
    assert rows["a/1.png"]["error"].startswith("unreadable: annotation 4 is not valid: could not convert")
    assert rows["b/0.png"]["error"] == "unreadable: the image has the impossible height and width (24, None)"


def test_an_image_without_an_id_left_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_output(str(tmp_path), NAMES[:1], masks=masks_of)
    content = export(plan, tmp_path / "there", confident=0)
    content["annotations"].append({"id": 1, "image_id": 0, **annotation(blob(1))})
    monkeypatch.setattr(corrections, "ANNOTATIONS_PER_IMAGE", 5)
    report = import_(write(tmp_path / "x.json", content), tmp_path / "new", plan)
    assert report.failures == {"unsupported": 1}
    assert rows_of(tmp_path / "new")["a/0.png"]["error"] == "unsupported: no mask id is left: an image has at most 5"


@pytest.mark.parametrize(
    ("exported", "annotation", "said"),
    [
        ({"confident": 0}, {"confident": 0.9}, "masks that --confident 0.9 would not have exported: the one with "
         "samray_id 1 has a predicted IoU of 0.5 and a stability of 0.99; give the thresholds of the export"),
        ({"confident": 0.9}, {"confident": 0.9, "stable": 0.95}, "--confident 0.9 --stable 0.95 would not have "
         "exported: the one with samray_id 2 has"),
    ],
)  # fmt: skip
def test_bounds_that_are_not_the_exports_are_refused_before_anything_is_written(
    plan: Plan, tmp_path: Path, exported: dict[str, Any], annotation: dict[str, Any], said: str
) -> None:
    """Else masks that a person was shown would be left out or kept, and come as new ones besides."""
    source = write(tmp_path / "x.json", export(plan, tmp_path / "there", **exported))
    for keep_rest in (False, True):
        with pytest.raises(ConfigError, match=re.escape(said)):
            import_(source, tmp_path / "new", plan, keep_rest=keep_rest, **annotation)
    assert not (tmp_path / "new").exists()
    report = import_(source, tmp_path / "new", plan, **exported)
    assert "added" not in report.changes


def test_an_id_on_another_image_is_no_sign_of_other_bounds(plan: Plan, tmp_path: Path) -> None:
    """As after copy and paste from image to image, or where a tool writes 0 into every new mask."""
    content = export(plan, tmp_path / "there", confident=0.9)
    image = next(image["id"] for image in content["images"] if image["file_name"] == "c.png")
    new = {**annotation(blob(1)), "id": 1, "image_id": image, "attributes": {"samray_id": 1}}
    content["annotations"] += [new, {**new, "attributes": {"samray_id": 10**30}}, {**new, "attributes": None}]
    report = import_(write(tmp_path / "x.json", content), tmp_path / "new", plan, confident=0.9)
    assert report.changes == {"unchanged": 12, "added": 3, "left_out": 3}


def test_another_file_of_the_same_size_is_not_taken_for_the_same(plan: Plan, tmp_path: Path) -> None:
    content = export(plan, tmp_path / "there", confident=0.9)
    source = write(tmp_path / "x.json", content)
    import_(source, tmp_path / "new", plan, confident=0.9)
    before, size = rows_of(tmp_path / "new"), source.stat().st_size
    content["annotations"].append(content["annotations"].pop(0))
    first, *_, last = content["annotations"]
    first["segmentation"], last["segmentation"] = last["segmentation"], first["segmentation"]
    assert write(source, content).stat().st_size == size
    with pytest.raises(ConfigError, match=r'corrects\.sha256: "[0-9a-f]{64}" there, "[0-9a-f]{64}" now'):
        import_(source, tmp_path / "new", plan, confident=0.9)
    assert rows_of(tmp_path / "new") == before


def test_wrong_commands_are_one_sentence(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 2
        return " ".join(capsys.readouterr().err.split())

    labels, out = plan.output, tmp_path / "new"
    content = export(plan, tmp_path / "there", confident=0.9)
    source = write(tmp_path / "x.json", content)
    assert "--confident=1.5 is not allowed; it takes a number from 0 to 1" in _refused(
        plan, tmp_path / "no", confident=1.5
    )
    assert "--stable=-1 is not allowed; it takes a number from 0 to 1" in _refused(plan, tmp_path / "no", stable=-1)
    assert "--confident is an option of coco, not of yolo" in refusal(
        "export", labels, tmp_path / "no", "--format", "yolo", "--confident", "0.9"
    )
    assert "--confident needs --corrects" in refusal("import", source, out, "--confident", "0.9")
    assert "--stable needs --corrects" in refusal("import", source, out, "--stable", "0.9")
    assert "--keep-rest needs --corrects" in refusal("import", source, out, "--keep-rest")
    with_corrects = ("import", source, out, "--corrects", labels)
    assert "with --corrects, SOURCE is COCO" in refusal(*with_corrects, "--format", "sa1b")
    assert "leave out --images" in refusal(*with_corrects, "--images", tmp_path)
    assert "is not the output of a samray run" in refusal("import", source, out, "--corrects", tmp_path / "in")
    assert "DEST and the OUTPUT to correct must be different" in refusal("import", source, labels, "--corrects", labels)

    def of(**changes: Any) -> Path:
        return write(tmp_path / "bad" / "x.json", {**content, **changes})

    size = {"width": WIDTH, "height": HEIGHT}
    stranger = {"id": 1, "file_name": "0.png", **size}
    twice = [{"id": i, "file_name": "c.png", **size} for i in (1, 2)]
    arguments = (out, "--corrects", labels)
    assert "none of its 1 images is in" in refusal("import", of(images=[stranger]), *arguments)
    assert "its first is '0.png', the output's first is 'a/0.png'" in refusal(
        "import", of(images=[stranger]), *arguments
    )
    assert "has the image 'c.png' twice" in refusal("import", of(images=twice), *arguments)
    assert "the image 1 has no file_name" in refusal("import", of(images=[{"id": 1}]), *arguments)
    assert not out.exists()

    assert main([*map(str, with_corrects), "--confident", "0.9", "--no-progress"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "corrected 4 images; the others are unchanged" in said
    assert "unchanged 12 masks" in said
    assert "left out 3 masks, below --confident or --stable (--keep-rest keeps them)" in said
    assert "corrects.keep_rest: false there, true now" in refusal(*with_corrects, "--confident", "0.9", "--keep-rest")
    (out / "_samray" / "run.json").unlink()
    assert "has shards without a description" in refusal(*with_corrects, "--confident", "0.9")
    Path(shard_uri(labels, 1)).unlink()
    assert "is not finished: 1 of 3 shards are missing" in refusal("import", source, tmp_path / "o", *arguments[1:])


def _refused(plan: Plan, dest: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        export(plan, dest, **options)
    return str(caught.value)
