"""FP8: weights and activations of an ONNX graph as E4M3 between explicit QuantizeLinear and DequantizeLinear nodes.

For strongly typed TensorRT on GPUs with FP8 tensor cores; what is not FP8 is FP16, as in ``quantize.typed``. ONNX
Runtime's CPU provider runs the same graph, slowly, so its drift is known without such a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import ml_dtypes
import numpy as np
import onnx

from quantize.float16 import to_float16
from quantize.layers import plan
from quantize.qdq import channel_axis, channel_scales
from quantize.ranges import observe
from quantize.rewire import Made, along, pair, rewire
from quantize.typed import SMALLEST
from rpfm_edge.core.signature import Feeds

LARGEST = 448  # of E4M3; a QuantizeLinear saturates there
PARTS = ("fp8", "fp8_scale", "fp8_zero", "fp8_dequantized")
E4M3 = ml_dtypes.float8_e4m3fn


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

    def factor(node: onnx.NodeProto, place: int, weight: np.ndarray | None) -> Made:
        name = node.input[place]
        if weight is None:
            scale = _held(np.float32(ranges[name] / LARGEST))
            return pair(name, f"{node.name}/input", (None, scale, np.zeros((), E4M3)), parts=PARTS)
        axis = channel_axis(node, place, weight.ndim)
        scale = _held(channel_scales(weight, axis, LARGEST))
        stored = to_e4m3(weight / along(scale, axis, weight.ndim))
        return pair(name, f"{node.name}/weight", (stored, scale, np.zeros(len(scale), E4M3)), axis, PARTS)

    return rewire(model, products, factor)


def largest_magnitudes(model: onnx.ModelProto, samples: Iterable[Feeds], products: Collection[str]) -> dict[str, float]:
    """Activation that goes into ``products`` → its largest magnitude over ``samples``, or 1 where all is zero.

    A floating-point format loses no digits to a large range, so there is nothing to gain by clipping.
    """
    feeds = list(samples)
    return {name: seen.range("minmax") for name, seen in observe(model, feeds, len(feeds), products).items()}


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """Round to E4M3, and saturate at ±448."""
    rounded: np.ndarray = np.clip(values, -LARGEST, LARGEST).astype(E4M3)
    return rounded


def kinds(model: onnx.ModelProto, products: Collection[str]) -> dict[str, int]:
    """How many of ``products`` there are of each kind of node."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node if node.name in products).items()))


def _held(scale: np.ndarray | np.float32) -> np.ndarray:
    """The nearest scale that FP16 holds with all its digits: a larger one costs E4M3 no digit until 2^-9 of it."""
    return np.maximum(np.asarray(scale, np.float16), SMALLEST).astype(np.float32)
