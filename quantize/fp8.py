"""FP8: weights and activations of an ONNX graph as E4M3 between explicit QuantizeLinear and DequantizeLinear nodes.

For strongly typed TensorRT on GPUs with FP8 tensor cores; what is not FP8 is FP16, as in ``quantize.typed``. ONNX
Runtime's CPU provider runs the same graph, slowly, so its drift is known without such a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from quantize.float16 import to_float16
from quantize.layers import plan
from quantize.qdq import channel_axis, channel_scales
from quantize.ranges import observe
from quantize.typed import SMALLEST
from rpfm_edge.signature import Feeds

LARGEST = 448  # of E4M3; a QuantizeLinear saturates there

# (product, which of its factors, the weights or None for an activation) → tensors, nodes, name of what they make
Factor = Callable[[onnx.NodeProto, int, "np.ndarray | None"], tuple[list[onnx.TensorProto], list[onnx.NodeProto], str]]


def to_fp8(model: onnx.ModelProto, samples: Iterable[Feeds]) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Quantize a "prepare" or "frame" graph (``quantize.layers`` says which of its layers), calibrated on ``samples``.

    Returns:
        A new graph in FP16 and FP8 with the same inputs and outputs, and how many products of each kind are FP8.

    Raises:
        ArtifactError: the graph has not the parts of a student's.
    """
    layers = plan(model).quantized
    half = to_float16(insert(model, layers, largest_magnitudes(model, samples, layers)))
    return half, kinds(model, layers)


def insert(model: onnx.ModelProto, products: Collection[str], ranges: Mapping[str, float]) -> onnx.ModelProto:
    """A copy of an FP32 ``model`` whose ``products`` (names of Conv, Gemm and MatMul nodes) multiply E4M3.

    Weights are scaled per output channel and stored once however many products share them, activations per tensor.
    Scales are FP32 numbers that FP16 holds exactly, so that weights are right behind ``to_float16``, too.

    Args:
        ranges: activation → its largest magnitude, which becomes 448.
    """

    def factor(
        node: onnx.NodeProto, place: int, weight: np.ndarray | None
    ) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto], str]:
        name, base = node.input[place], f"{node.name}/{'input' if weight is None else 'weight'}"
        if weight is None:
            axis, shape, scale = {}, [], _held(np.float32(ranges[name] / LARGEST))
        else:
            channel = channel_axis(node, place, weight.ndim)
            scale = _held(channel_scales(weight, channel, LARGEST))
            axis, shape = {"axis": channel}, [-1 if other == channel else 1 for other in range(weight.ndim)]
        stored, names = f"{name}.fp8", [f"{name}.fp8_scale", f"{name}.fp8_zero"]
        zero = np.zeros(scale.shape, ml_dtypes.float8_e4m3fn)
        tensors = [numpy_helper.from_array(value, key) for key, value in zip(names, (scale, zero), strict=True)]
        nodes = []
        if weight is None:
            nodes = [helper.make_node("QuantizeLinear", [name, *names], [stored], f"{base}/quantize")]
        else:
            tensors.append(numpy_helper.from_array(to_e4m3(weight / scale.reshape(shape)), stored))
        result = f"{name}.fp8_dequantized"
        nodes.append(helper.make_node("DequantizeLinear", [stored, *names], [result], f"{base}/dequantize", **axis))
        return tensors, nodes, result

    return rewire(model, products, factor)


def rewire(model: onnx.ModelProto, products: Collection[str], factor: Factor) -> onnx.ModelProto:
    """A copy of ``model`` where the factors of ``products`` are what ``factor`` makes of them, once for each tensor."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    done: dict[str, str] = {}
    nodes = []
    for node in copy.graph.node:
        for place in (0, 1) if node.name in products else ():
            name = node.input[place]
            if name not in done:
                values = numpy_helper.to_array(weights[name]).astype(np.float32) if name in weights else None
                tensors, made, done[name] = factor(node, place, values)
                copy.graph.initializer.extend(tensors)
                nodes.extend(made)
            node.input[place] = done[name]
        nodes.append(node)
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]  # a cleared field takes its nodes along
    used = {tensor for node in kept for tensor in node.input}
    tensors = [tensor for tensor in copy.graph.initializer if tensor.name in used]
    del copy.graph.node[:], copy.graph.initializer[:]
    copy.graph.node.extend(kept)
    copy.graph.initializer.extend(tensors)
    return copy


def largest_magnitudes(model: onnx.ModelProto, samples: Iterable[Feeds], products: Collection[str]) -> dict[str, float]:
    """Activation that goes into ``products`` → its largest magnitude over ``samples``, or 1 where all is zero.

    A floating-point format loses no digits to a large range, so there is nothing to gain by clipping.
    """
    feeds = list(samples)
    return {name: seen.range("minmax") for name, seen in observe(model, feeds, len(feeds), products).items()}


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """Round to E4M3, and saturate at ±448."""
    rounded: np.ndarray = np.clip(values, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
    return rounded


def kinds(model: onnx.ModelProto, products: Collection[str]) -> dict[str, int]:
    """How many of ``products`` there are of each kind of node."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node if node.name in products).items()))


def _held(scale: np.ndarray | np.float32) -> np.ndarray:
    """The nearest scale that FP16 holds with all its digits: a larger one costs E4M3 no digit until 2^-9 of it."""
    return np.maximum(np.asarray(scale, np.float16), SMALLEST).astype(np.float32)
