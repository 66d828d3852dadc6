"""The expression of --where: the same answers as DuckDB, and nothing but answers."""

from __future__ import annotations

import pickle
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samray.errors import ConfigError, StorageError
from samray.output.schema import ANNOTATION, CORRECTED_SCHEMA, SCHEMA, named
from samray.output.where import Where

SCHEMA_WITH_NAMES = named(SCHEMA)


def make_rows(num_images: int = 40) -> pa.Table:
    """Images with 0 to 5 masks, some failed, some masks without a name or a score."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(num_images):
        failed = i % 7 == 3
        width, height = (None, None) if failed else (100 * (i % 5 + 1), 70_000)
        masks = [
            {
                "id": i * 65536 + k,
                "segmentation": {"size": [1, 1], "counts": ""},
                "bbox": [float(k), float(i), *rng.integers(1, 90, 2).astype(float)],
                "area": int(rng.integers(1, 9000)),
                "predicted_iou": None if k == 4 else float(rng.random()),
                "stability_score": float(rng.random()),
                "point_coords": [[1.0, 2.0]] * (k % 2),
                "crop_box": [0.0, 0.0, 9.0, 9.0],
                "label": [None, "dog", "cat", "it's", "Dog_100%"][k],
                "label_score": None if k == 0 else 0.5,
            }
            for k in range(0 if failed else i % 6)
            if k < 5
        ]
        image = {"image_id": i, "width": width, "height": height, "file_name": f"cam{i % 3}/{i:03d}.jpg"}
        rows.append(
            {
                "image": image,
                "annotations": masks,
                "uri": f"s3://b/cam{i % 3}/{i:03d}.jpg",
                "status": "failed" if failed else "ok",
                "error": "truncated: x" if failed else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA_WITH_NAMES)


ROWS = make_rows()
MASKS_SQL = "select unnest(image), uri, status, error, len(annotations) num_masks, unnest(m) from "
MASKS_SQL += "(select *, unnest(annotations) m from rows_table)"
IMAGES_SQL = "select unnest(image), uri, status, error, len(annotations) num_masks from rows_table"


@pytest.fixture(scope="module")
def engine() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.register("rows_table", ROWS)
    return connection


OF_MASKS = [
    "area > 4000",
    "area > 0.01 * width * height / 1000",
    "width * height > 3000000000 and area >= 0",
    "predicted_iou >= 0.5 or stability_score < .2",
    "not predicted_iou >= 0.5",
    "predicted_iou is null",
    "predicted_iou is not null and label_score is null",
    "label in ('dog', 'cat')",
    "label not in ('dog', 'cat')",
    "label not in ('dog', null)",
    "label in ('dog', null)",
    "label = 'it''s'",
    "label like 'D%100\\%' or label like '%og'",
    "label like '_og' or label ilike 'd%'",
    "label not like 'd%'",
    "not label ilike 'd%'",
    "area between 100 and 3000 and not area between 200 and 300",
    "bbox[3] * bbox[4] > 2 * area / 3",
    "point_coords[1][2] = 2.0",
    "point_coords[1] is null",
    "len(point_coords) = 1",
    "area % 7 = 3 and area // 7 % 2 = 0",
    "-area // 7 = -5 or -area % 7 = -1",
    "abs(-area) > 100 and sqrt(area) < 80 and ln(area) > 2 and log10(area) < 3.7",
    "greatest(area, 100, width) > 4000 and least(bbox[3], bbox[4]) > 20",
    "coalesce(predicted_iou, 0.0) < 0.1",
    "upper(label) = 'DOG' or length(label) > 4",
    "contains(label, 'o') or ends_with(label, 't')",
    "regexp_matches(label, '^[a-d]o')",
    "area > 100 or width > 200 and label = 'dog'",
    "(area > 100 or width > 200) and label = 'dog'",
    "(label = 'dog') = (area > 3000)",
    "AREA > 4000 and Label = 'dog'",
    "num_masks > 3 and area > 1000",
    "area <> 5 and area != 6 and area > 1e3 and area < 8_000",
]
OF_IMAGES = [
    "width > 200",
    "not width > 200",
    "status = 'failed'",
    "error is not null and starts_with(error, 'trunc')",
    "uri like 's3://b/cam1/%' and num_masks >= 2",
    "image_id in (1, 2, 30)",
    "image_id % 10 = 0",
    "file_name ilike 'CAM0%'",
    "width / 300 > .5 and floor(width / 300) = 1 or ceil(height / 3) = 1",
    "1 = 1",
]


@pytest.mark.parametrize("text", OF_MASKS)
def test_masks_are_those_that_duckdb_selects(engine: duckdb.DuckDBPyConnection, text: str) -> None:
    Where(text).check(SCHEMA_WITH_NAMES)
    wanted = engine.execute(f"select id from ({MASKS_SQL}) where {text} order by id").fetchnumpy()["id"].tolist()
    masks = Where(text).apply(ROWS)["annotations"].combine_chunks().flatten()
    assert masks.field("id").to_pylist() == wanted
    assert 0 <= len(wanted) < len(ROWS["annotations"].combine_chunks().flatten()) or "area >= 0" in text


@pytest.mark.parametrize("text", ["area % (area - area)", "10 / (area - area)", "area // (area - area)", "1.5 / 0"])
def test_a_division_by_zero_is_null(text: str) -> None:
    """DuckDB has an error, infinity or null, by version and operator: a long job must not end of it."""
    num_masks = len(ROWS["annotations"].combine_chunks().flatten())
    for test, number in ((f"({text}) is null", num_masks), (f"({text}) > 0", 0)):
        selected = Where(f"area >= 0 and {test}").apply(ROWS)["annotations"].combine_chunks().flatten()
        assert len(selected) == number


@pytest.mark.parametrize("text", OF_IMAGES)
def test_images_are_those_that_duckdb_selects(engine: duckdb.DuckDBPyConnection, text: str) -> None:
    Where(text).check(SCHEMA_WITH_NAMES)
    wanted = engine.execute(f"select image_id from ({IMAGES_SQL}) where {text} order by 1").fetchnumpy()["image_id"]
    selected = Where(text).apply(ROWS)
    assert [image["image_id"] for image in selected["image"].to_pylist()] == wanted.tolist()
    # A selected image keeps all of its masks.
    by_id = {row["image"]["image_id"]: row for row in ROWS.to_pylist()}
    assert all(row == by_id[row["image"]["image_id"]] for row in selected.to_pylist())


SIMPLE = st.sampled_from(
    ["area > 3000", "predicted_iou < 0.5", "label = 'dog'", "width > 300", "label is null", "stability_score > .4"]
)
NESTED = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.builds("({} and {})".format, inner, inner),
        st.builds("{} or {}".format, inner, inner),
        st.builds("not {}".format, inner),
        st.builds("{} and not ({})".format, inner, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(text=NESTED)
def test_any_combination_is_what_duckdb_selects(text: str) -> None:
    connection = duckdb.connect()
    connection.register("rows_table", ROWS)
    wanted = connection.execute(f"select id from ({MASKS_SQL}) where {text} order by id").fetchnumpy()["id"].tolist()
    masks = Where(text).apply(ROWS)["annotations"].combine_chunks().flatten()
    assert masks.field("id").to_pylist() == wanted


def test_terms_select_masks_or_images() -> None:
    selected = Where("area > 4000 and width > 200").apply(ROWS).to_pylist()
    wanted = [row for row in ROWS.to_pylist() if (row["image"]["width"] or 0) > 200]
    assert [row["image"] for row in selected] == [row["image"] for row in wanted]
    for row, whole in zip(selected, wanted, strict=True):
        assert row["annotations"] == [mask for mask in whole["annotations"] if mask["area"] > 4000]
    assert any(not row["annotations"] for row in selected)  # an image stays without masks
    fewer = Where("area > 4000 and width > 200 and num_selected > 0").apply(ROWS).to_pylist()
    assert fewer == [row for row in selected if row["annotations"]]
    # With "or" one term has both: it is about masks, and no image is dropped.
    assert Where("area > 4000 or width > 200").apply(ROWS).num_rows == ROWS.num_rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aera > 3", "no column 'aera'; did you mean area?"),
        ("image.area > 3", "no column 'area'"),
        ("imag.width > 3", "unknown table 'imag'; did you mean image?"),
        ("segmentation is null", "segmentation cannot be used"),
        ('label = "dog"', "Text is in single quotes"),
        ("width", "is not a condition"),
        ("area > 'x'", "area > 'x' does not fit the types"),
        ("area >", "something is missing"),
        ("", "it is empty"),
        ("area > 3 limit 3", "unexpected token, at 'limit'"),
        ("area > 3; drop table x", "not allowed"),
        ("width in (select 3)", "not allowed"),
        ("(select 3) = 3", "not allowed"),
        ("exists(select 1)", "not allowed"),
        ("read_csv('/etc/passwd') is null", "not allowed"),
        ("read_text('/etc/passwd') is null", "not allowed"),
        ("getenv('HOME') = 'x'", "getenv('HOME') is not allowed"),
        ("absolute(area) > 3", "not allowed"),
        ("sum(area) over () > 3", "not allowed"),
        ("uri like 'x' escape '!'", "not allowed"),
        ("cast(area as double) > 3", "not allowed"),
        ("num_selected > area", "cannot be in one term"),
        ("bbox[0] > 3", "from 1 on"),
        ("area[1] > 3", "is not a list"),
        ("width in (height)", "expected a list"),
        ("uri like file_name", "expected text in single quotes"),
        ("(" * 4000 + "area > 3" + ")" * 4000, "too many parentheses"),
        ("area > 3 and " * 1000 + "area > 3", "more than the 10,000 allowed"),
        ("area = 99999999999999999999", "too large"),
        ("bbox[5000000000] > 3", "does not fit"),
        ("area" + " + 1" * 2000 + " > 3", "too many operations"),
    ],
)
def test_a_wrong_expression_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Where(text).check(SCHEMA_WITH_NAMES)
    assert message in str(error.value)
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


def test_columns_are_those_of_the_output() -> None:
    with pytest.raises(ConfigError, match="no names, so there is no column 'label'"):
        Where("label = 'dog'").check(SCHEMA)
    Where("corrections is not null").check(CORRECTED_SCHEMA)
    with pytest.raises(ConfigError, match="no column 'corrections'"):
        Where("corrections is not null").check(SCHEMA)


def test_a_number_too_large_is_an_error_and_wraps_around_nowhere() -> None:
    assert Where("width * height * 9 > 0").apply(ROWS).num_rows > 0
    most = 2**63 - 1
    for text in (f"width * {most} > 0", f"width + {most} > 0", f"-9 - {most} < width"):
        with pytest.raises(ConfigError, match="overflow"):
            Where(text).apply(ROWS)


def test_masks_without_a_column_that_the_run_has_are_damage() -> None:
    masks = pa.array([[]] * len(ROWS), pa.list_(ANNOTATION))
    plain = ROWS.drop_columns(["annotations"]).append_column("annotations", masks)
    with pytest.raises(StorageError, match="have no 'label'"):
        Where("label = 'dog'").apply(plain)


def test_credentials_in_an_expression_are_not_recorded() -> None:
    assert "secret" not in str(Where("uri like 'https://me:secret@host/%'").to_json())


@pytest.mark.parametrize("pattern", ["%a\\b%", "a\\b", "%\\%%", "%a\\b", "a\\b%", "a\\_ c#%", "A\\%"])
def test_a_backslash_is_a_character(engine: duckdb.DuckDBPyConnection, pattern: str) -> None:
    names = ["a\\b", "xa\\by", "ab", "x\\%y", "a\\- c#", "a\\b\nc"]
    rows = [{**row, "uri": name} for row, name in zip(ROWS.to_pylist(), names, strict=False)]
    selected = Where(f"uri like '{pattern}'").apply(pa.Table.from_pylist(rows, SCHEMA_WITH_NAMES))
    wanted = engine.execute(
        f"select name from (select unnest($1) name) where name like '{pattern}'", [names]
    ).fetchall()
    assert selected["uri"].to_pylist() == [name for (name,) in wanted]


def test_only_the_columns_named_are_read() -> None:
    columns = Where("area > 3 and width > 2 and uri like 'x%'").columns(SCHEMA)
    assert columns == ["annotations.list.element.area", "image.width", "uri"]
    assert Where("num_masks > 3").columns(SCHEMA) == ["annotations.list.element.id"]


def test_long_chains_and_copies_work() -> None:
    text = " and ".join(["area > 3"] * 600)
    where: Any = pickle.loads(pickle.dumps(Where(text)))
    assert where.apply(ROWS).num_rows == ROWS.num_rows
    text = " or ".join(["area = 3"] * 600)
    assert Where(text).apply(ROWS).num_rows == ROWS.num_rows
