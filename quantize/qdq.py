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
    biases: Literal["float", "int32"] = "float",
) -> onnx.ModelProto:
    """A copy of ``model`` with ``products`` (names of Conv, Gemm and MatMul nodes) in INT8.

    All is symmetric: weights per output channel, stored once however many products share them; activations per tensor,
    "unsigned" where they come from a Relu or Softmax, if that is asked for (TensorRT takes signed ones only).

    Args:
        ranges: activation → the magnitude that becomes the last level, for every activation that goes into a product.
        biases: "int32" rounds those of linear layers to the product of their two scales, without which ONNX Runtime
            computes these layers in float; TensorRT does not take it.

    Raises:
        ConfigError: a name of no product, or an activation without a range.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _require_known(copy, products)
    writer = _Writer(copy, ranges, LEVELS[weights], activations == "unsigned")
    for node in copy.graph.node:
        if node.name in products:
            if biases == "int32" and node.op_type == "Gemm" and len(node.input) > 2:
                node.input[2] = writer.bias(node)
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
        self._positive = never_negative(model) if unsigned else frozenset()
        self._done: dict[str, str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def quantized(self, node: onnx.NodeProto, place: int) -> str:
        name = node.input[place]
        if name not in self._done:
            make = self._weight if name in self._weights else self._activation
            self._done[name] = make(node, place)
        return self._done[name]

    def bias(self, node: onnx.NodeProto) -> str:
        """The bias of a linear layer in INT32, in steps of its activation's scale times its weights'.

        It stays as it is where it is computed, or where weights of nearly 0 make the steps too small for 32 bits.
        """
        if node.input[1] not in self._weights or node.input[2] not in self._weights:
            return str(node.input[2])
        values = numpy_helper.to_array(self._weights[node.input[2]])
        scale = self._step(node, 0)[0] * self._channels(node, 1)[1]
        stored = np.round(values.astype(np.float64) / scale)
        if np.abs(stored).max() > np.iinfo(np.int32).max:
            return str(node.input[2])
        stored = stored.astype(np.int32)
        return self._pair(f"{node.name}.bias", f"{node.name}/bias", (stored, scale, np.zeros(len(scale), np.int32)), 0)

    def _weight(self, node: onnx.NodeProto, place: int) -> str:
        values, scale, axis = self._channels(node, place)
        shape = [-1 if other == axis else 1 for other in range(values.ndim)]
        stored = np.round(values / scale.reshape(shape)).astype(np.int8)
        tensors = (stored, scale, np.zeros(len(scale), np.int8))
        return self._pair(node.input[place], f"{node.name}/weight", tensors, axis)

    def _activation(self, node: onnx.NodeProto, place: int) -> str:
        return self._pair(node.input[place], f"{node.name}/input{place}", (None, *self._step(node, place)), None)

    def _channels(self, node: onnx.NodeProto, place: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The values of a weight, the scale of each channel, and the axis of the channels."""
        values = numpy_helper.to_array(self._weights[node.input[place]])
        axis = channel_axis(node, place, values.ndim)
        return values, channel_scales(values, axis, self._levels), axis

    def _step(self, node: onnx.NodeProto, place: int) -> tuple[np.ndarray, np.ndarray]:
        """The scale of an activation, and a zero of the type that it gets."""
        name = node.input[place]
        if name not in self._ranges:
            raise ConfigError(
                f"{name}, which goes into {node.name}, has no range", expected="one", fix="observe this graph again"
            )
        kind, levels = (np.uint8, 255) if name in self._positive else (np.int8, 127)
        return np.array(self._ranges[name] / levels, np.float32), np.array(0, kind)

    def _pair(
        self, source: str, base: str, tensors: tuple[np.ndarray | None, np.ndarray, np.ndarray], axis: int | None
    ) -> str:
        """Write stored values (None: they are computed from ``source``), scale, zero point and the nodes around them.

        Nodes are named ``base``/…, after their product, as backends name what they fuse.
        """
        names = [f"{source}.{part}" for part in ("stored", "scale", "zero")]
        for name, value in zip(names, tensors, strict=True):
            if value is not None:
                self._graph.initializer.append(numpy_helper.from_array(value, name))
        if tensors[0] is None:
            computed = [source, *names[1:]]
            self.nodes.append(helper.make_node("QuantizeLinear", computed, names[:1], name=f"{base}/quantize"))
        result, extra = f"{source}.dequantized", {} if axis is None else {"axis": axis}
        self.nodes.append(helper.make_node("DequantizeLinear", names, [result], name=f"{base}/dequantize", **extra))
        return result


def never_negative(model: onnx.ModelProto) -> frozenset[str]:
    """The tensors that come from a Relu or Softmax: "unsigned" gives them 255 levels."""
    nodes = (node for node in model.graph.node if node.op_type in NEVER_NEGATIVE)
    return frozenset(output for node in nodes for output in node.output)


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
