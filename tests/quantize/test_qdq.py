"""Quantizers at the products: against NNCF's with the same ranges, against OpenVINO, and what is stored."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantize import calibrate
from quantize.execute import Graph
from quantize.int8 import Int8Config, int8_products, to_int8
from quantize.layers import plan
from quantize.qdq import channel_axis, insert
from quantize.ranges import observe
from quantize.units import units
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.signature import Feeds
from rpfm_edge.measure.metrics import psnr_db
from tests.quantize.test_int8 import weights


@pytest.fixture(scope="module")
def frame(tiny_graph: Artifact) -> onnx.ModelProto:
    return onnx.load(tiny_graph.file("frame.onnx"))


@pytest.fixture(scope="module")
def feeds(samples: Path) -> list[Feeds]:
    return list(islice(calibrate.load(samples).feeds("frame"), 8))


@pytest.fixture(scope="module")
def ranges(frame: onnx.ModelProto, feeds: list[Feeds]) -> dict[str, float]:
    return {name: one.range("mean") for name, one in observe(frame, feeds, len(feeds)).items()}


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def everything(frame: onnx.ModelProto) -> set[str]:
    return {product for unit in units(frame) for product in unit.products}


def test_with_the_same_ranges_it_computes_what_nncf_does(
    frame: onnx.ModelProto, feeds: list[Feeds], ranges: dict[str, float]
) -> None:
    products = plan(frame).quantized
    ours, theirs = insert(frame, products, ranges), to_int8(frame, feeds, Int8Config())[0]
    assert {node.name for node in int8_products(ours)} == {node.name for node in int8_products(theirs)}
    for name in products:
        for place in (0, 1):
            np.testing.assert_allclose(scale_of(ours, name, place), scale_of(theirs, name, place), rtol=1e-4)
    stored_ours, stored_theirs = weights(ours), weights(theirs)
    assert stored_ours
    for name in stored_ours.keys() & stored_theirs.keys():
        off = np.abs(stored_ours[name][0].astype(int) - stored_theirs[name][0])
        assert off.max() <= 1
        assert off.mean() < 1e-3, name  # what lies between two integers


def scale_of(model: onnx.ModelProto, product: str, place: int) -> np.ndarray:
    """The scale of what goes into a product, looked for behind what only moves values."""
    makers = {output: node for node in model.graph.node for output in node.output}
    node = makers[next(node for node in model.graph.node if node.name == product).input[place]]
    while node.op_type != "DequantizeLinear":
        assert node.op_type in ("Reshape", "Transpose", "DepthToSpace")
        node = makers[node.input[0]]
    return stored(model)[node.input[1]]


def test_openvino_agrees_with_every_product_in_int8(
    frame: onnx.ModelProto, feeds: list[Feeds], ranges: dict[str, float], tmp_path: Path
) -> None:
    """Also behind a Reshape and behind the concatenation of noise and pose, where NNCF's placement fails it."""
    model = insert(frame, everything(frame), ranges)
    assert len(int8_products(model)) == len(everything(frame))
    onnx.save(model, tmp_path / "frame.onnx")
    core = openvino.Core()
    compiled = core.compile_model(tmp_path / "frame.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for sample in feeds[:2]:
        theirs = compiled(dict(sample))[0]
        assert psnr_db(Graph(model)(sample)[0], theirs[0]) > 40


def test_weights_are_within_half_a_step_and_shared_by_the_steps(
    frame: onnx.ModelProto, ranges: dict[str, float]
) -> None:
    floats, found = stored(frame), stored(insert(frame, everything(frame), ranges))
    seen = set()
    for node in frame.graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        if node.name in everything(frame) and name in floats and name not in seen:
            seen.add(name)
            values, scale = found[f"{name}.stored"], found[f"{name}.scale"]
            shape = [-1 if axis == channel_axis(node, 1, values.ndim) else 1 for axis in range(values.ndim)]
            error = values * scale.reshape(shape) - floats[name]
            assert np.abs(error / scale.reshape(shape)).max() <= 0.5 + 1e-3
            assert np.abs(values.astype(int)).max() == 64
    assert sum(array.dtype == np.int8 and array.ndim > 1 for array in found.values()) == len(seen)


def test_only_what_is_never_negative_becomes_unsigned(frame: onnx.ModelProto, ranges: dict[str, float]) -> None:
    model = insert(frame, everything(frame), ranges, "full", "unsigned")
    kinds, values = {output: node.op_type for node in frame.graph.node for output in node.output}, stored(model)
    zeros = {node.input[0]: values[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for tensor, zero in zeros.items():
        assert zero.dtype == (np.uint8 if kinds.get(tensor) in ("Relu", "Softmax") else np.int8)
        assert values[f"{tensor}.scale"] == pytest.approx(ranges[tensor] / np.iinfo(zero.dtype).max)
    assert {zero.dtype for zero in zeros.values()} == {np.dtype(np.int8), np.dtype(np.uint8)}
    assert max(np.abs(array.astype(int)).max() for array in values.values() if array.dtype == np.int8) == 127


def test_with_int32_biases_onnxruntime_computes_linear_layers_in_int8(
    frame: onnx.ModelProto, feeds: list[Feeds], ranges: dict[str, float], tmp_path: Path
) -> None:
    linear = {node.name for node in frame.graph.node if node.op_type == "Gemm" and len(node.input) > 2}
    kinds, images = {}, {}
    for biases in ("float", "int32"):
        model = insert(frame, linear, ranges, "half", "unsigned", biases)
        settings = onnxruntime.SessionOptions()
        settings.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings, ["CPUExecutionProvider"])
        images[biases] = session.run(None, dict(feeds[0]))[0][0]
        kinds[biases] = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["int32"]["QGemm"] == len(linear)
    assert kinds["float"]["QGemm"] == 0
    assert psnr_db(images["float"], images["int32"]) > 50


def linears(bias: np.ndarray, **weights: np.ndarray) -> onnx.ModelProto:
    """x (1, K) → one Gemm for each of ``weights`` (K, N), all with ``bias``; named g.WEIGHT, to the output y.WEIGHT."""
    size = next(iter(weights.values())).shape[0]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", name, "b"], [f"y.{name}"], name=f"g.{name}") for name in weights],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, size))],
        [helper.make_tensor_value_info(f"y.{name}", TensorProto.FLOAT, (1, len(bias))) for name in weights],
        [numpy_helper.from_array(array, name) for name, array in {**weights, "b": bias}.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def test_a_bias_that_int32_cannot_hold_stays_float() -> None:
    """A channel of weights near 0 makes the step of its bias tiny."""
    bias = np.array([0.5, 0.25, 0.0], np.float32)
    model = linears(bias, w=np.full((2, 3), 1e-9, np.float32))
    found = Graph(insert(model, ["g.w"], {"x": 3.0}, biases="int32"))({"x": np.ones((1, 2), np.float32)})
    np.testing.assert_allclose(found[0], bias, atol=1e-6)


def test_a_bias_that_layers_share_is_in_the_steps_of_each() -> None:
    bias = np.array([0.5, -0.25, 0.1], np.float32)
    weights = {"v": np.full((2, 3), 0.5, np.float32), "w": np.full((2, 3), 20.0, np.float32)}
    found = stored(insert(linears(bias, **weights), ["g.v", "g.w"], {"x": 3.0}, biases="int32"))
    for name, weight in weights.items():
        step = 3.0 / 127 * weight.max() / 63.5
        np.testing.assert_allclose(found[f"g.{name}.bias.scale"], step, rtol=1e-5)
        np.testing.assert_array_equal(found[f"g.{name}.bias.stored"], np.round(bias / step))
    assert "b" not in found


def test_biases_of_convolutions_stay_float(frame: onnx.ModelProto, ranges: dict[str, float]) -> None:
    before, after = (
        {node.name: node.input[2] for node in model.graph.node if node.op_type == "Conv" and len(node.input) > 2}
        for model in (frame, insert(frame, everything(frame), ranges, biases="int32"))
    )
    assert before == after != {}


def test_nothing_chosen_is_the_float_graph(frame: onnx.ModelProto, feeds: list[Feeds]) -> None:
    np.testing.assert_array_equal(Graph(insert(frame, (), {}))(feeds[0]), Graph(frame)(feeds[0]))


def test_transposed_weights_are_scaled_by_output() -> None:
    for flag, axis in ((0, 1), (1, 0)):
        node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=flag)
        assert channel_axis(node, 1, 2) == axis
    assert channel_axis(helper.make_node("MatMul", ["w", "x"], ["y"]), 0, 2) == 0


def test_unknown_products_and_missing_ranges_are_named(frame: onnx.ModelProto) -> None:
    with pytest.raises(ConfigError, match="'nothing' is no product"):
        insert(frame, ["nothing"], {})
    with pytest.raises(ConfigError, match="has no range"):
        insert(frame, everything(frame), {})
