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
from onnx import numpy_helper

from quantize.layers import PRODUCTS
from quantize.rewire import Made, along, pair, rewire
from rpfm_edge.core.errors import ConfigError

LEVELS = {"half": (63.5, 64), "full": (127.0, 127)}  # of weights (see Int8Config): steps to the largest, last integer
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
    _require_known(model, products)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    positive = never_negative(model) if activations == "unsigned" else frozenset()
    levels, top = LEVELS[weights]

    def channels(node: onnx.NodeProto, place: int, weight: np.ndarray) -> tuple[np.ndarray, int]:
        axis = channel_axis(node, place, weight.ndim)
        return channel_scales(weight, axis, levels), axis

    def factor(node: onnx.NodeProto, place: int, values: np.ndarray | None) -> Made:
        name = node.input[place]
        if place == 2:
            weight = constants.get(node.input[1])
            if node.op_type != "Gemm" or values is None or weight is None:
                return [], [], name
            scale = _step(node, 0, ranges, positive)[0] * channels(node, 1, numpy_helper.to_array(weight))[0]
            return _bias(node, values, scale)
        if values is None:
            return pair(name, f"{node.name}/input{place}", (None, *_step(node, place, ranges, positive)))
        scale, axis = channels(node, place, values)
        stored = np.round(values / along(scale, axis, values.ndim)).clip(-top, top).astype(np.int8)
        return pair(name, f"{node.name}/weight", (stored, scale, np.zeros(len(scale), np.int8)), axis)

    made = rewire(model, products, factor, (2, 0, 1) if biases == "int32" else (0, 1))
    onnx.checker.check_model(made, full_check=True)
    return made


def _step(
    node: onnx.NodeProto, place: int, ranges: Mapping[str, float], positive: Collection[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The scale of an activation, and a zero of the type that it gets."""
    name = node.input[place]
    if name not in ranges:
        raise ConfigError(
            f"{name}, which goes into {node.name}, has no range", expected="one", fix="observe this graph again"
        )
    kind, levels = (np.uint8, 255) if name in positive else (np.int8, 127)
    return np.array(ranges[name] / levels, np.float32), np.array(0, kind)


def _bias(node: onnx.NodeProto, values: np.ndarray, scale: np.ndarray) -> Made:
    """A bias in INT32, in steps of ``scale``; it stays float where weights near 0 make these too small for 32 bits."""
    stored = np.round(values.astype(np.float64) / scale)
    if np.abs(stored).max() > np.iinfo(np.int32).max:
        return [], [], node.input[2]
    tensors = (stored.astype(np.int32), scale, np.zeros(len(scale), np.int32))
    return pair(f"{node.name}.bias", f"{node.name}/bias", tensors, 0)


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


def channel_scales(values: np.ndarray, axis: int, levels: float) -> np.ndarray:
    """Float32 scale of every channel along ``axis``: its largest magnitude in ``levels`` steps. Zeros: 1."""
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
