"""INT8 graphs in FP16 and INT8: which type is where, and that they show the same picture as in FP32 and INT8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from quantize import calibrate
from quantize.execute import Graph
from quantize.float16 import FLOAT32_OPS
from quantize.int8 import int8_products
from quantize.typed import SMALLEST, to_typed
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.measure.metrics import psnr_db
from tests.quantize.test_float16 import types

NAMES = ("prepare", "frame")


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_has_the_type_that_it_needs(tiny_int8: Artifact, name: str) -> None:
    model = onnx.load(tiny_int8.file(f"typed/{name}.onnx"))
    known = types(model) | {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    seen = set()
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert known[node.input[1]] == TensorProto.FLOAT16, node.name
        if node.op_type in ("DequantizeLinear", "Conv", "Gemm", "MatMul"):  # attention is the MatMuls among them
            assert known[node.output[0]] == TensorProto.FLOAT16, node.name
        if node.op_type in FLOAT32_OPS:
            assert known[node.output[0]] == TensorProto.FLOAT, node.name
        seen.add(node.op_type)
    assert seen >= {"QuantizeLinear", "MatMul", "Gemm", "Conv", "LayerNormalization", "Softmax"}


@pytest.mark.parametrize("name", NAMES)
def test_int8_weights_and_products_are_kept(tiny_int8: Artifact, name: str) -> None:
    single, typed = (onnx.load(tiny_int8.file(f"{folder}{name}.onnx")) for folder in ("", "typed/"))
    weights = [
        {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.INT8}
        for model in (single, typed)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][tensor], weights[1][tensor]) for tensor in weights[0])
    assert [node.name for node in int8_products(typed)] == [node.name for node in int8_products(single)] != []
    assert (list(typed.graph.input), list(typed.graph.output)) == (list(single.graph.input), list(single.graph.output))


def test_the_picture_is_that_of_the_int8_graph(tiny_graph: Artifact, tiny_int8: Artifact, samples: Path) -> None:
    """FP16 moves values across the edge between two levels of INT8, but less often than INT8 moves the picture."""
    feeds = next(iter(calibrate.load(samples).feeds("frame")))
    files = (tiny_graph.file("frame.onnx"), tiny_int8.file("frame.onnx"), tiny_int8.file("typed/frame.onnx"))
    exact, single, typed = (Graph(file, threads=1)(feeds)[0] for file in files)
    assert psnr_db(single, typed) > max(psnr_db(exact, single), 40)


def test_the_drift_of_both_forms_is_recorded(tiny_int8: Artifact) -> None:
    recorded = tiny_int8.lineage[-1].config
    assert abs(recorded["typed_psnr_db"] - recorded["psnr_db"]) < 3


def linear(scales: list[float], weights: np.ndarray, activation: float = 0.01) -> onnx.ModelProto:
    """x (1, K) → Q → DQ → Gemm with INT8 weights (N, K) of one scale per output → y (1, N)."""
    constants = {
        "s": np.float32(activation),
        "z": np.int8(0),
        "w": weights,
        "ws": np.array(scales, np.float32),
        "wz": np.zeros(len(scales), np.int8),
    }
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
        onnx.helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["f"], "weights", axis=0),
        onnx.helper.make_node("Gemm", ["d", "f"], ["y"], "gemm", transB=1),
    ]
    x, y = (
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, size))
        for name, size in (("x", weights.shape[1]), ("y", len(scales)))
    )
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], initializers)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def test_scales_too_small_for_fp16() -> None:
    """A channel of zeros stays one; another is off by half a step of the least scale in every weight, at most."""
    rng = np.random.default_rng(0)
    weights = rng.integers(-64, 65, (4, 16)).astype(np.int8)
    weights[1] = 0
    scales = [0.01, 1e-9, 2e-6, 1e-5]
    model = linear(scales, weights)
    before = model.SerializeToString()
    x = {"x": rng.uniform(-1, 1, (1, 16)).astype(np.float32)}
    exact, typed = Graph(model)(x)[0], Graph(to_typed(model))(x)[0]
    assert model.SerializeToString() == before
    assert typed[1] == 0
    size = np.abs(x["x"]).sum()
    half = 2.0**-10 * np.abs(weights * np.array(scales)[:, None]).sum(1)  # the rounding of FP16 itself
    assert (np.abs(typed - exact) <= size * SMALLEST / 2 + half).all()
    assert np.abs(exact[2]) > size * SMALLEST / 20  # of a size that the bound would notice
