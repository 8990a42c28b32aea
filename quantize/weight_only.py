"""Weights alone in INT8 or INT4, for devices that wait for memory: activations and arithmetic stay float.

Every weight becomes integers and a DequantizeLinear, stored once however many steps share it. Scales are positive and
no smaller than FP16 holds, zero points 0. INT8 has a scale per output channel. INT4 has one for every 32 weights of a
sum, in linear layers alone; convolutions, the layers that inputs reach and the heads are INT8 then. The weights of the
map stay float.

NNCF 3.4 could do the same (``nncf.compress_weights``), but ONNX Runtime refuses its scales of convolutions, which have
three axes, and TensorRT its negative ones.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from quantize.layers import PRODUCTS, constants, map_products, plan
from quantize.qdq import channel_axis, channel_scales
from quantize.rewire import Made, along, rewire
from quantize.typed import SMALLEST

Rounded = tuple[np.ndarray, np.ndarray, dict[str, int]]  # integers, scales, attributes of the DequantizeLinear

GROUP = 32  # weights of a sum that have one INT4 scale
BLOCKS_OPSET = 21  # the first in which DequantizeLinear has a scale for every block
SHRINKS = np.linspace(1.0, 0.7, 13, dtype=np.float32)  # of the scale at which no weight of the block is clipped


def to_weight_only(model: onnx.ModelProto, bits: Literal[8, 4]) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Quantize the weights of all layers of a "prepare" or "frame" graph but the map's; nothing is calibrated.

    Returns:
        A new graph with the same inputs and outputs, and how many weights are stored in "int8" and "int4".

    Raises:
        ArtifactError: the graph has not the parts of a student's.
    """
    inner = set(plan(model).quantized) if bits == 4 else set()
    if bits == 4:
        model = version_converter.convert_version(model, BLOCKS_OPSET)
    fixed, mapped = constants(model), map_products(model)
    products = (node for node in model.graph.node if node.op_type in PRODUCTS and node.name not in mapped)
    layers = [node.name for node in products if fixed & set(node.input[:2])]
    kinds: Counter[str] = Counter()

    def factor(node: onnx.NodeProto, place: int, weight: np.ndarray | None) -> Made:
        name = node.input[place]
        if weight is None:
            return [], [], name
        grouped = node.name in inner and node.op_type != "Conv" and weight.shape[_sums(node, place)] % GROUP == 0
        kinds["int4" if grouped else "int8"] += 1
        stored, scale, attributes = (in_groups if grouped else per_channel)(node, place, weight)
        kind = TensorProto.INT4 if grouped else TensorProto.INT8
        return _dequantized(f"{node.name}/weight", name, (stored, kind), scale, attributes)

    made = rewire(model, layers, factor)
    onnx.checker.check_model(made, full_check=True)
    return made, dict(sorted(kinds.items()))


def per_channel(node: onnx.NodeProto, place: int, weight: np.ndarray) -> Rounded:
    """INT8 with the largest magnitude of every output channel of ``node`` at 127."""
    axis = channel_axis(node, place, weight.ndim)
    scale = np.maximum(channel_scales(weight, axis, 127), SMALLEST)
    return np.round(weight / along(scale, axis, weight.ndim)), scale, {"axis": axis}


def in_groups(node: onnx.NodeProto, place: int, weight: np.ndarray) -> Rounded:
    """INT4, [-8, 7], of a matrix: every group of ``GROUP`` along the sum has the scale of least squared error."""
    axis = _sums(node, place)
    groups = np.moveaxis(weight, axis, 0).reshape(-1, GROUP, weight.shape[1 - axis])  # [groups, 32, channels]
    largest = np.abs(groups).max(axis=1, keepdims=True) / np.float32(7)
    scales = [np.maximum(largest * shrink, SMALLEST) for shrink in SHRINKS]
    errors = np.stack([np.square(_rounded(groups, scale) * scale - groups).sum(axis=1) for scale in scales])
    scale = np.take_along_axis(np.concatenate(scales, axis=1), errors.argmin(axis=0)[:, None], axis=1)
    stored = _rounded(groups, scale).reshape(-1, weight.shape[1 - axis])
    attributes = {"axis": axis, "block_size": GROUP}
    return np.moveaxis(stored, 0, axis), np.moveaxis(scale[:, 0], 0, axis), attributes


def _rounded(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = np.clip(np.round(values / scale), -8, 7)
    return rounded


def _sums(node: onnx.NodeProto, place: int) -> int:
    """The axis of a matrix along which ``node`` sums."""
    return 1 - channel_axis(node, place, 2)


def _dequantized(
    base: str, name: str, stored: tuple[np.ndarray, int], scale: np.ndarray, attributes: dict[str, int]
) -> Made:
    """The tensors and the DequantizeLinear of weight ``name``, and what that makes."""
    values, kind = stored
    integers = values.astype(helper.tensor_dtype_to_np_dtype(kind))
    names = [f"{name}.integers", f"{name}.scale"]
    arrays = (np.ascontiguousarray(array) for array in (integers, scale))
    tensors = [numpy_helper.from_array(array, tensor) for array, tensor in zip(arrays, names, strict=True)]
    result = f"{name}.dequantized"
    return tensors, [helper.make_node("DequantizeLinear", names, [result], f"{base}/dequantize", **attributes)], result
