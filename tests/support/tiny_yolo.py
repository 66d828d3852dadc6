"""A tiny random network in the layout of YOLOv8-seg's ONNX files, written by the tests with the package `onnx`.

It has one convolution per output: each anchor sees the average of its stride's pixels. Boxes are decoded in the graph,
as in the real files: centre, width and height in pixels of the input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

NUM_COEFFICIENTS = 8
STRIDES = (8, 16, 32)


def write_yolo(path: Path, seed: int = 0, size: tuple[int, int] | None = None, num_classes: int = 1) -> Path:
    """Write the network. size: height and width of its input; None for any."""
    path.write_bytes(yolo_model(seed, size, num_classes).SerializeToString())
    return path


def yolo_model(seed: int = 0, size: tuple[int, int] | None = None, num_classes: int = 1) -> Any:
    """The network as an onnx.ModelProto."""
    rng = np.random.default_rng(seed)
    nodes: list[Any] = []
    weights: list[Any] = []

    def add(operator: str, *inputs: str, name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(name: str, values: Any) -> str:
        weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def convolution(pixels: str, name: str, channels: int, stride: int, scale: float, bias: float = 0.0) -> str:
        # Wide enough that neighbouring cells differ; zero on average, so that grey gives the bias.
        kernel = rng.normal(0, scale, (channels, 3, stride, stride)) / stride
        weight = constant(f"{name}_w", (kernel - kernel.mean((1, 2, 3), keepdims=True)).astype(np.float32))
        offset = constant(f"{name}_b", np.full(channels, bias, np.float32))
        return add("Conv", pixels, weight, offset, name=name, strides=[stride, stride])

    columns = []
    for stride in STRIDES:
        prefix = f"s{stride}"
        # Cell centres, from sums of ones along rows and columns.
        zeros = add("Mul", convolution("images", f"{prefix}_0", 1, stride, 1.0), constant(f"{prefix}_z", np.float32(0)),
                    name=f"{prefix}_zero")  # fmt: skip
        ones = add("Exp", zeros, name=f"{prefix}_one")
        centres = []
        for axis, side in ((3, "x"), (2, "y")):
            index = add("CumSum", ones, constant(f"{prefix}_{side}a", np.int64(axis)), name=f"{prefix}_{side}i")
            shifted = add("Sub", index, constant(f"{prefix}_{side}h", np.float32(0.5)), name=f"{prefix}_{side}s")
            centres.append(
                add("Mul", shifted, constant(f"{prefix}_{side}f", np.float32(stride)), name=f"{prefix}_{side}")
            )
        moved = add("Add", add("Concat", *centres, name=f"{prefix}_c", axis=1),
                    convolution("images", f"{prefix}_d", 2, stride, 4.0 * stride), name=f"{prefix}_centre")  # fmt: skip
        sizes = add("Mul", add("Exp", convolution("images", f"{prefix}_e", 2, stride, 3.0, 1.0), name=f"{prefix}_x2"),
                    constant(f"{prefix}_f", np.float32(stride)), name=f"{prefix}_size")  # fmt: skip
        scores = add("Sigmoid", convolution("images", f"{prefix}_s", num_classes, stride, 6.0), name=f"{prefix}_score")
        coefficients = convolution("images", f"{prefix}_m", NUM_COEFFICIENTS, stride, 3.0)
        joined = add("Concat", moved, sizes, scores, coefficients, name=f"{prefix}_all", axis=1)
        shape = constant(f"{prefix}_shape", np.array([1, 4 + num_classes + NUM_COEFFICIENTS, -1], np.int64))
        columns.append(add("Reshape", joined, shape, name=f"{prefix}_flat"))
    add("Concat", *columns, name="output0", axis=2)
    convolution("images", "output1", NUM_COEFFICIENTS, 4, 3.0)
    sides = list(size) if size else ["height", "width"]
    outputs = [
        helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 4 + num_classes + NUM_COEFFICIENTS, None]),
        helper.make_tensor_value_info("output1", TensorProto.FLOAT, [1, NUM_COEFFICIENTS, None, None]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, *sides])
    return model_of(nodes, [images], outputs, weights)


def model_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any]) -> Any:
    """A model of these nodes, in a version of the format that onnxruntime reads."""
    graph = helper.make_graph(nodes, "yolo", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model
