"""FP16: what becomes half, what stays single, and that the picture does not care."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from quantize.execute import Graph
from quantize.float16 import FLOAT32_OPS, to_float16
from rpfm_edge.core.artifact import Artifact

NAMES = ("prepare", "frame")


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_half_and_delicate_operations_single(tiny_graph: Artifact, name: str) -> None:
    half = to_float16(onnx.load(tiny_graph.file(f"{name}.onnx")))
    known, seen = types(half), set()
    for node in half.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul", "Gelu"):
            assert known[node.output[0]] == TensorProto.FLOAT16, node.name
        if node.op_type in FLOAT32_OPS:
            assert known[node.output[0]] == TensorProto.FLOAT, node.name
            seen.add(node.op_type)
    assert seen >= {"LayerNormalization", "Softmax"}
    weights = [tensor for tensor in half.graph.initializer if len(tensor.dims) > 1]
    assert {tensor.data_type for tensor in weights if tensor.data_type != TensorProto.INT64} == {TensorProto.FLOAT16}


@pytest.mark.parametrize("name", NAMES)
def test_boundary_is_kept_and_the_original_untouched(tiny_graph: Artifact, name: str) -> None:
    model = onnx.load(tiny_graph.file(f"{name}.onnx"))
    before = model.SerializeToString()
    half = to_float16(model)
    assert model.SerializeToString() == before
    assert list(half.graph.input) == list(model.graph.input)
    assert list(half.graph.output) == list(model.graph.output)


def test_keys_and_values_differ_by_the_rounding_of_half_precision(tiny_graph: Artifact) -> None:
    model = onnx.load(tiny_graph.file("prepare.onnx"))
    feeds = {"source": np.random.default_rng(0).integers(0, 256, (1, 64, 48, 3), dtype=np.uint8)}
    exact, half = Graph(model)(feeds), Graph(to_float16(model))(feeds)
    error = np.abs(half - exact).max() / np.abs(exact).max()
    assert 0 < error < 20 * 2**-11  # 2^-11 is the rounding of one number; a few layers add theirs
