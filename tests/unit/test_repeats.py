"""input.skip_duplicates: one of several equal files is labelled, each of the others is a row that names it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from samray import storage
from samray.config import Config, InputConfig, load_config
from samray.errors import ConfigError
from samray.inputs import repeats
from samray.inputs.listing import list_images
from samray.inputs.repeats import mark_duplicates
from samray.output.append import join_images
from samray.output.plan import Plan, load_plan, make_plan
from tests.support.labelled import label_missing
from tests.support.outputs import rows_of
from tests.support.standin import make_image

ONE, TWO = make_image(1, (40, 40)), make_image(2, (40, 40))


def put(folder: Path, **files: bytes) -> str:
    for name, data in files.items():
        storage.put(storage.join(str(folder), f"{name}.png"), data)
    return str(folder)


def marked(folder: str) -> dict[str, str]:
    """File name -> the image that it repeats."""
    images = mark_duplicates(list_images(folder, InputConfig()).images, InputConfig())
    return {
        row["file_name"].removesuffix(".png"): row["problem"].rpartition("/")[2].partition(".png")[0]
        for row in images.to_pylist()
        if row["problem"]
    }


def test_the_first_of_equal_files_stays(tmp_path: Path) -> None:
    same_size = ONE[:-1] + bytes([ONE[-1] ^ 1])
    folder = put(tmp_path / "in", a=TWO, b=ONE, c=same_size, d=ONE, e=TWO, f=ONE, g=TWO + b"x")
    assert marked(folder) == {"d": "b", "e": "a", "f": "b"}


def test_large_files_are_read_whole_only_if_their_ends_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = bytes(repeats._END_BYTES)
    files = {"a": b"1" * 5000 + end, "b": b"2" * 5000 + end, "c": b"1" * 5000 + end, "d": b"1" * 5001 + end[:-1] + b"!"}
    folder = put(tmp_path / "in", **files)
    whole: list[str] = []
    fetch = repeats.fetch_images

    def counted(rows: pa.Table, config: InputConfig) -> Any:
        whole.extend(rows["file_name"].to_pylist())
        return fetch(rows, config)

    monkeypatch.setattr(repeats, "fetch_images", counted)
    assert marked(folder) == {"c": "a"}
    assert whole == ["a.png", "b.png", "c.png"]  # not d: its end is another


def test_images_in_tars_are_compared_with_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, data in (("p.png", ONE), ("q.png", TWO), ("r.png", ONE)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    images = mark_duplicates(list_images(str(tmp_path / "x.tar"), InputConfig()).images, InputConfig())
    problems = dict(zip(images["file_name"].to_pylist(), images["problem"].to_pylist(), strict=True))
    assert [name for name, problem in problems.items() if problem] == ["r.png"]
    assert "duplicate: the same bytes as tar://p.png::" in problems["r.png"]


def test_an_image_that_cannot_be_read_repeats_nothing(tmp_path: Path) -> None:
    folder = put(tmp_path / "in", a=ONE, b=ONE, c=ONE)
    images = list_images(folder, InputConfig()).images
    (tmp_path / "in" / "a.png").unlink()
    problems = mark_duplicates(images, InputConfig())["problem"].to_pylist()
    assert problems[0] is None
    assert problems[1] is None
    assert problems[2].endswith("b.png (input.skip_duplicates)")


@pytest.fixture
def config() -> Config:
    return load_config(None, None, ["output.images_per_shard=2", "input.skip_duplicates=true"])


def labelled(tmp_path: Path, config: Config) -> Plan:
    folder = put(tmp_path / "in", b=ONE, c=TWO, d=ONE)
    plan = make_plan(folder, str(tmp_path / "out"), config, config.identity())
    label_missing(plan, config)
    return plan


def errors(plan: Plan) -> dict[str, str | None]:
    return {row["image"]["file_name"]: row["error"] for row in rows_of(plan.output)}


def test_a_run_labels_one_and_records_the_others(tmp_path: Path, config: Config) -> None:
    plan = labelled(tmp_path, config)
    problems = errors(plan)
    assert problems["b.png"] is None
    assert problems["c.png"] is None
    assert problems["d.png"] == f"duplicate: the same bytes as {tmp_path}/in/b.png (input.skip_duplicates)"


def test_appended_images_are_compared_with_those_of_the_output(tmp_path: Path, config: Config) -> None:
    labelled(tmp_path, config)
    folder = put(tmp_path / "in", a=ONE, e=TWO, f=make_image(3, (40, 40)))
    plan, changes = join_images(
        load_plan(str(tmp_path / "out")), folder, config, config.identity(), append=True, redo_changed=True
    )
    # The name of a.png comes before b.png, but the output has b.png already.
    assert (changes.num_new, changes.num_changed) == (3, 0)
    label_missing(plan, config)
    problems = errors(plan)
    assert {name for name, error in problems.items() if error} == {"a.png", "d.png", "e.png"}
    assert "/in/b.png" in (problems["a.png"] or "")
    _, changes = join_images(plan, folder, config, config.identity(), append=True, redo_changed=True)
    assert (changes.num_new, changes.num_changed) == (0, 0)


def test_what_repeats_an_image_that_has_changed_is_labelled(tmp_path: Path, config: Config) -> None:
    labelled(tmp_path, config)
    folder = put(tmp_path / "in", b=make_image(4, (50, 40)))
    plan, changes = join_images(
        load_plan(str(tmp_path / "out")), folder, config, config.identity(), append=False, redo_changed=True
    )
    assert (changes.num_new, changes.num_changed) == (0, 2)
    assert plan.read_images(["problem"])["problem"].null_count == plan.num_images


def test_prompts_of_equal_images_may_differ() -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        load_config(None, None, ["input.skip_duplicates=true", "input.prompts=x.jsonl"])
    # An output that was begun before this setting existed is resumed.
    assert load_config(None, None, []).default_identity()["input"]["skip_duplicates"] is False
