"""`labels.by=fastsam`: settings, the ONNX file and its identity, and a sentence for each hostile or wrong file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from samray.cli.main import main
from samray.config import Config, LabelsConfig
from samray.errors import ConfigError
from samray.labels import onnx_file
from samray.labels.fastsam import build_generator, load_finder, read_inputs
from samray.labels.onnx_graph import problem_of
from samray.labels.ways import labels_identity
from samray.output.schema import categories_of
from samray.pipeline.plan_run import run_identity
from samray.pipeline.report import no_masks
from tests.support.tiny_clip import write_clip
from tests.support.tiny_yolo import NUM_COEFFICIENTS, model_of, write_yolo, yolo_model

CPU = torch.device("cpu")
SIZE = (64, 64)
NUM_ANCHORS = 64 + 16 + 4


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_yolo(tmp_path_factory.mktemp("yolo") / "tiny.onnx", size=SIZE)


def settings(onnx_path: Path | str, **changes: Any) -> Config:
    return Config(labels={"by": "fastsam", "onnx": str(onnx_path), **changes})


# --- settings and identity ------------------------------------------------------------------------------------------


def test_published_values_are_defaults_that_can_be_set() -> None:
    labels = LabelsConfig(by="fastsam", onnx="x.onnx")
    assert (labels.conf_thresh, labels.nms_thresh, labels.crops, labels.templates) == (0.4, 0.9, ("boxed",), ("{}",))
    assert labels.negatives == ("object", "things", "stuff", "texture")
    assert LabelsConfig(by="clip", phrases=["cat"]).negatives == ()
    settings_of_labels = LabelsConfig(by="fastsam", onnx="x.onnx", nms_thresh=0.8, negatives=[], crops=["plain"])
    assert (settings_of_labels.nms_thresh, settings_of_labels.negatives, settings_of_labels.crops) == (
        0.8,
        (),
        ("plain",),
    )
    with pytest.raises(ConfigError, match=r"labels\.by=fastsam needs labels\.onnx"):
        LabelsConfig(by="fastsam")
    with pytest.raises(ConfigError, match=r"labels\.onnx needs labels\.by; add labels\.by=fastsam"):
        LabelsConfig(onnx="x.onnx")


def test_the_run_is_identified_by_content(network: Path, tmp_path: Path) -> None:
    one = labels_identity(settings(network), read_inputs(settings(network)))
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(network.read_bytes())
    assert labels_identity(settings(copy), read_inputs(settings(copy))) == one
    assert categories_of(one) is None, "without phrases masks have no names"
    assert run_identity(settings(network))["model"] == {}, "no SAM is loaded"
    inputs = read_inputs(settings(copy))
    write_yolo(copy, seed=5, size=SIZE)
    assert labels_identity(settings(copy), read_inputs(settings(copy))) != one
    with pytest.raises(ConfigError, match="does not have this run's weights"):
        build_generator(CPU, settings(copy), inputs)
    clip = write_clip(tmp_path / "clip")
    named = settings(network, phrases=["cat", "dog"], checkpoint=str(clip))
    identity = labels_identity(named, read_inputs(named))
    assert categories_of(identity) == ["cat", "dog"]
    assert identity["labels"]["network_sha256"]
    assert identity["labels"]["onnx_sha256"] == one["labels"]["onnx_sha256"]


def test_a_uri_is_downloaded(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMRAY_CACHE", str(tmp_path / "cache"))
    with fsspec.open("memory://weights/fast.onnx", "wb") as file:
        file.write(network.read_bytes())
    inputs = read_inputs(settings("memory://weights/fast.onnx"))
    assert inputs.finder.checkpoint == "memory://weights/fast.onnx"
    assert inputs.finder.sha256 == read_inputs(settings(network)).finder.sha256
    with pytest.raises(ConfigError, match=r"labels\.onnx: .*missing\.onnx"):
        read_inputs(settings("memory://weights/missing.onnx"))


def test_a_relative_path_is_found_by_actors(network: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(network.parent)
    config = settings(network.name)
    inputs = read_inputs(config)
    monkeypatch.chdir(tmp_path)
    assert build_generator(CPU, config, inputs)(None).generate([np.zeros((8, 8, 3), np.uint8)]) == [[]]


def test_the_plan_says_what_makes_the_masks_and_its_licence(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    options = ["labels.by=fastsam", f"labels.onnx={network}", "--dry-run"]
    assert main(["label", str(tmp_path / "in"), str(tmp_path / "out"), *options]) == 0
    text = " ".join(capsys.readouterr().err.split())
    assert "masks fastsam, confidence > 0.4, all of them, without names" in text
    assert "AGPL-3.0" in text
    assert "tiny, its own weights" not in text
    assert not (tmp_path / "out").exists()


def test_no_masks_has_a_reason(network: Path) -> None:
    assert "lower labels.conf_thresh" in no_masks(3, settings(network))
    assert "labels.score_thresh and labels.conf_thresh" in no_masks(3, settings(network, phrases=["cat"]))


def test_without_onnxruntime_a_sentence_says_what_to_install(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package onnxruntime: pip install 'samray\[fastsam\]'"):
        read_inputs(settings(network))


# --- hostile and wrong files ----------------------------------------------------------------------------------------


def edited(edit: Callable[[Any], None]) -> bytes:
    model = yolo_model(size=SIZE)
    edit(model)
    data: bytes = model.SerializeToString()
    return data


def external(model: Any) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "output1_b")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret.bin")


def external_in_a_node(model: Any) -> None:
    value = numpy_helper.from_array(np.zeros(4, np.float32))
    value.ClearField("raw_data")
    value.external_data.add(key="location", value="secret.bin")
    model.graph.node.append(helper.make_node("Constant", [], ["spare"], value=value))


def custom(model: Any) -> None:
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def function(model: Any) -> None:
    node = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("f", "twice", ["a"], ["b"], [node], [helper.make_opsetid("", 17)]))


def branch(model: Any) -> None:
    empty = helper.make_graph([], "inner", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=empty, else_branch=empty))


def sparse(model: Any) -> None:
    model.graph.sparse_initializer.add()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: edited(external), "has its weights in other files, which are not read"),
        (lambda: edited(external_in_a_node), "has its weights in other files, which are not read"),
        (lambda: edited(custom), r"has the operator com\.example\.Conv, which is not one of the ONNX standard"),
        (lambda: edited(function), "has functions or training steps of its own"),
        (lambda: edited(branch), "has the operator If with a graph inside, a loop or a branch"),
        (lambda: edited(sparse), "has sparse tensors"),
        (lambda: yolo_model(size=SIZE).SerializeToString()[:-40], "is not an ONNX file, or was cut off"),
        (lambda: b"\xff" * 100, "is not an ONNX file, or was cut off"),
        (lambda: b"", "is not an ONNX file: it has no graph"),
        (lambda: b"PK\x03\x04 a zip with a pickle", "is a pickled PyTorch file, which can run code when it is loaded"),
        (lambda: b"\x80\x02 a bare pickle", "is a pickled PyTorch file, which can run code when it is loaded"),
    ],
    ids=["external", "external_in_node", "custom", "function", "branch", "sparse", "cut", "noise", "empty",
         "zip", "pickle"],
)  # fmt: skip
def test_hostile_files_are_refused_before_onnxruntime_sees_them(
    data: Callable[[], bytes], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "_session", lambda *args: pytest.fail("onnxruntime got it"))
    path = tmp_path / "FastSAM-x.pt"
    path.write_bytes(data())
    with pytest.raises(ConfigError, match=rf"labels\.onnx .*FastSAM-x\.pt {message}.*: yolo export model=FastSAM"):
        read_inputs(settings(path))


def test_a_plain_network_has_no_problem(network: Path) -> None:
    assert problem_of(network.read_bytes()) is None


def test_damaged_files_are_refused_without_a_crash(network: Path) -> None:
    data, rng = network.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for offset in rng.integers(0, len(data), 5):
            damaged[offset] = rng.integers(0, 256)
        problem = problem_of(bytes(damaged))  # raises nothing
        assert problem is None or "\n" not in problem


def test_a_file_beyond_the_limit_is_not_read(network: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnx_file, "MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match="bytes, expected at most 1,000, the limit of ONNX"):
        read_inputs(settings(network))
    with fsspec.open("memory://weights/large.onnx", "wb") as file:
        file.write(network.read_bytes())
    monkeypatch.setattr("samray.sam.fetch.fetch_remote", lambda uri: pytest.fail("downloaded"))
    with pytest.raises(ConfigError, match="expected at most 1,000"):
        read_inputs(settings("memory://weights/large.onnx"))
    with pytest.raises(ConfigError, match=r"is a folder; name the file in it that ends in \.onnx"):
        read_inputs(settings(tmp_path))
    with pytest.raises(ConfigError, match=r"labels\.onnx: the file .*none\.onnx does not exist"):
        read_inputs(settings(tmp_path / "none.onnx"))


def other(
    nodes: list[Any], shape: list[Any], weights: list[Any], kind: int = TensorProto.FLOAT, inputs: int = 1
) -> Any:
    images = [helper.make_tensor_value_info(name, kind, shape) for name in ("images", "more")[:inputs]]
    outputs = [helper.make_tensor_value_info(n, kind, [None] * r) for n, r in (("output0", 3), ("output1", 4))]
    return model_of(nodes, images, outputs, weights)


def constants(anchors: tuple[int, ...], prototypes: tuple[int, ...], value: float = 0.0) -> list[Any]:
    """Nodes that give these shapes, whatever the image."""
    return [
        helper.make_node("ConstantOfShape", [f"s{i}"], [f"output{i}"], value=helper.make_tensor("v", 1, [1], [value]))
        for i, _ in enumerate((anchors, prototypes))
    ]


def shapes(*wanted: tuple[int, ...]) -> list[Any]:
    return [numpy_helper.from_array(np.array(shape, np.int64), f"s{i}") for i, shape in enumerate(wanted)]


ANCHORS = (1, 5 + NUM_COEFFICIENTS, NUM_ANCHORS)
CELLS = (1, NUM_COEFFICIENTS, 16, 16)
ANY = [1, 3, "height", "width"]


@pytest.mark.parametrize(
    ("anchors", "cells", "value", "message"),
    [
        ((1, 300, 38), CELLS, 0.0, r"expected outputs of \(1, 4 \+ classes \+ M, 84\).*got \(1, 300, 38\)"),
        (ANCHORS, (1, NUM_COEFFICIENTS, 32, 32), 0.0, r"expected outputs of .* and \(1, M, 16, 16\), got"),
        ((1, 4 + NUM_COEFFICIENTS, NUM_ANCHORS), CELLS, 0.0, "expected outputs of"),
        (ANCHORS, CELLS, float("nan"), "its outputs are not finite numbers"),
        ((1, 2**18, 2**18), CELLS, 0.0, "onnxruntime: .*"),
    ],
    ids=["with_nms", "cells", "no_class", "nan", "huge"],
)
def test_other_outputs_are_refused(
    tmp_path: Path, anchors: tuple[int, ...], cells: tuple[int, ...], value: float, message: str
) -> None:
    model = other(constants(anchors, cells, value), ANY, shapes(anchors, cells))
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ConfigError, match=rf"other\.onnx (is not a YOLOv8-seg network|cannot be loaded): {message}"):
        read_inputs(settings(tmp_path / "other.onnx"))


@pytest.mark.parametrize(
    ("shape", "kind", "inputs", "message"),
    [
        (
            ANY,
            TensorProto.FLOAT16,
            1,
            r"takes tensor\(float16\) of \(1, 3, 'height', 'width'\), expected one",
        ),
        ([4, 3, 64, 64], TensorProto.FLOAT, 1, r"of \(4, 3, 64, 64\), expected one of"),
        ([1, 1, 64, 64], TensorProto.FLOAT, 1, r"of \(1, 1, 64, 64\), expected one of"),
        ([1, 3, 64], TensorProto.FLOAT, 1, r"of \(1, 3, 64\), expected one of"),
        ([1, 3, 100, 64], TensorProto.FLOAT, 1, r"takes images of \(100, 64\), expected both sides in steps of 32"),
        ([1, 3, 2**20, 2**20], TensorProto.FLOAT, 1, "expected both sides in steps of 32 up to 4096"),
        ([1, 3, "height", 64], TensorProto.FLOAT, 1, "or both of any size"),
        (ANY, TensorProto.FLOAT, 2, "takes 2 inputs, expected one of"),
    ],
)
def test_other_inputs_are_refused(tmp_path: Path, shape: list[Any], kind: int, inputs: int, message: str) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", [f"s{i}"], [f"output{i}"], value=helper.make_tensor("v", kind, [1], [0]))
        for i in range(2)
    ]
    onnx.save(other(nodes, shape, shapes(ANCHORS, CELLS), kind, inputs), tmp_path / "other.onnx")
    with pytest.raises(ConfigError, match=message):
        read_inputs(settings(tmp_path / "other.onnx"))


def test_a_gpu_needs_onnxruntime_with_cuda(network: Path) -> None:
    config = settings(network)
    with pytest.raises(ConfigError, match=r"install onnxruntime-gpu in its place, or set model\.device=cpu"):
        load_finder(config, read_inputs(config).finder, torch.device("cuda"))
