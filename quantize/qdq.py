"""INT8 by our own hand: QuantizeLinear and DequantizeLinear put directly at the inputs of chosen products.

NNCF moves a quantizer up, past Reshape and Concat. In front of a Reshape that a convolution follows, OpenVINO 2026.4
then computes something else than ONNX Runtime; directly at the product it does not. So every product can be quantized,
and any set of them, without calibrating again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from quantize.layers import PRODUCTS
from rpfm_edge.errors import ConfigError

LEVELS = {"half": 64, "full": 127}  # of weights: see quantize.int8.Int8Config
NEVER_NEGATIVE = ("Relu", "Softmax")


def insert(
    model: onnx.ModelProto,
    products: Collection[str],
    ranges: Mapping[str, float],
    weights: Literal["half", "full"] = "half",
    activations: Literal["signed", "unsigned"] = "signed",
) -> onnx.ModelProto:
    """A copy of ``model`` with ``products`` (names of Conv, Gemm and MatMul nodes) in INT8.

    All is symmetric: weights per output channel, stored once however many products share them; activations per tensor,
    "unsigned" where they come from a Relu or Softmax, if that is asked for (TensorRT takes signed ones only).

    Args:
        ranges: activation → the magnitude that becomes the last level, for every activation that goes into a product.

    Raises:
        ConfigError: a name of no product, or an activation without a range.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _require_known(copy, products)
    writer = _Writer(copy, ranges, LEVELS[weights], activations == "unsigned")
    for node in copy.graph.node:
        if node.name in products:
            for place in (0, 1):
                node.input[place] = writer.quantized(node, place)
        writer.nodes.append(node)
    nodes = list(writer.nodes)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    _drop_unused(copy)
    onnx.checker.check_model(copy, full_check=True)
    return copy


class _Writer:
    """Makes the quantized form of a tensor where it is first asked for, and keeps it for all that ask later."""

    def __init__(self, model: onnx.ModelProto, ranges: Mapping[str, float], levels: int, unsigned: bool) -> None:
        self._graph, self._ranges, self._levels = model.graph, ranges, levels
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        makers = {output: node.op_type for node in model.graph.node for output in node.output}
        self._positive = {name for name, kind in makers.items() if unsigned and kind in NEVER_NEGATIVE}
        self._done: dict[str, str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def quantized(self, node: onnx.NodeProto, place: int) -> str:
        name = node.input[place]
        if name not in self._done:
            weight = self._weights.get(name)
            self._done[name] = self._activation(node, place) if weight is None else self._weight(node, place, weight)
        return self._done[name]

    def _weight(self, node: onnx.NodeProto, place: int, weight: onnx.TensorProto) -> str:
        values = numpy_helper.to_array(weight)
        axis = channel_axis(node, place, values.ndim)
        scale = channel_scales(values, axis, self._levels)
        shape = [-1 if other == axis else 1 for other in range(values.ndim)]
        stored = np.round(values / scale.reshape(shape)).astype(np.int8)
        return self._pair(node, place, [stored, scale, np.zeros(len(scale), np.int8)], axis)

    def _activation(self, node: onnx.NodeProto, place: int) -> str:
        name = node.input[place]
        if name not in self._ranges:
            raise ConfigError(
                f"{name}, which goes into {node.name}, has no range", expected="one", fix="observe this graph again"
            )
        kind, levels = (np.uint8, 255) if name in self._positive else (np.int8, 127)
        return self._pair(node, place, [None, np.float32(self._ranges[name] / levels), kind(0)], None)

    def _pair(self, node: onnx.NodeProto, place: int, values: list, axis: int | None) -> str:
        """Write the tensors and nodes; those of a product are named after it, as backends do with what they fuse."""
        source, base = node.input[place], f"{node.name}/{'weight' if values[0] is not None else f'input{place}'}"
        stored, scale, zero = (f"{source}.{part}" for part in ("int8", "scale", "zero"))
        for name, value in zip((stored, scale, zero), values, strict=True):
            if value is not None:
                self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        extra = {} if axis is None else {"axis": axis}
        if values[0] is None:
            self.nodes.append(
                helper.make_node("QuantizeLinear", [source, scale, zero], [stored], name=f"{base}/quantize")
            )
        result = f"{source}.dequantized"
        name = f"{base}/dequantize"
        self.nodes.append(helper.make_node("DequantizeLinear", [stored, scale, zero], [result], name=name, **extra))
        return result


def channel_axis(node: onnx.NodeProto, place: int, rank: int) -> int:
    """The axis of a weight along which the outputs of ``node`` lie."""
    if node.op_type == "Conv":
        return 0
    flipped = any(attribute.name == f"trans{'AB'[place]}" and attribute.i for attribute in node.attribute)
    return rank - 1 if flipped != (place == 1) else rank - 2


def channel_scales(values: np.ndarray, axis: int, levels: int) -> np.ndarray:
    """Float32 scale of every channel along ``axis``: its largest magnitude is the last level. A channel of zeros: 1."""
    others = tuple(other for other in range(values.ndim) if other != axis)
    scale = np.abs(values).max(axis=others).astype(np.float32) / np.float32(levels)
    scale[scale == 0] = 1
    return scale


def _require_known(model: onnx.ModelProto, products: Collection[str]) -> None:
    known = {node.name for node in model.graph.node if node.op_type in PRODUCTS}
    if unknown := sorted(set(products) - known):
        raise ConfigError(
            f"{unknown[0]!r} is no product of the graph", expected="names of Conv, Gemm and MatMul nodes", fix="check"
        )


def _drop_unused(model: onnx.ModelProto) -> None:
    used = {tensor for node in model.graph.node for tensor in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
