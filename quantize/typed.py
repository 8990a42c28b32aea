"""INT8 graphs for libraries that compute in exactly the types a graph names, as TensorRT's strongly typed networks do.

NNCF refuses FP16 graphs, so a graph is quantized in FP32 and what it left in float is cast here.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from quantize.float16 import to_float16
from quantize.rewire import along

FOLDER = "typed"  # of a graph artifact: its graphs for such libraries
SMALLEST = np.finfo(np.float16).smallest_normal  # below it FP16 loses digits, and a scale of 0 would divide by 0


def to_typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of an INT8 graph in FP16 and INT8: the scales of its quantizers too, so each DequantizeLinear gives FP16.

    Attention is in FP16, which fused kernels want, and so is whatever was left in float, but norms, softmax and the
    rounding to grey levels, which stay in FP32 between casts. Needs opset 19, where scales may be FP16.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _hold_scales(copy)
    return to_float16(copy)


def _hold_scales(model: onnx.ModelProto) -> None:
    """Raise scales that FP16 cannot hold, and round the weights behind them again: a channel of zeros stays one."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    scales = {node.input[1]: numpy_helper.to_array(tensors[node.input[1]]) for node in nodes}  # as they were
    for node in nodes:
        scale = scales[node.input[1]]
        if scale.min() >= SMALLEST:
            continue
        held = np.maximum(scale, SMALLEST)
        weight = tensors.get(node.input[0])
        if weight:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            values = numpy_helper.to_array(weight)
            rounded = np.round(values * along(scale / held, axis, values.ndim)).astype(values.dtype)
            weight.CopyFrom(numpy_helper.from_array(rounded, weight.name))
        tensors[node.input[1]].CopyFrom(numpy_helper.from_array(held, node.input[1]))
