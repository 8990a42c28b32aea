"""ONNX graphs in the form that TensorRT 8.6 parses; numerically they stay what they were.

- INT8 weights behind a DequantizeLinear become float weights behind QuantizeLinear and DequantizeLinear: its builder
  fails on INT8 initializers.
- Gelu, which opset 20 brought, becomes the operations it stands for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.core.extras import import_extra


def legacy_bytes(graph: Path) -> bytes:
    """The graph of an ONNX file, rewritten; raises ``BackendError`` if the package onnx is not installed."""
    onnx = import_extra("onnx", "tensorrt-8")
    model = onnx.load(graph)
    float_weights(model)
    spell_out_gelu(model)
    content: bytes = model.SerializeToString()
    return content


def float_weights(model: Any) -> int:
    """Give every INT8 weight a float form, scale times weight, and a QuantizeLinear before its DequantizeLinear.

    Quantizing them again gives the same integers: a weight divided by its scale is off by far less than a half.
    Returns how many weights there were.
    """
    onnx = import_extra("onnx", "tensorrt-8")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, floats = [], {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors:
            name = node.input[0]
            if name not in floats:
                floats[name] = _float_weight(onnx, node, tensors)
                quantize = onnx.helper.make_node(
                    "QuantizeLinear", [f"{name}.float", *node.input[1:]], [f"{name}.quantized"], f"{name}.quantize"
                )
                quantize.attribute.extend(node.attribute)
                nodes.append(quantize)
            node.input[0] = f"{name}.quantized"
        nodes.append(node)
    for name in floats:
        model.graph.initializer.remove(tensors[name])
    model.graph.initializer.extend(floats.values())
    _replace_nodes(model, nodes)
    return len(floats)


def _float_weight(onnx: Any, node: Any, tensors: dict[str, Any]) -> Any:
    weight, scale = (onnx.numpy_helper.to_array(tensors[name]) for name in node.input[:2])
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    shape = [1] * weight.ndim
    if scale.ndim:
        shape[axis] = -1
    value = weight.astype(np.float32) * scale.astype(np.float32).reshape(shape)
    return onnx.numpy_helper.from_array(value.astype(scale.dtype), f"{node.input[0]}.float")


def spell_out_gelu(model: Any) -> int:
    """Replace every Gelu by its formula, with tanh or with Erf; returns how many there were."""
    onnx = import_extra("onnx", "tensorrt-8")
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    nodes: list[Any] = []
    count = 0
    for node in model.graph.node:
        if node.op_type == "Gelu":
            count += 1
            tanh = any(a.name == "approximate" and a.s == b"tanh" for a in node.attribute)
            kind = onnx.helper.tensor_dtype_to_np_dtype(kinds.get(node.output[0], onnx.TensorProto.FLOAT))
            nodes += _gelu(onnx, model, node, tanh, kind)
        else:
            nodes.append(node)
    _replace_nodes(model, nodes)
    return count


def _gelu(onnx: Any, model: Any, node: Any, tanh: bool, kind: Any) -> list[Any]:
    """0.5 x (1 + erf(x / sqrt 2)), or 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³)))."""
    x, name = node.input[0], node.output[0]
    made: list[Any] = []

    def constant(value: float) -> str:
        tensor = onnx.numpy_helper.from_array(np.array(value, kind), f"{name}.constant{len(model.graph.initializer)}")
        model.graph.initializer.append(tensor)
        return str(tensor.name)

    def add(op: str, *inputs: str, output: str = "") -> str:
        output = output or f"{name}.{len(made)}"
        made.append(onnx.helper.make_node(op, list(inputs), [output], output))
        return output

    if tanh:
        cube = add("Mul", add("Mul", x, x), x)
        inner = add("Add", x, add("Mul", cube, constant(0.044715)))
        gate = add("Tanh", add("Mul", inner, constant(math.sqrt(2 / math.pi))))
    else:
        gate = add("Erf", add("Mul", x, constant(math.sqrt(0.5))))
    half = add("Mul", x, constant(0.5))
    add("Mul", half, add("Add", gate, constant(1.0)), output=name)
    return made


def _replace_nodes(model: Any, nodes: list[Any]) -> None:
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]  # a cleared field takes its nodes along
    del model.graph.node[:]
    model.graph.node.extend(kept)
