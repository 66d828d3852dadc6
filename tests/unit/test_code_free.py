"""Nothing that samray reads can run code: planted pickles stay bytes, in every file and in every command."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.extensions import ArrowTensorArray

import samray
from samray import storage
from samray.config import InputConfig, load_config
from samray.errors import ConfigError, ImageError, SamrayError
from samray.evaluate.regions import RegionData
from samray.inputs.listing import fetch_images, list_images
from samray.inputs.prompt_file import PromptFile
from samray.output import manifests as generations
from samray.output import shards, status
from samray.output.compact import compact
from samray.output.failures import FailureCounts
from samray.output.mask_dataset import MaskDataset
from samray.output.plan import Plan, load_plan
from samray.output.verify import verify
from samray.pipeline.dataset_stage import DatasetLabeler, images_of
from samray.pipeline.fetch import fetch_shard, source_table
from samray.report.output import write_report
from samray.storage import tables
from samray.train.data import open_data
from samray.train.examples import Frame
from samray.train.settings import TrainSettings
from tests.support import REPOSITORY, pickled
from tests.support.handmade import masks_of_image, write_output
from tests.support.labelled import make_output


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A folder that is there once a pickle was loaded."""
    return tmp_path / "unpickled"


def test_the_planted_pickles_are_live(tmp_path: Path, mark: Path) -> None:
    """Else the tests below would hold for nothing."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": pickled.pickles(1, mark)}), sink)
    pq.read_table(pa.BufferReader(sink.getvalue())).to_pylist()
    assert mark.exists()


# --- who may open Parquet ------------------------------------------------------------------------------------------

OPENERS = {
    *("ParquetFile", "ParquetDataset", "read_table", "read_pandas", "read_metadata", "read_schema", "read_parquet"),
    *("read_feather", "read_ipc_file", "open_stream", "open_file", "new_file", "read_message", "read_schema"),
    *("FeatherDataset", "scan_parquet", "read_record_batch", "dataset", "ORCFile", "deserialize_pandas"),
}
ALLOWED = {
    "samray/storage/tables.py": OPENERS,
    "jobs/benchmarks/outputs.py": {
        "dataset",
        "scan_parquet",
    },  # of an output that it made
}


def calls_that_open(path: Path) -> list[str]:
    """Calls of a name in OPENERS of pyarrow, pandas, polars or Ray, as `line: name`."""
    calls = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("pyarrow", "ray", "pandas"):
            calls += [f"{node.lineno}: {alias.name}" for alias in node.names if alias.name in OPENERS]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in OPENERS:
            calls.append(f"{node.lineno}: {node.func.attr}")
    return calls


def test_only_one_module_opens_parquet_and_arrow() -> None:
    files = [path for folder in ("samray", "jobs") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    assert len(files) > 100
    for path in files:
        allowed = ALLOWED.get(str(path.relative_to(REPOSITORY)), set())
        others = [call for call in calls_that_open(path) if call.split(": ")[1] not in allowed]
        assert not others, f"{path}: {others}; use samray.storage.tables"


def test_other_formats_that_can_hold_code_are_read_without_it() -> None:
    """torch.load takes tensors only, yaml plain values, numpy no objects; pickle stays between samray's own tasks."""
    for path in sorted((REPOSITORY / "samray").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            call, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            where = f"{path}:{node.lineno}"
            assert call != "torch.load" or keywords.get("weights_only") == "True", where
            assert call != "yaml.load" or keywords.get("Loader") == "_StrictLoader", where
            assert call not in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec", "marshal.loads"), where
            assert "allow_pickle" not in keywords, where
            assert call != "jinja2.Environment" or keywords.get("autoescape") == "True", where
            assert "pickle.load" not in call or path.name in ("tasks.py", "isolated.py"), where


# --- tables --------------------------------------------------------------------------------------------------------


def nested(array: pa.Array) -> dict[str, pa.Array]:
    one = pa.array([0, 1], pa.int32())
    inner = pa.StructArray.from_arrays([pa.ListArray.from_arrays(one, array)], ["y"])
    return {
        "itself": array,
        "struct": pa.StructArray.from_arrays([array], ["x"]),
        "list": pa.ListArray.from_arrays(one, array),
        "large_list": pa.LargeListArray.from_arrays(pa.array([0, 1], pa.int64()), array),
        "fixed_list": pa.FixedSizeListArray.from_arrays(array, 1),
        "map": pa.MapArray.from_arrays(one, pa.array(["k"]), array),
        "deep": pa.ListArray.from_arrays(one, inner),
    }


@pytest.mark.parametrize("kind", ["itself", "struct", "list", "large_list", "fixed_list", "map", "deep"])
@pytest.mark.parametrize("name_length", range(3))
def test_extension_types_are_stripped_wherever_they_are(kind: str, name_length: int, mark: Path) -> None:
    column = nested(pickled.pickles(1, mark))[kind]
    # Three places that a text may start at in base64.
    table = pa.table({"n" * (1 + name_length): column, "text": ["a"]}, metadata={"m": "x" * name_length})
    file = tables.open_parquet(pickled.parquet(table))
    assert not any(tables.is_extension(field.type) for field in file.schema_arrow)
    assert file.schema_arrow.metadata[b"m"] == b"x" * name_length
    assert file.read().to_pylist()[0]["text"] == "a"
    assert not mark.exists()


def test_the_code_of_a_type_does_not_run_when_a_schema_is_read() -> None:
    ran = []

    class Loud(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.string(), "samray.test.loud")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Loud:
            ran.append(serialized)
            return cls()

    data = pickled.parquet(pa.table({"x": Loud().wrap_array(pa.array(["a"]))}))
    pa.register_extension_type(Loud())
    try:
        pq.read_schema(pa.BufferReader(data))
        assert ran  # plain pyarrow runs it
        ran.clear()
        assert tables.open_parquet(data).read().to_pylist() == [{"x": "a"}]
        assert not ran
    finally:
        pa.unregister_extension_type("samray.test.loud")


def test_ordinary_types_are_kept() -> None:
    table = pa.table({"a": pa.array(["x"], pa.large_string()), "b": pa.array([1], pa.duration("s"))})
    assert tables.open_parquet(pickled.parquet(table)).schema_arrow.types == table.schema.types


# --- inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["image", "image.bytes", "image.path", "file_name", "uri", "other"])
def test_inputs(path: str, tmp_path: Path, mark: Path) -> None:
    rows = [{"image": {"bytes": b"x", "path": "p"}, "file_name": "n", "other": 1}]
    if path == "uri":
        rows = [{"uri": "/nowhere.png"}]
    uri = str(tmp_path / "in.parquet")
    storage.put(uri, pickled.parquet(pa.Table.from_pylist(rows)))
    pickled.plant(uri, path, mark)
    assert pickled.is_live(uri)
    with contextlib.suppress(SamrayError):
        fetch_images(list_images(uri, InputConfig()).images, InputConfig())
    assert not mark.exists()


def test_prompts(tmp_path: Path, mark: Path) -> None:
    uri = str(tmp_path / "prompts.parquet")
    for path in ("prompts", "uri"):
        storage.put(uri, pickled.parquet(pa.table({"uri": ["/a"], "prompts": [[{"point_coords": [[1.0, 2.0]]}]]})))
        pickled.plant(uri, path, mark)
        with pytest.raises(SamrayError):
            PromptFile.read(uri)
    assert not mark.exists()


# --- outputs -------------------------------------------------------------------------------------------------------


def export(format: str) -> Callable[[Plan, Path], Any]:
    return lambda plan, folder: samray.export(
        plan.output, folder / "export", format=format, partial=True, progress=False, ray=False
    )


def correct(plan: Plan, folder: Path) -> None:
    source = {"images": [{"id": 1, "width": 24, "height": 16, "file_name": "img_000.png"}], "annotations": []}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "person.json").write_text(json.dumps(source))
    options: dict[str, Any] = {"corrects": plan.output, "confident": 0.5, "progress": False}
    samray.import_(folder / "person.json", folder / "corrected", **options)


def redo(plan: Plan, folder: Path) -> None:
    for retry_failed in (False, True):
        source = source_table(dict.fromkeys(range(plan.num_shards), retry_failed))
        for i in range(source.num_rows):
            fetch_shard(source.slice(i, 1), plan=plan, config=load_config(), retry_failed=retry_failed)


def look(plan: Plan, folder: Path) -> None:
    dataset = MaskDataset(plan.output)
    for i in range(len(dataset)):
        dataset[i]


def evaluate(plan: Plan, folder: Path) -> None:
    for data in (plan.output, storage.join(plan.output, "annotations", "*.parquet")):
        list(RegionData(data, None))


def train(plan: Plan, folder: Path) -> None:
    mixture = open_data([plan.output], TrainSettings())
    for i in range(3):
        mixture.example(i, Frame(64, 16))


READERS: dict[str, Callable[[Plan, Path], Any]] = {
    "verify": lambda plan, folder: verify(plan.output, deep=True),
    "status": lambda plan, folder: status.run_status(plan.output),
    "report": lambda plan, folder: write_report(plan.output),
    "compact": lambda plan, folder: compact(plan.output, str(folder / "compact"), 10**6),
    **{f"export {name}": export(name) for name in ("sa1b", "coco", "yolo", "flat", "label-map")},
    "export saco": export("saco"),
    "import --corrects": correct,
    "--retry-failed": redo,
    "read_image": lambda plan, folder: [samray.read_image(plan.output, i) for i in range(plan.num_images)],
    "MaskDataset": look,
    "evaluate": evaluate,
    "train": train,
}

COLUMNS = (
    *("image", "image.image_id", "image.file_name", "annotations", "annotations.element.segmentation.counts"),
    *("annotations.element.bbox.element", "uri", "status", "error"),
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_output(str(tmp_path_factory.mktemp("output")))


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_shards(reader: str, plan: Plan, tmp_path: Path, mark: Path) -> None:
    """Every reader of an output says what is wrong, in a sentence, and runs nothing."""
    sound = {shard: storage.read_bytes(shards.shard_uri(plan.output, shard)) for shard in range(plan.num_shards)}
    try:
        for number, path in enumerate(COLUMNS):
            for shard, data in sound.items():
                storage.put(shards.shard_uri(plan.output, shard), data)
                pickled.plant(shards.shard_uri(plan.output, shard), path, mark)
            with contextlib.suppress(SamrayError):
                READERS[reader](plan, tmp_path / str(number))
            assert not mark.exists(), path
    finally:
        for shard, data in sound.items():
            storage.put(shards.shard_uri(plan.output, shard), data)


@pytest.mark.parametrize("reader", ["export saco", "verify", "status", "MaskDataset", "compact"])
@pytest.mark.parametrize(
    "path",
    ["annotations.element.label", "annotations.element.segmentation.counts", "phrases", "presence.element.phrase"],
)
def test_shards_with_names(reader: str, path: str, tmp_path: Path, mark: Path) -> None:
    def named(index: int) -> list[dict[str, Any]]:
        return [{**mask, "label": "cat", "label_score": 0.5} for mask in masks_of_image(index)]

    categories: Any = {
        "categories": ("cat", "dog"), "num_common": 1, "phrases": lambda index: ["dog"],
        "presence": lambda index: [{"phrase": "cat", "score": 0.5}, {"phrase": "dog", "score": 0.5}],
    }  # fmt: skip
    plan = write_output(str(tmp_path), ["0.png", "1.png"], masks=named, **categories)
    READERS[reader](plan, tmp_path / "sound")
    pickled.plant(shards.shard_uri(plan.output, 0), path, mark)
    with contextlib.suppress(SamrayError):
        READERS[reader](plan, tmp_path / "planted")
    assert not mark.exists()


@pytest.mark.parametrize("reader", READERS)
def test_manifests(reader: str, plan: Plan, tmp_path: Path, mark: Path) -> None:
    uri = generations.manifest_uri(plan.output, 0)
    sound = storage.read_bytes(uri)
    try:
        for number, path in enumerate(("image_id", "uri", "container")):
            storage.put(uri, sound)
            pickled.plant(uri, path, mark)
            with contextlib.suppress(SamrayError):
                READERS[reader](load_plan(plan.output), tmp_path / str(number))
            assert not mark.exists(), path
    finally:
        storage.put(uri, sound)


def test_failure_counts(plan: Plan, mark: Path) -> None:
    counts = FailureCounts(plan.output)
    for path in ("shard", "version", "failures"):
        counts.set(0, "v", {"missing": 1})
        counts.save()
        pickled.plant(counts.uri, path, mark)
        assert FailureCounts.load(plan.output).get(0, "v") is None
    assert not mark.exists()


# --- batches of label_dataset ---------------------------------------------------------------------------------------


class NoLabeler:
    """Takes images and gives no masks: what is tested comes before."""

    def label(self, images: list[Any], **_: Any) -> Any:
        raise AssertionError("nothing was to be labelled")


def stage() -> DatasetLabeler:
    return DatasetLabeler(load_config(), 1, lambda config, threads: NoLabeler())  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("kind", ["itself", "struct", "list", "deep"])
def test_batches(kind: str, mark: Path) -> None:
    batch = pa.table({"image": nested(pickled.pickles(1, mark))[kind]})
    with pytest.raises(ConfigError, match=r"'image' has the extension type ray\.data\.arrow_pickled_object"):
        stage()(batch)
    assert not mark.exists()


def test_batches_with_pickles_elsewhere_pass_them_on_untouched(mark: Path) -> None:
    batch = pa.table({"image": [b"x"], "image_id": pickled.pickles(1, mark), "meta": pickled.pickles(1, mark)})
    with pytest.raises(AssertionError, match="nothing was to be labelled"):
        stage()(batch)
    assert not mark.exists()


def test_a_tensor_with_a_shape_that_its_numbers_do_not_fill() -> None:
    sound = ArrowTensorArray.from_numpy(np.zeros((1, 2, 2, 3), np.uint8))
    false = type(sound.type)((200000, 2, 3), pa.uint8()).wrap_array(sound.storage)
    (image,) = images_of(pa.chunked_array([false]))
    assert isinstance(image, ImageError)
    assert image.reason == "unsupported"
