"""Prompts of a person: what is one, files of them, which images they are for, and what is said of wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from samray import storage
from samray.cli.main import main
from samray.config import Config, load_config
from samray.config.labels import WAYS
from samray.errors import ConfigError
from samray.inputs.prompt_file import PromptFile
from samray.labels.phrases import Asked, distinct
from samray.output.plan import make_plan
from samray.pipeline.dataset_stage import label_dataset
from samray.pipeline.report import LabelReport, print_report
from samray.prompts import Prompt
from tests.support.handmade import write_output
from tests.support.standin import make_image

CLICK = {"points": [[3, 4.5]], "labels": [1]}
BOX = {"box": [1, 2, 3, 4]}


def write(folder: Path | str, rows: list[Any], name: str = "prompts.jsonl") -> str:
    uri = storage.join(str(folder), name)
    storage.put(uri, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return uri


def images_of(*uris: str, names: list[str] | None = None) -> pa.Table:
    names = names or [uri.rpartition("/")[2] for uri in uris]
    return pa.table({"uri": pa.chunked_array([list(uris)]), "file_name": pa.chunked_array([names])})


# --- one prompt -----------------------------------------------------------------------------------------------------


def test_prompts_go_through_json_and_back() -> None:
    several = {"points": [[1, 2], [3, 4]], "labels": [0, 1], "box": None}
    for value in (CLICK, BOX, {**CLICK, **BOX}, several, {"text": " red  car "}):
        prompt = Prompt.parse(value)
        assert Prompt.parse(json.loads(json.dumps(prompt.to_json()))) == prompt
    assert Prompt.parse(CLICK).is_ambiguous
    assert not Prompt.parse({**CLICK, **BOX}).is_ambiguous
    assert not Prompt.parse(BOX).is_ambiguous
    assert Prompt(text=" red car ").text == "red car"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([1, 2], "'[1, 2]' is not an object with points and labels, box, or text"),
        ({"point": [[1, 2]], "labels": [1]}, "unknown key 'point'; did you mean points?; keys are points"),
        ({"points": "1,2", "labels": [1]}, "points is '1,2', not a list"),
        ({"points": [1, 2], "labels": [1]}, "the point [1] is not an [x, y] in pixels"),
        ({"points": [[10**400, 2]], "labels": [1]}, "is not an [x, y] in pixels"),
        ({"points": [[1, 2, 3]], "labels": [1]}, "the point [1, 2, 3] is no"),
        ({"points": [[1, float("nan")]], "labels": [1]}, "the point [1, nan] is no"),
        ({"points": [[1, float("-inf")]], "labels": [1]}, "the point [1, -inf] is no"),
        ({"points": [[1, True]], "labels": [1]}, "the point [1, True] is no"),
        ({"points": [[1, 2], [3, 4]], "labels": [1]}, "points and labels differ in number: 2 and 1"),
        ({"points": [[1, 2]]}, "points and labels differ in number: 1 and 0"),
        ({"points": [[1, 2]], "labels": [2]}, "the label 2 is neither 1"),
        ({"points": [[1, 2]], "labels": [True]}, "the label True is neither 1"),
        ({"points": [[1, 2]], "labels": [1.0]}, "the label 1.0 is neither 1"),
        ({"points": [[1, 2]], "labels": [0]}, "expected a point with label 1, a box or a text"),
        ({}, "expected a point with label 1, a box or a text"),
        ({"text": 5}, "text is '5', not text"),
        ({"text": " . "}, "the text is ' . '; it takes a phrase with letters or digits"),
        ({"text": "c" * 251}, "the text has 251 characters, expected at most 250"),
        ({"text": "cat", **BOX}, "the text 'cat' comes with points or a box; give it in a prompt of its own"),
        ({"box": [1, 2, 3]}, "the box [1, 2, 3] is not an [x, y, w, h]"),
        ({"box": [1, 2, -3, 3]}, "with width and height above 0"),
        ({"box": [1, 2, 0, 3]}, "with width and height above 0"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_said_with_image_and_place(tmp_path: Path, value: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Prompt.parse(value)
    assert problem in str(caught.value)
    uri = write(tmp_path, [{"file_name": "a.png", "prompts": []}, {"file_name": "b.png", "prompts": [CLICK, value]}])
    with pytest.raises(ConfigError) as raised:
        PromptFile.read(uri)
    assert str(raised.value) == f"input.prompts {uri}, line 2: image 'b.png', prompts[1]: {caught.value}"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"points": [[-0.25, 2]], "labels": [1]}, "the point [-0.25, 2] is outside the image of 30x20 pixels"),
        ({"points": [[3, 2], [3, -1]], "labels": [1, 0]}, "the point [3, -1] is outside"),
        ({"points": [[30, 2]], "labels": [1]}, "the point [30, 2] is outside"),
        ({"box": [-0.5, 2, 9, 9]}, "the box [-0.5, 2, 9, 9] extends beyond the image of 30x20 pixels"),
        ({"box": [1, -2, 9, 9]}, "the box [1, -2, 9, 9] extends beyond"),
        ({"box": [1, 2, 9, 19]}, "the box [1, 2, 9, 19] extends beyond"),
        ({"points": [[0, 19.5]], "labels": [1], "box": [0, 0, 30, 20]}, None),
    ],
)
def test_what_lies_outside_is_a_fault_of_that_image_alone(tmp_path: Path, value: Any, problem: str | None) -> None:
    uri = write(tmp_path, [{"file_name": "a.png", "prompts": [CLICK, value]}, {"file_name": "b.png", "prompts": [BOX]}])
    matched = PromptFile.read(uri).match(images_of("/in/a.png", "/in/b.png"))
    said = matched.by_index[0][1].problem_in(width=30, height=20)
    assert said is None if problem is None else said is not None and said.startswith(problem)
    assert matched.by_index[1] == [Prompt.parse(BOX)]


# --- files ----------------------------------------------------------------------------------------------------------


def test_parquet_and_json_lines_hold_the_same(storage_root: str) -> None:
    rows = [
        {
            "uri": "in/a.png",
            "file_name": None,
            "prompts": [{**CLICK, "box": None}, {**BOX, "points": [], "labels": []}, {"text": "cat"}],
        },
        {"uri": None, "file_name": "b.png", "prompts": [{**CLICK, "box": [0, 0, 2, 2]}]},
    ]
    kind = pa.struct(
        [
            ("points", pa.list_(pa.list_(pa.float64()))),
            ("labels", pa.list_(pa.int32())),
            ("box", pa.list_(pa.float64())),
            ("text", pa.string()),
        ]
    )
    schema = pa.schema(
        [("uri", pa.string()), ("file_name", pa.string()), ("prompts", pa.list_(kind)), ("by", pa.string())]
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{**row, "by": "me"} for row in rows], schema=schema), sink)
    storage.put(storage.join(storage_root, "prompts.parquet"), bytes(sink.getvalue()))
    lines = PromptFile.read(write(storage_root, rows))
    table = PromptFile.read(storage.join(storage_root, "prompts.parquet"))
    assert table.rows == lines.rows
    assert table.sha256 != lines.sha256
    images = images_of(storage.join(storage_root, "in", "b.png"), storage.join(storage_root, "in", "a.png"))
    matched = table.match(images)
    assert {index: len(prompts) for index, prompts in matched.by_index.items()} == {1: 3, 0: 1}
    assert (matched.num_prompts, matched.num_unknown) == (4, 0)


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "prompts": [CLICK]}]
    first, moved = PromptFile.read(write(tmp_path, rows)), PromptFile.read(write(tmp_path, rows, "moved.jsonl"))
    other = PromptFile.read(write(tmp_path, [{"file_name": "a.png", "prompts": [BOX]}], "other.jsonl"))
    assert first.identity == moved.identity != other.identity


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("p.jsonl", "", "has no prompts"),
        ("p.jsonl", '{"file_name": "a.png", "prompts": []}', "has no prompts"),
        ("p.csv", "a", "is neither .jsonl nor .parquet"),
        ("p.jsonl", "{", "cannot be read as jsonl"),
        ("p.parquet", "{", "cannot be read as parquet"),
        ("p.jsonl", "\n[1]", "line 2: expected an object with uri or file_name, and prompts"),
        ("p.jsonl", '{"prompts": []}', "line 1: expected uri or file_name, got neither"),
        ("p.jsonl", '{"uri": "a.png"}', "line 1: uri must be a string, and prompts a list"),
        ("p.jsonl", '{"uri": 5, "prompts": []}', "line 1: uri must be a string, and prompts a list"),
    ],
)
def test_files_that_cannot_be_read_are_one_sentence(tmp_path: Path, name: str, text: str, problem: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"^input\.prompts .*{name}.*{problem}"):
        PromptFile.read(str(tmp_path / name))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^input\.prompts /nowhere/p\.jsonl does not exist$"):
        PromptFile.read("/nowhere/p.jsonl")


def test_texts_are_spelled_as_the_categories(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "prompts": [{"text": "Red  car."}, CLICK]},
            {"file_name": "b.png", "prompts": [{"text": "dog"}, {"text": "red car"}]}]  # fmt: skip
    file = PromptFile.read(write(tmp_path, rows))
    texts = distinct(file.prompts)
    assert texts == {"red car": "Red  car.", "dog": "dog"}
    spelled = [prompt.text for prompt in file.spelled(["RED CAR", "dog"]).prompts]
    assert spelled == ["RED CAR", None, "dog", "RED CAR"]
    assert file.spelled(texts.values()).identity == file.identity
    common = Asked(["Dog", "cat"])
    assert common.only_of(file.prompts) == ["Red  car."], "each once, without those asked of every image"


# --- which image ----------------------------------------------------------------------------------------------------


def test_the_uri_wins_and_relative_ones_start_at_the_file(tmp_path: Path) -> None:
    rows = [
        {"uri": "in/a.png", "file_name": "b.png", "prompts": [CLICK]},
        {"uri": "s3://bucket/b.png", "prompts": [BOX]},
        {"file_name": "gone.png", "prompts": [BOX]},
    ]
    images = images_of(f"{tmp_path}/in/a.png", "s3://bucket/b.png")
    matched = PromptFile.read(write(tmp_path, rows)).match(images)
    assert matched.by_index == {0: [Prompt.parse(CLICK)], 1: [Prompt.parse(BOX)]}
    assert (matched.num_unknown, matched.unknown) == (1, ["gone.png"])


def test_names_of_several_images_and_rows_for_the_same_one_are_refused(tmp_path: Path) -> None:
    images = images_of("/1/a.png", "/2/a.png", "/2/b.png")
    file = PromptFile.read(write(tmp_path, [{"file_name": "a.png", "prompts": [CLICK]}]))
    with pytest.raises(ConfigError, match=r"the file_name 'a\.png' matches 2 images of INPUT; use the uri"):
        file.match(images)
    rows = [{"file_name": "b.png", "prompts": [CLICK]}, {"uri": "/2/b.png", "prompts": [BOX]}]
    with pytest.raises(ConfigError, match=r"two rows are for the image '/2/b\.png'"):
        PromptFile.read(write(tmp_path, rows)).match(images)
    rows = [{"file_name": "x/b.png", "prompts": [CLICK]}]
    with pytest.raises(
        ConfigError, match=r"none of its 1 images is in INPUT; its first is 'x/b\.png', INPUT's first has"
    ):
        PromptFile.read(write(tmp_path, rows)).match(images)


def test_no_message_holds_the_credentials_of_a_uri(tmp_path: Path) -> None:
    signed = "https://me:secret@host/{}.png?X-Amz-Signature=secret"
    shown = "https://***@host/{}.png?X-Amz-Signature=***"
    a, b, gone = (signed.format(name) for name in ("a", "b", "gone"))
    images = images_of(a, b, names=["x.png?sig=secret", "x.png?sig=secret"])

    def said(*rows: dict[str, Any]) -> str:
        with pytest.raises(ConfigError) as caught:
            PromptFile.read(write(tmp_path, list(rows))).match(images)
        assert "secret" not in str(caught.value)
        return str(caught.value)

    assert "the file_name 'x.png?sig=***' matches 2" in said({"file_name": "x.png?sig=secret", "prompts": [CLICK]})
    assert f"image '{shown.format('a')}', prompts[0]" in said({"uri": a, "prompts": [{}]})
    assert f"two rows are for the image '{shown.format('a')}'" in said(*[{"uri": a, "prompts": [CLICK]}] * 2)
    none = said({"uri": gone, "prompts": [CLICK]})
    assert f"its first is '{shown.format('gone')}', INPUT's first has the file_name 'x.png?sig=***'" in none
    rows = [{"uri": uri, "prompts": [CLICK]} for uri in (a, gone)]
    assert PromptFile.read(write(tmp_path, rows)).match(images).unknown == [shown.format("gone")]


def test_prompts_come_to_the_places_of_their_shards(tmp_path: Path) -> None:
    plan = write_output(str(tmp_path), [f"{i}.png" for i in range(8)], images_per_shard=3)
    rows = [{"file_name": f"{i}.png", "prompts": [CLICK] * (i + 1)} for i in (7, 2, 3)]
    matched = PromptFile.read(write(tmp_path, rows)).match(plan.read_images(["uri", "file_name"]))
    by_shard = matched.by_shard(plan, [0, 2])
    assert {
        shard: {index: len(prompts) for index, prompts in of_shard.items()} for shard, of_shard in by_shard.items()
    } == {
        0: {2: 3},
        2: {1: 8},
    }


def test_a_plan_is_not_written_for_prompts_that_cannot_be_matched(tmp_path: Path) -> None:
    """It would tie OUTPUT to the file as it is, which has to be repaired."""
    storage.put(f"{tmp_path}/in/a.png", make_image(0))
    file = PromptFile.read(write(tmp_path, [{"file_name": "b.png", "prompts": [CLICK]}]))
    config = load_config()
    with pytest.raises(ConfigError, match="none of its 1 images"):
        make_plan(f"{tmp_path}/in", f"{tmp_path}/out", config, config.identity() | file.identity, check=file.match)
    assert not (tmp_path / "out").exists()


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_dry_run_says_what_prompts_are_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png"):
        storage.put(f"{tmp_path}/in/{name}", make_image(0))
    rows = [{"file_name": name, "prompts": [CLICK, BOX]} for name in ("a.png", "x.png", "y.png")]
    arguments = ["label", f"{tmp_path}/in", f"{tmp_path}/out", f"input.prompts={write(tmp_path, rows)}", "--dry-run"]
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "prompts 2, on 1 image" in said
    assert "not found 2 images with prompts that INPUT does not have: x.png, y.png" in said
    assert "masks one for each prompt of" in said
    assert not (tmp_path / "out").exists()


def test_the_summary_says_what_was_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(LabelReport("out", 5, 1, num_images_not_found=2))
    assert "not found images with prompts that INPUT does not have: 2" in " ".join(capsys.readouterr().err.split())
    print_report(LabelReport("out", 5, 1))
    assert "not found" not in capsys.readouterr().err


def test_a_path_is_no_part_of_the_settings_identity() -> None:
    assert load_config(overrides=["input.prompts=a.jsonl"]).identity() == load_config().identity()
    assert "prompts" not in load_config().identity()["input"]  # outputs of before know no such setting


def test_a_data_set_takes_no_prompts() -> None:
    with pytest.raises(ConfigError, match=r"input\.prompts is for samray\.label"):
        label_dataset(None, load_config(overrides=["input.prompts=a.jsonl"]))  # type: ignore[arg-type]
    ways = r"labels\.by=grounding_dino, sam3, fastsam, clip or sam_text"
    with pytest.raises(ConfigError, match=rf"need {ways}; got neither"):
        label_dataset(None, load_config(), phrases_column="tags")  # type: ignore[arg-type]


@pytest.mark.parametrize("by", [name for name, way in WAYS.items() if not way.takes_image_phrases])
def test_other_ways_refuse_texts(by: str) -> None:
    labels = {"by": by, **dict.fromkeys(WAYS[by].needs, "x")}
    which = r"labels\.by=grounding_dino, sam3, fastsam, clip or sam_text"
    with pytest.raises(ConfigError, match=rf"labels\.by={by} takes no prompts.*nor texts.* need {which}"):
        Config(labels=labels, input={"prompts": "texts.jsonl"})
    with pytest.raises(ConfigError, match=rf"^phrases of single images.* need {which}; got labels\.by={by}$"):
        label_dataset(None, Config(labels=labels), phrases_column="tags")  # type: ignore[arg-type]


def test_json_that_is_nested_too_deeply_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text('{"uri": "a", "prompts": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    with pytest.raises(ConfigError, match="nested too deeply"):
        PromptFile.read(str(tmp_path / "deep.jsonl"))
