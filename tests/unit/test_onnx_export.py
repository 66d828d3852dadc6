"""ONNX files in onnxruntime against torch: small models of every kind, with random weights."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from jobs.benchmarks.reference import build_reference, segment_anything
from jobs.benchmarks.weights import SMALL, blobs, random_sam
from samray.cli.main import main
from samray.config.model_specs import VitSpec
from samray.errors import SamrayError
from samray.sam import onnx_export
from samray.sam.fetch import file_sha256
from samray.sam.onnx_description import description
from samray.sam.onnx_export import clicks_input, encoder_input, open_session, run, write_graph
from samray.sam.onnx_graphs import Graph, graphs_of
from samray.sam.sam import Sam
from samray.sam.spec import MODELS, ModelSpec
from samray.scenes.photographs import photograph_files
from tests.support.micro import MICRO, MICRO_EDGETAM, MICRO_HQ, MICRO_SAM2, MICRO_SAM3, MICRO_VIT
from tests.support.sam2_files import random_state

SPECS = {
    "vit": MICRO_VIT, "fine features": MICRO, "sam2": MICRO_SAM2, "sam_hq": MICRO_HQ, "edgetam": MICRO_EDGETAM,
    "sam3": MICRO_SAM3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The networks are small: a second thread would mostly wait."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def written(sam: Sam, folder: Path, **options: Any) -> tuple[Graph, Graph, Any, Any]:
    """The graphs of a model, and their sessions."""
    encoder, decoder = graphs_of(sam, **options)
    write_graph(encoder, folder / "encoder.onnx")
    write_graph(decoder, folder / "decoder.onnx")
    return encoder, decoder, open_session(folder / "encoder.onnx"), open_session(folder / "decoder.onnx")


def random_model(kind: str) -> Sam:
    """A small model of this kind with random weights."""
    spec: ModelSpec = SPECS[kind]
    if kind not in ("sam_hq", "edgetam", "sam3"):
        return random_sam(spec)
    sam = Sam(spec).eval().requires_grad_(False)
    sam.load_state_dict(random_state(spec))
    return sam


@pytest.mark.parametrize(
    ("kind", "single_mask"),
    [
        ("vit", False),
        ("fine features", True),
        ("sam2", False),
        ("sam2", True),
        ("sam_hq", True),
        ("edgetam", False),
        ("sam3", True),
    ],
)
def test_prompts_give_what_the_model_gives(kind: str, single_mask: bool, tmp_path: Path) -> None:
    """The same files for other numbers of prompts and points, other shapes of images, and with a mask prompt."""
    sam, spec = random_model(kind), SPECS[kind]
    encoder, decoder, encode, decode = written(sam, tmp_path, single_mask=single_mask)
    rng = np.random.default_rng(0)
    for original_hw, num_prompts, num_points, has_mask in (((90, 60), 1, 1, 0), ((50, 77), 3, 4, 1)):
        image = blobs(3, original_hw)
        features = run(encode, encoder, encoder_input(sam, encoder, image))
        embedding = sam.encode_images(sam.preprocess([image])[0])
        xy = rng.random((num_prompts, num_points, 2)) * original_hw[::-1]
        labels = rng.integers(0, 2, (num_prompts, num_points))
        mask = rng.standard_normal((1, 1, 4 * spec.grid, 4 * spec.grid)).astype(np.float32) * 4
        points = torch.from_numpy(sam.frame.points_in(xy, original_hw)).float()
        inputs = clicks_input(sam, decoder, xy[:, 0], original_hw) | {
            "point_coords": points.numpy(),
            "point_labels": labels.astype(np.float32),
            "mask_input": mask,
            "has_mask_input": np.float32([has_mask]),
        }
        if spec.frame == "pad":  # as segment-anything's callers do without a box
            inputs["point_coords"] = np.pad(inputs["point_coords"], ((0, 0), (0, 1), (0, 0)))
            inputs["point_labels"] = np.pad(inputs["point_labels"], ((0, 0), (0, 1)), constant_values=-1)
        outputs = run(decode, decoder, features | inputs)
        # One by one: `predict` takes a mask for each prompt.
        multimask = not single_mask or (spec.frame == "pad" and num_points == 1)
        for i in range(num_prompts):
            logits, iou = sam.predict(
                embedding,
                points[i : i + 1],
                torch.from_numpy(labels[i : i + 1]),
                mask_input=torch.from_numpy(mask) if has_mask else None,
                multimask=multimask,
            )
            if spec.frame == "pad" and not single_mask:  # all four
                alone = sam.predict(
                    embedding,
                    points[i : i + 1],
                    torch.from_numpy(labels[i : i + 1]),
                    mask_input=torch.from_numpy(mask) if has_mask else None,
                    multimask=False,
                )
                logits, iou = torch.cat([alone[0], logits], dim=1), torch.cat([alone[1], iou], dim=1)
            elif spec.frame == "pad" and multimask:  # the best of the three
                best = int(iou[0].argmax())
                logits, iou = logits[:, best : best + 1], iou[:, best : best + 1]
            np.testing.assert_allclose(outputs["iou_predictions"][i], iou[0].numpy(), atol=1e-5)
            if spec.frame == "pad":
                np.testing.assert_allclose(
                    outputs["low_res_masks"][i], logits[0].numpy(), atol=1e-3 * logits.abs().max()
                )
                logits = sam.frame.masks_out(logits[0], original_hw)[None]
                assert outputs["masks"].shape[-2:] == original_hw
            expected = logits[0].numpy()
            np.testing.assert_allclose(outputs["masks"][i], expected, atol=1e-3 * np.abs(expected).max())
            inside = (outputs["masks"][i] > 0) & (expected > 0)
            assert inside.sum() >= 0.999 * ((outputs["masks"][i] > 0) | (expected > 0)).sum()


def test_the_decoder_is_segment_anythings(tmp_path: Path) -> None:
    """Names and numbers of `segment_anything.utils.onnx.SamOnnxModel`, with a click, two clicks, and a box."""
    sam = random_sam(SMALL)
    encoder, decoder, encode, decode = written(sam, tmp_path)
    segment_anything()
    module = importlib.import_module("segment_anything.utils.onnx")
    published = module.SamOnnxModel(build_reference(SMALL, sam.state_dict()), return_single_mask=False).eval()
    names = list(inspect.signature(published.forward).parameters)
    assert [port.name for port in decode.get_inputs()] == names
    assert [port.name for port in decode.get_outputs()] == ["masks", "iou_predictions", "low_res_masks"]
    image = blobs(3, (200, 256))
    features = run(encode, encoder, encoder_input(sam, encoder, image))
    side = 4 * SMALL.grid
    for points, labels in (
        ([[[100, 60], [0, 0]]], [[1, -1]]),
        ([[[100, 60], [30, 150], [0, 0]]], [[1, 0, -1]]),
        ([[[20, 30], [150, 180]]], [[2, 3]]),
    ):
        inputs = features | {
            "point_coords": np.float32(points),
            "point_labels": np.float32(labels),
            "mask_input": np.zeros((1, 1, side, side), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
            "orig_im_size": np.float32([150, 192]),
        }
        outputs = run(decode, decoder, inputs)
        with torch.no_grad():
            expected = published(*(torch.from_numpy(inputs[name]) for name in names))
        for ours, theirs in zip(outputs.values(), expected, strict=True):
            scale = float(theirs.abs().max())
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4 * scale)


@pytest.mark.parametrize("kind", ["vit", "sam2"])
@pytest.mark.parametrize("size", [(77, 55), (31, 127)])
def test_the_steps_give_samrays_masks(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    """The description's steps with Pillow and torch alone, for a click on an image of odd size."""
    sam = random_model(kind)
    *_, encode, decode = written(sam, tmp_path)
    described = description(sam, {})
    width, height = size
    picture = blobs(3, (height, width))
    click = np.float32([[[0.3 * width, 0.6 * height]]])
    labels = np.float32([[1]])
    side = described["image_size"]
    if described["frame"] == "pad":
        scale = side / max(width, height)
        new_width, new_height = (max(1, int(np.floor(length * scale + 0.5))) for length in size)
        scaled = Image.fromarray(picture).resize((new_width, new_height), Image.Resampling.BILINEAR)
        image = np.asarray(scaled, np.float32)
        points = np.concatenate([click * [new_width / width, new_height / height], np.zeros((1, 1, 2))], axis=1)
        labels = np.float32([[1, -1]])
    else:
        channels_first = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        scaled = F.interpolate(channels_first, (side, side), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(described[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        image = ((scaled - mean) / std).numpy()
        points = click * [side / width, side / height]
    features = encode.run(None, {encode.get_inputs()[0].name: image})
    inputs = dict(zip([port.name for port in encode.get_outputs()], features, strict=True)) | {
        "point_coords": points.astype(np.float32),
        "point_labels": labels,
        "mask_input": np.zeros((1, 1, 4 * sam.spec.grid, 4 * sam.spec.grid), np.float32),
        "has_mask_input": np.float32([0]),
        "orig_im_size": np.float32([height, width]),
    }
    masks, iou, *_ = decode.run(None, {port.name: inputs[port.name] for port in decode.get_inputs()})
    if described["frame"] == "pad":
        assert "take mask 0 for a box or several points; for one click, the one of masks 1 to 3" in str(described)
        best = 1 + iou[0, 1:].argmax()
    else:
        assert "Of the three masks of a prompt take the one with the highest iou_predictions" in str(described)
        masks = F.interpolate(torch.from_numpy(masks), (height, width), mode="bilinear", align_corners=False).numpy()
        best = iou[0].argmax()
    embedding = sam.encode_images(sam.preprocess([picture])[0])
    xy = torch.from_numpy(sam.frame.points_in(click.astype(float), (height, width))).float()
    logits, expected_iou = sam.predict(embedding, xy, torch.ones(1, 1))
    expected = sam.frame.masks_out(logits[0], (height, width))[expected_iou[0].argmax()].numpy()
    assert expected.std() > 0
    np.testing.assert_allclose(masks[0, best], expected, atol=1e-3 * np.abs(expected).max())


def test_the_steps_name_the_only_mask_of_a_prompt() -> None:
    described = description(random_model("vit"), {}, single_mask=True)
    assert described["steps"][-1] == "There is one mask for each prompt."


def test_of_four_masks_the_first_is_not_for_a_click() -> None:
    """As samray itself chooses; else int8's agreement would be of other masks."""
    iou = np.float32([[0.9, 0.1, 0.3, 0.2], [0.0, 0.5, 0.4, 0.3]])
    assert onnx_export._best_of_click(iou).tolist() == [2, 1]
    assert onnx_export._best_of_click(iou[:, 1:]).tolist() == [1, 0]
    assert onnx_export._best_of_click(iou[:, :1]).tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(65, 20, 3), (20, 65, 3), (65, 65, 3)])
def test_an_image_that_is_too_large_is_not_cut(shape: tuple[int, ...], tmp_path: Path) -> None:
    encode = written(random_model("vit"), tmp_path)[2]
    with pytest.raises(Exception, match="cannot be reshaped"):
        encode.run(None, {"input_image": np.zeros(shape, np.float32)})


@pytest.mark.parametrize(("kind", "num_int8"), [("sam2", 23), ("edgetam", 0), ("sam3", 12)])
def test_int8_of_square_frames(kind: str, num_int8: int, tmp_path: Path) -> None:
    """The neck has products by vectors, which have no columns to scale. EdgeTAM has only convolutions."""
    sam = random_model(kind)
    encoder, _ = graphs_of(sam)
    path, small = tmp_path / "encoder.onnx", tmp_path / "small.onnx"
    write_graph(encoder, path)
    assert onnx_export.quantize(path, small) == [small]
    weights = onnx.load(small).graph.initializer
    assert sum(tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2 for tensor in weights) == num_int8
    inputs = encoder_input(sam, encoder, blobs(1, (40, 60)))
    exact, rough = (run(open_session(file), encoder, inputs) for file in (path, small))
    for name, array in exact.items():
        assert np.corrcoef(array.ravel(), rough[name].ravel())[0, 1] > 0.98


def test_errors_of_onnxruntime_are_sentences(tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(
        SamrayError, match=r"onnxruntime .* cannot open encoder\.onnx \(.*: nothing was written; use an"
    ):
        open_session(path)
    with pytest.raises(
        SamrayError, match=r"cannot quantize encoder\.onnx .*: nothing was written; export without --int8"
    ):
        onnx_export.quantize(path, tmp_path / "small.onnx")


@pytest.fixture
def micro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The weights of a model with all of the embedded one's parts, as `micro`; one photograph and four clicks."""
    monkeypatch.setitem(MODELS, "micro", MICRO)
    monkeypatch.setattr(onnx_export, "_CLICKS_PER_SIDE", 2)
    monkeypatch.setattr(onnx_export, "photograph_files", lambda: photograph_files()[1:2])
    save_file(random_sam(MICRO).state_dict(), tmp_path / "micro.safetensors")
    return str(tmp_path / "micro.safetensors")


def test_the_command_writes_files_that_stand_alone(
    micro: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["models", "export", "micro", str(out), "--onnx", "--int8", "--checkpoint", micro]) == 0
    printed = capsys.readouterr().out
    names = ["micro.decoder.onnx", "micro.encoder.int8.onnx", "micro.encoder.onnx", "micro.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    described = json.loads((out / "micro.json").read_text())
    iou = described["int8"]["mean_iou_with_float32"]
    assert 0.5 < iou < 1
    assert f"int8 encoder: mean IoU {iou:.4f} with the float32 one's masks, 4 clicks on" in printed
    assert described["checkpoint_sha256"] == file_sha256(Path(micro))
    for part in ("encoder", "decoder", "int8"):
        path = out / described[part]["file"]
        assert described[part]["sha256"] == file_sha256(path)
        session = onnxruntime.InferenceSession(str(path))
        for ports, actual in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            assert [port["name"] for port in described[part][ports]] == [port.name for port in actual]
    assert [port.shape for port in session.get_inputs()] == [["height", "width", 3]]
    assert onnx.load(out / "micro.encoder.onnx").opset_import[0].version == onnx_export.OPSET


def test_files_that_differ_from_torch_are_not_written(
    micro: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder's weights change after it was written, before it is compared."""

    def spoilt(graph: Graph, path: Path) -> list[Path]:
        files = write_graph(graph, path)
        with torch.no_grad():
            graph.sam.mask_decoder.iou_prediction_head.layers[-1].bias.add_(0.01)  # type: ignore[operator, union-attr]
        return files

    monkeypatch.setattr(onnx_export, "write_graph", spoilt)
    assert main(["models", "export", "micro", str(tmp_path / "out"), "--onnx", "--checkpoint", micro]) == 1
    assert "onnxruntime's results differ from torch's by" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_leaves_nothing_of_an_earlier_one(
    micro: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has an int8 encoder, and weights in files of their own, which the description names."""
    out = tmp_path / "out"
    is_writable: list[bool] = []
    compare = onnx_export.compare

    def noted(*args: Any) -> tuple[float, float]:
        is_writable.append(args[-1].flags.writeable)  # torch warns otherwise
        return compare(*args)

    with monkeypatch.context() as patch:
        patch.setattr(onnx_export, "compare", noted)
        patch.setattr(onnx_export, "write_graph", lambda graph, path: write_graph(graph, path, max_bytes=0))
        onnx_export.export_onnx("micro", out, checkpoint=micro, int8=True)
    assert is_writable == [True]
    described = json.loads((out / "micro.json").read_text())
    for part in ("encoder", "decoder", "int8"):
        data = described[part]["data"]
        assert data["file"] == f"{described[part]['file']}.data"
        assert data["sha256"] == file_sha256(out / data["file"])
    (out / "notes.txt").touch()
    (out / "other.encoder.int8.onnx").touch()
    onnx_export.export_onnx("micro", out, checkpoint=micro)
    names = ["micro.decoder.onnx", "micro.encoder.onnx", "micro.json", "notes.txt", "other.encoder.int8.onnx"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert "data" not in json.loads((out / "micro.json").read_text())["encoder"]


def test_sigterm_leaves_nothing(
    micro: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(graph: Graph, path: Path) -> list[Path]:
        files = write_graph(graph, path)
        os.kill(os.getpid(), signal.SIGTERM)
        return files

    def of_before(signum: int, frame: object) -> None:
        raise AssertionError("the command does not handle SIGTERM")

    monkeypatch.setattr(onnx_export, "write_graph", terminated)
    before = signal.signal(signal.SIGTERM, of_before)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["models", "export", "micro", str(tmp_path / "out"), "--onnx", "--checkpoint", micro])
        assert signal.getsignal(signal.SIGTERM) is of_before
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_in_place_of_a_file_is_refused_before_anything_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.json").mkdir()
    assert main(["models", "export", "tiny", str(tmp_path), "--onnx"]) == 2
    assert "tiny.json is a folder, and a file of the export has this name; move it or" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").touch()
    assert main(["models", "export", "tiny", str(tmp_path / "out"), "--onnx"]) == 2
    assert re.search("DIR takes a folder, and .*out is a file; choose another DIR", capsys.readouterr().err)


def test_weights_beyond_the_limit_of_a_file_go_next_to_it(tmp_path: Path) -> None:
    encoder_spec = VitSpec(dim=128, depth=4, num_heads=2, global_blocks=(1,), patch=8)
    sam = random_sam(replace(MICRO_VIT, encoder=encoder_spec))
    encoder, decoder = graphs_of(sam)
    path = tmp_path / "encoder.onnx"
    assert write_graph(encoder, path, max_bytes=0) == [path, tmp_path / "encoder.onnx.data"]
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "encoder.onnx.data"]
    # The decoder's module has the encoder's weights, 3 MB, but its graph has not.
    assert write_graph(decoder, tmp_path / "decoder.onnx", max_bytes=2**20) == [tmp_path / "decoder.onnx"]
    inputs = encoder_input(sam, encoder, blobs(1, (40, 60)))
    embedding = run(open_session(path), encoder, inputs)["image_embeddings"]
    expected = onnx_export.run_torch(encoder, inputs)["image_embeddings"]
    np.testing.assert_allclose(embedding, expected, atol=1e-4 * np.abs(expected).max())


def test_torch_gets_a_path_next_to_which_it_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a string for one only: graphs beyond 2 GiB, as that of vit_h, could not be written."""
    taken: list[object] = []
    export = torch.onnx.export
    monkeypatch.setattr(
        torch.onnx, "export", lambda *args, **options: (taken.append(args[2]), export(*args, **options))
    )
    write_graph(graphs_of(random_sam(MICRO_VIT))[1], tmp_path / "decoder.onnx")
    assert [type(path) for path in taken] == [str]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny", "out"], "choose a format: samray models export NAME DIR --onnx"),
        (["tinny", "out", "--onnx"], "'tinny' is not one of tiny, .*did you mean"),
        (["tiny", "", "--onnx"], "DIR is empty; name a folder: samray models export tiny onnx/ --onnx"),
        (["tiny", "s3://bucket/onnx", "--onnx"], "DIR takes a local folder, got s3://bucket/onnx"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "export", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(onnx_export.ConfigError, match=r"pip install 'samray\[onnx\]'"):
        onnx_export.require_onnx()
