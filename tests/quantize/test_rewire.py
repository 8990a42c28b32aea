"""The walk over the products: what is made once, what once for each product, and what is left of the graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantize.rewire import Made, along, rewire


def three_layers() -> onnx.ModelProto:
    """z = ((x·w + b)·w)·w + b: the Gemms "first", "second" and "third", the second without a bias."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], "first"),
        helper.make_node("Gemm", ["h", "w"], ["y"], "second"),
        helper.make_node("Gemm", ["y", "w", "b"], ["z"], "third"),
    ]
    x, z = (helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 2)) for name in "xz")
    tensors = [numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")]
    tensors.append(numpy_helper.from_array(np.ones(2, np.float32), "b"))
    return helper.make_model(helper.make_graph(nodes, "g", [x], [z], tensors))


def test_tensors_are_made_once_and_biases_once_for_each_product() -> None:
    seen = []

    def factor(node: onnx.NodeProto, place: int, values: np.ndarray | None) -> Made:
        seen.append((node.name, *node.input, place, values is None))
        made = f"{node.name}.{place}"
        return [], [helper.make_node("Identity", [node.input[place]], [made], f"{made}/copy")], made

    model = three_layers()
    before = model.SerializeToString()
    found = rewire(model, {"first", "second", "third"}, factor, (2, 0, 1))
    assert seen == [
        ("first", "x", "w", "b", 2, False),
        ("first", "x", "w", "first.2", 0, True),
        ("first", "first.0", "w", "first.2", 1, False),
        ("second", "h", "w", 0, True),
        ("third", "y", "w", "b", 2, False),
        ("third", "y", "w", "third.2", 0, True),
    ]
    inputs = {node.name: list(node.input) for node in found.graph.node}
    assert inputs["second"] == ["second.0", "first.1"]
    assert inputs["third"] == ["third.0", "first.1", "third.2"]
    assert model.SerializeToString() == before
    onnx.checker.check_model(found, full_check=True)  # every tensor is made before it is used


def test_only_the_chosen_products_and_places_change_and_what_nobody_uses_goes() -> None:
    def factor(node: onnx.NodeProto, place: int, values: np.ndarray | None) -> Made:
        if values is None:
            return [], [], node.input[place]
        return [numpy_helper.from_array(2 * values, "twice")], [], "twice"

    some = rewire(three_layers(), {"first"}, factor)
    assert [list(node.input) for node in some.graph.node] == [["x", "twice", "b"], ["h", "w"], ["y", "w", "b"]]
    every = rewire(three_layers(), {"first", "second", "third"}, factor)
    assert {tensor.name for tensor in every.graph.initializer} == {"twice", "b"}


@pytest.mark.parametrize(("axis", "rank"), [(0, 1), (0, 4), (1, 3), (-1, 2)])
def test_scales_lie_along_their_axis(axis: int, rank: int) -> None:
    values = np.random.default_rng(0).standard_normal((3, 4, 5, 6)[:rank])
    scale = np.arange(1.0, values.shape[axis] + 1)
    expected = np.moveaxis(np.moveaxis(values, axis, -1) * scale, -1, axis)
    np.testing.assert_array_equal(values * along(scale, axis, rank), expected)
