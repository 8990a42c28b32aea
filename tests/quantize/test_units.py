"""Units: every product once, grouped over the steps, named by place; multiplications against a formula."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantize.layers import PRODUCTS
from quantize.units import chosen, matching, multiplications, units
from rpfm_edge.artifact import Artifact
from rpfm_edge.errors import ArtifactError, ConfigError
from tests.conftest import TINY_STEPS


@pytest.fixture(scope="module")
def frame(tiny_graph: Artifact) -> onnx.ModelProto:
    return onnx.load(tiny_graph.file("frame.onnx"))


@pytest.mark.parametrize("name", ["prepare", "frame"])
def test_every_product_is_in_one_unit(tiny_graph: Artifact, name: str) -> None:
    model = onnx.load(tiny_graph.file(f"{name}.onnx"))
    products = [node.name for node in model.graph.node if node.op_type in PRODUCTS]
    found = [product for unit in units(model) for product in unit.products]
    assert sorted(found) == sorted(products)
    assert len({unit.name for unit in units(model)}) == len(units(model))


def test_units_hold_all_steps_of_a_block_and_say_its_place(frame: onnx.ModelProto) -> None:
    found = {unit.name: unit for unit in units(frame)}
    kinds = {node.name: node for node in frame.graph.node}
    for block in range(2):  # the depth of the tiny student
        for part in ("qkv", "qk", "av", "linear0", "linear1", "linear2"):
            assert len(found[f"block{block}.{part}"].products) == TINY_STEPS
    for part in ("qk", "av"):
        assert found[f"block0.{part}"].attention
    softmax = {node.output[0] for node in frame.graph.node if node.op_type == "Softmax"}
    for name, unit in found.items():
        assert (kinds[unit.products[0]].input[0] in softmax) == name.endswith(".av")
        if not unit.attention:
            assert len({kinds[product].input[1] for product in unit.products}) == 1
    assert len(found["decoder.conv0"].products) == len(found["encoder.conv0"].products) == 1
    assert "head" not in found
    assert len(found["block1.linear3"].products) == TINY_STEPS  # the head, whose result moves the noise


def test_a_graph_whose_steps_differ_is_refused(frame: onnx.ModelProto) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(frame)
    node = next(node for node in copy.graph.node if node.op_type == "MatMul")
    node.op_type = "Mul"
    with pytest.raises(ArtifactError, match="attention products in 2 steps"):
        units(copy)


def test_patterns_choose_units_and_a_pattern_without_one_is_an_error(frame: onnx.ModelProto) -> None:
    found = units(frame)
    names = matching(found, ["block*.qk", "decoder.conv0"])
    assert names == {"block0.qk", "block1.qk", "decoder.conv0"}
    assert len(chosen(found, names)) == 2 * TINY_STEPS + 1
    with pytest.raises(ConfigError, match=r"'block9.\*' matches no layer"):
        matching(found, ["block9.*"])


def test_multiplications_are_those_of_the_formula() -> None:
    weights = {"w": np.zeros((6, 3, 5, 5), np.float32), "g": np.zeros((4, 7), np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[2] * 4, strides=[2, 2]),
        helper.make_node("Gemm", ["a", "g"], ["b"], name="gemm", transA=1),
        helper.make_node("MatMul", ["p", "q"], ["r"], name="matmul"),
    ]
    shapes = {"x": (1, 3, 8, 10), "a": (4, 9), "p": (2, 3, 5), "q": (2, 5, 6)}
    results = {"y": (1, 6, 4, 5), "b": (9, 7), "r": (2, 3, 6)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in results.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    counts = multiplications(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    assert counts == {"conv": 4 * 5 * 6 * 3 * 5 * 5, "gemm": 9 * 4 * 7, "matmul": 2 * 3 * 5 * 6}
