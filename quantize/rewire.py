"""The one walk that replaces what goes into the products of a graph, as every quantized form of it needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PARTS = ("stored", "scale", "zero", "dequantized")

Made = tuple[list[TensorProto], list[onnx.NodeProto], str]  # initializers, nodes, name of the tensor they make
Factor = Callable[[onnx.NodeProto, int, "np.ndarray | None"], Made]  # product, input, its values or None if computed


def rewire(
    model: onnx.ModelProto, products: Collection[str], factor: Factor, places: Sequence[int] = (0, 1)
) -> onnx.ModelProto:
    """A copy of ``model`` where the inputs ``places`` of ``products`` are what ``factor`` makes of them.

    Each is made once for all products that share the tensor, but a bias (place 2) once for each product, whose steps it
    is in. ``factor`` sees the inputs that are not yet replaced, in the order of ``places``.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    done: dict[tuple[str, str], str] = {}
    nodes = []
    for node in copy.graph.node:
        for place in places if node.name in products else ():
            if place >= len(node.input):
                continue
            name = node.input[place]
            key = (name, node.name if place == 2 else "")
            if key not in done:
                values = numpy_helper.to_array(weights[name]).astype(np.float32) if name in weights else None
                tensors, made, done[key] = factor(node, place, values)
                copy.graph.initializer.extend(tensors)
                nodes.extend(made)
            node.input[place] = done[key]
        nodes.append(node)
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]  # a cleared field takes its nodes along
    used = {tensor for node in kept for tensor in node.input}
    tensors = [tensor for tensor in copy.graph.initializer if tensor.name in used]
    del copy.graph.node[:], copy.graph.initializer[:]
    copy.graph.node.extend(kept)
    copy.graph.initializer.extend(tensors)
    return copy


def along(scale: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """``scale``, (channels,), in the shape that multiplies a tensor of ``rank`` axes along ``axis``."""
    return scale.reshape([-1 if other == axis % rank else 1 for other in range(rank)])


def pair(
    source: str,
    base: str,
    tensors: tuple[np.ndarray | None, np.ndarray, np.ndarray],
    axis: int | None = None,
    parts: Sequence[str] = PARTS,
) -> Made:
    """Stored values (None: they are computed from ``source``), scale, zero point, and the nodes around them.

    Tensors are named ``source``.part; nodes ``base``/…, after their product, as backends name what they fuse.
    """
    *names, result = (f"{source}.{part}" for part in parts)
    arrays = [
        numpy_helper.from_array(array, name) for array, name in zip(tensors, names, strict=True) if array is not None
    ]
    nodes = [helper.make_node("DequantizeLinear", names, [result], f"{base}/dequantize", axis=axis)]
    if tensors[0] is None:
        nodes.insert(0, helper.make_node("QuantizeLinear", [source, *names[1:]], names[:1], f"{base}/quantize"))
    return arrays, nodes, result
