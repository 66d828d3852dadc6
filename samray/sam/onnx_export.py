"""`samray models export --onnx`: a model's encoder and decoder as ONNX files, compared with torch before they appear.

Needs the packages onnx and onnxruntime (extra `onnx`), which are imported when they are used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from samray import storage
from samray.errors import ConfigError, SamrayError
from samray.sam.checkpoints import load_model
from samray.sam.onnx_description import describe, description
from samray.sam.onnx_graphs import OPSET, Graph, graphs_of
from samray.sam.sam import Sam
from samray.sam.weights_file import WeightsFile
from samray.scenes.photographs import photograph_files

TOLERANCE: Final = 1e-3
"""Largest difference from torch, relative to the largest number of an output."""
MIN_IOU: Final = 0.999
"""Smallest IoU of a click's mask with torch's."""
_MAX_FILE_BYTES = 1_900_000_000
"""Weights that are larger go to a file of their own: ONNX, as protobuf, allows 2 GiB."""
_CLICKS_PER_SIDE = 6

Array = npt.NDArray[np.float32]
Arrays = dict[str, Array]


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxReport:
    """The written files, and how their results compare with torch's."""

    files: list[Path]
    difference: float
    """Largest difference from torch, relative to the largest number of an output."""
    click_iou: float
    """Smallest IoU of a click's mask with torch's."""
    int8_iou: float | None = None
    """Mean IoU of masks by the int8 encoder with those by the float32 one; None without int8."""
    num_clicks: int = 0
    """Clicks on the photographs that `int8_iou` is a mean of."""


def require_onnx() -> None:
    """Raises: ConfigError if a package is not installed."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--onnx needs the packages onnx and onnxruntime: pip install 'samray[onnx]' ({missing[0]})")


def export_onnx(
    name: str,
    directory: str | Path,
    *,
    checkpoint: str | None = None,
    adapter: str | None = None,
    int8: bool = False,
    single_mask: bool = False,
) -> OnnxReport:
    """Write NAME.encoder.onnx, NAME.decoder.onnx and NAME.json to a local folder.

    checkpoint, adapter: as for `load_model`. int8: also write NAME.encoder.int8.onnx. single_mask: see `graphs_of`.
    Existing files of these names are replaced, each as a whole, and those of an earlier export that this one does not
    write are removed. Raises: ConfigError, StorageError; SamrayError if onnxruntime's results differ from torch's.
    """
    require_onnx()
    folder = _local_folder(str(directory), name)
    weights = WeightsFile(name, checkpoint, adapter)
    digests = {"sha256": weights.sha256, "adapter_sha256": weights.adapter_sha256}
    sam = load_model(name, checkpoint, "cpu", "float32", adapter=adapter, **digests)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # On the same disk, so that finished files only need a rename.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".samray-") as temporary:
            report = _write_all(sam, Path(temporary), name, weights, int8=int8, single_mask=single_mask)
            # The description last: it names the others.
            for path in report.files:
                path.replace(folder / path.name)
            # Of other weights or options: tools would take them for parts of this export.
            for path in _possible_files(folder, name) - {folder / path.name for path in report.files}:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error
    return OnnxReport(
        files=[folder / path.name for path in report.files],
        difference=report.difference,
        click_iou=report.click_iou,
        int8_iou=report.int8_iou,
        num_clicks=report.num_clicks,
    )


def _local_folder(directory: str, name: str) -> Path:
    """Raises: ConfigError if it cannot be a folder for the files of this name."""
    if not directory.strip():
        raise ConfigError(f"DIR is empty; name a folder: samray models export {name} onnx/ --onnx")
    if not storage.is_local(directory):
        raise ConfigError(f"DIR takes a local folder, got {storage.redact(directory)}; copy the files from there")
    folder = Path(storage.normalize(directory))
    try:
        is_file = folder.exists() and not folder.is_dir()
        taken = sorted(path for path in _possible_files(folder, name) if path.is_dir())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from error
    if is_file:
        raise ConfigError(f"DIR takes a folder, and {folder} is a file; choose another DIR")
    # Now, before anything is replaced.
    if taken:
        raise ConfigError(
            f"{taken[0]} is a folder, and a file of the export has this name; move it or choose another DIR"
        )
    return folder


def _possible_files(folder: Path, name: str) -> set[Path]:
    """Every file that an export of this name may write."""
    graphs = [f"{name}.{part}.onnx" for part in ("encoder", "decoder", "encoder.int8")]
    return {folder / file for file in (f"{name}.json", *graphs, *(f"{graph}.data" for graph in graphs))}


def _write_all(sam: Sam, folder: Path, name: str, weights: WeightsFile, *, int8: bool, single_mask: bool) -> OnnxReport:
    # Copies: torch warns about arrays that are not writable.
    photographs = [np.array(Image.open(path).convert("RGB")) for _, path in photograph_files()]
    if not photographs:
        raise SamrayError("scikit-image is installed without its photographs, on which the files are checked")
    encoder, decoder = graphs_of(sam, single_mask=single_mask)
    encoder_path, decoder_path = folder / f"{name}.encoder.onnx", folder / f"{name}.decoder.onnx"
    files = [*write_graph(encoder, encoder_path), *write_graph(decoder, decoder_path)]
    difference, click_iou = compare(sam, encoder, decoder, encoder_path, decoder_path, photographs[0])
    int8_iou, num_clicks = None, 0
    described: dict[str, Any] = {"encoder": describe(encoder, encoder_path), "decoder": describe(decoder, decoder_path)}
    if int8:
        small = folder / f"{name}.encoder.int8.onnx"
        files += quantize(encoder_path, small)
        int8_iou, num_clicks = agreement(sam, (encoder, decoder), (encoder_path, small), decoder_path, photographs)
        described["int8"] = {
            **describe(encoder, small), "mean_iou_with_float32": round(int8_iou, 4),
            "clicks": num_clicks, "photographs": len(photographs),
        }  # fmt: skip
    text = folder / f"{name}.json"
    text.write_text(
        json.dumps(description(sam, weights.identity, single_mask=single_mask) | described, indent=2) + "\n"
    )
    return OnnxReport(
        files=[*files, text], difference=difference, click_iou=click_iou, int8_iou=int8_iou, num_clicks=num_clicks
    )


# --- files -----------------------------------------------------------------------------------------------------------


def write_graph(graph: Graph, path: Path, max_bytes: int = _MAX_FILE_BYTES) -> list[Path]:
    """Write a graph; weights of more than max_bytes go to PATH.data. Returns the files."""
    ports = [*graph.inputs, *graph.outputs]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        # Of tracing: sizes become constants, as they should; `compare` shows whether the results are right.
        warnings.simplefilter("ignore")
        traced = Path(temporary) / path.name
        # Beyond 2 GiB torch writes weights next to a path, and takes only a string for one.
        torch.onnx.export(
            graph, graph.example(), str(traced), dynamo=False, opset_version=OPSET,
            input_names=[port.name for port in graph.inputs], output_names=[port.name for port in graph.outputs],
            dynamic_axes={port.name: port.dynamic_axes for port in ports if port.dynamic_axes},
        )  # fmt: skip
        # By what was written: the decoder of a large model, which holds the encoder as well, is small.
        if sum(file.stat().st_size for file in traced.parent.iterdir()) <= max_bytes:
            traced.replace(path)
            return [path]
        _save(traced, path)
    return [path, path.with_name(f"{path.name}.data")]


def _save(traced: Path, path: Path) -> None:
    """Weights in one file next to the graph; torch writes one for each tensor."""
    import onnx

    data = f"{path.name}.data"
    onnx.save_model(
        onnx.load(traced), path, save_as_external_data=True, all_tensors_to_one_file=True, location=data,
        size_threshold=1024,
    )  # fmt: skip


def quantize(path: Path, small: Path) -> list[Path]:
    """Write a graph with the weights of its matrix products as int8, one scale per column. Returns the files.

    Convolutions stay in float32. Activations are quantized as they come, so no calibration is needed. Raises:
    SamrayError if onnxruntime cannot.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    external = path.with_name(f"{path.name}.data").exists()
    with _quiet(), _explained(f"quantize {path.name}", "export without --int8, or "):
        # Seven bits: without VNNI, products of eight-bit numbers overflow on x86.
        quantize_dynamic(
            path, small, op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=True,
            weight_type=QuantType.QInt8, use_external_data_format=external,
            nodes_to_exclude=_not_by_matrices(path), extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
    data = small.with_name(f"{small.name}.data")
    return [small, data] if data.exists() else [small]


def _not_by_matrices(path: Path) -> list[str]:
    """Names of the products by a constant that is no matrix, such as a vector: it has no columns to scale."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    num_dims = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and num_dims.get(node.input[1], 2) != 2]


@contextlib.contextmanager
def _explained(what: str, advice: str = "") -> Iterator[None]:
    """An error of onnxruntime, which has no class of its own, in a sentence."""
    import onnxruntime

    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise SamrayError(
            f"onnxruntime {onnxruntime.__version__} cannot {what} ({reason}): nothing was written; {advice}use another"
            " version of onnxruntime"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the root logger's warning that a graph was not preprocessed, which changes no number."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


# --- comparison ------------------------------------------------------------------------------------------------------


def open_session(path: Path) -> Any:
    """onnxruntime's session of a file, on the CPU. Raises: SamrayError if it cannot be opened."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    # Its threads wait by spinning, at the cost of torch's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with _explained(f"open {path.name}"):
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def encoder_input(sam: Sam, graph: Graph, image: npt.NDArray[np.uint8]) -> Arrays:
    """image: (H, W, 3) RGB. Returns what the encoder takes, made as NAME.json says."""
    pixels: Array = np.asarray(sam.resize(image), dtype=np.float32)
    if not sam.frame.is_padded:
        mean, std = np.array(sam.spec.pixel_mean), np.array(sam.spec.pixel_std)
        pixels = ((pixels - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
    return {graph.inputs[0].name: np.ascontiguousarray(pixels)}


def clicks_input(sam: Sam, graph: Graph, xy: npt.NDArray[np.float64], original_hw: tuple[int, int]) -> Arrays:
    """xy: (N, 2), original frame: N prompts of one click. Returns the decoder's inputs except the encoder's outputs."""
    points = sam.frame.points_in(xy, original_hw)[:, None].astype(np.float32)
    labels = np.ones((len(xy), 1), np.float32)
    if sam.frame.is_padded:  # the graph of a square frame appends it
        points = np.concatenate([points, np.zeros_like(points)], axis=1)
        labels = np.concatenate([labels, -labels], axis=1)
    side = 4 * sam.spec.grid
    arrays = {
        "point_coords": points,
        "point_labels": labels,
        "mask_input": np.zeros((1, 1, side, side), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array(original_hw, np.float32),
    }
    return {port.name: arrays[port.name] for port in graph.inputs if port.name in arrays}


def run(session: Any, graph: Graph, arrays: Mapping[str, Array]) -> Arrays:
    """All outputs by name."""
    inputs = {port.name: arrays[port.name] for port in graph.inputs}
    names = [port.name for port in graph.outputs]
    return dict(zip(names, session.run(names, inputs), strict=True))


@torch.no_grad()
def run_torch(graph: Graph, arrays: Mapping[str, Array]) -> Arrays:
    outputs = graph(*(torch.from_numpy(arrays[port.name]) for port in graph.inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {port.name: output.numpy() for port, output in zip(graph.outputs, outputs, strict=True)}


def compare(
    sam: Sam, encoder: Graph, decoder: Graph, encoder_path: Path, decoder_path: Path, image: npt.NDArray[np.uint8]
) -> tuple[float, float]:
    """Clicks on one image, in onnxruntime and in torch, each with its own encoder.

    Returns the largest relative difference of an output and the smallest IoU of a click's masks. Raises: SamrayError
    if they are not within `TOLERANCE` and `MIN_IOU`.
    """
    original_hw = (image.shape[0], image.shape[1])
    xy = np.array([[0.5, 0.5], [0.3, 0.7]]) * original_hw[::-1]
    first, clicks = encoder_input(sam, encoder, image), clicks_input(sam, decoder, xy, original_hw)
    features, expected = run(open_session(encoder_path), encoder, first), run_torch(encoder, first)
    masks = run(open_session(decoder_path), decoder, features | clicks)
    expected_masks = run_torch(decoder, expected | clicks)
    outputs, wanted = features | masks, expected | expected_masks
    differences = [float(np.abs(outputs[key] - wanted[key]).max() / np.abs(wanted[key]).max()) for key in wanted]
    click_iou = float(_ious(masks["masks"] > 0, expected_masks["masks"] > 0).min())
    difference = max(differences)
    if not (difference <= TOLERANCE and click_iou >= MIN_IOU):
        raise SamrayError(
            f"onnxruntime's results differ from torch's by {difference:.1e} of their scale (at most {TOLERANCE:.0e} is"
            f" expected), and a click's mask has IoU {click_iou:.4f} (at least {MIN_IOU}): nothing was written; use"
            " other versions of torch or onnxruntime"
        )
    return difference, click_iou


def agreement(
    sam: Sam,
    graphs: tuple[Graph, Graph],
    encoders: tuple[Path, Path],
    decoder_path: Path,
    images: Sequence[npt.NDArray[np.uint8]],
) -> tuple[float, int]:
    """Mean IoU of the masks of a grid of clicks with two encoders, and the number of clicks.

    Of a click's masks the one that samray takes (`_best_of_click`) with the first encoder.
    """
    encoder, decoder = graphs
    sessions, decode = [open_session(path) for path in encoders], open_session(decoder_path)
    steps = (np.arange(_CLICKS_PER_SIDE) + 0.5) / _CLICKS_PER_SIDE
    ious = []
    for image in images:
        original_hw = (image.shape[0], image.shape[1])
        xy = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2) * original_hw[::-1]
        pixels, clicks = encoder_input(sam, encoder, image), clicks_input(sam, decoder, xy, original_hw)
        exact, small = (run(decode, decoder, run(session, encoder, pixels) | clicks) for session in sessions)
        best = _best_of_click(exact["iou_predictions"])
        click = np.arange(len(best))
        ious.append(_ious(exact["masks"][click, best] > 0, small["masks"][click, best] > 0))
    return float(np.concatenate(ious).mean()), sum(map(len, ious))


def _best_of_click(iou: Array) -> npt.NDArray[np.int64]:
    """iou: (N, M) as predicted. Returns (N,) which mask is the click's: of four, the first is for clearer prompts."""
    first = 1 if iou.shape[1] == 4 else 0
    best: npt.NDArray[np.int64] = first + iou[:, first:].argmax(axis=1)
    return best


def _ious(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """IoU of masks (..., H, W) with each other; 1 for two empty ones."""
    union = (a | b).sum(axis=(-2, -1))
    inside = (a & b).sum(axis=(-2, -1))
    return np.where(union == 0, 1.0, inside / np.maximum(union, 1))
