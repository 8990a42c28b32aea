"""FP16: weights and activations of an ONNX graph in half precision; its inputs and outputs keep their types."""

from __future__ import annotations

from collections.abc import Collection
from graphlib import TopologicalSorter

import onnx
from onnx import TensorProto

from rpfm_edge.core.source_map import exact_nodes

# LayerNormalization squares a residual stream that may outgrow FP16, and Softmax sums over all keys, which a GPU would
# do in FP16 too. Round sees grey levels up to 255, where FP16 has steps of 1/8 and turns near-ties into ties.
FLOAT32_OPS = ("LayerNormalization", "GroupNormalization", "InstanceNormalization", "Softmax", "Round", "Clip")


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` in FP16; ``FLOAT32_OPS`` stay in FP32 between casts, and so does what moves the source.

    What ``source_map.exact_nodes`` names computes as in the float graph: nothing is rounded on its way from one such
    node to the next, nor what it takes of the graph's inputs and constants.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    exact = exact_nodes(copy)
    _own_constants(copy, exact)
    half: onnx.ModelProto = convert_float_to_float16(
        copy, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPS], node_block_list=[*exact]
    )
    _sort_nodes(half)  # the converter appends its casts, and ONNX wants every tensor made before it is used
    _pass_on(half)
    onnx.checker.check_model(half, full_check=True)
    return half


def _own_constants(model: onnx.ModelProto, nodes: Collection[str]) -> None:
    """Give ``nodes`` float constants that no other node shares: the converter rounds what it shares."""
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            known |= {output: attribute.t for attribute in node.attribute for output in node.output}
    made = set[str]()
    for node in model.graph.node:
        for place, name in enumerate(node.input if node.name in nodes else ()):
            if name in known and known[name].data_type == TensorProto.FLOAT:
                node.input[place] = f"{name}.exact"
                if name not in made:
                    own = model.graph.initializer.add()
                    own.CopyFrom(known[name])
                    own.name = f"{name}.exact"
                made.add(name)


def _pass_on(model: onnx.ModelProto) -> None:
    """Let what is FP32 on both sides of a cast to FP16 and back go past both."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    single = {
        value.name
        for value in (*inferred.input, *inferred.value_info)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    types = {node.output[0]: node.attribute[0].i for node in model.graph.node if node.op_type == "Cast"}
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    exact: dict[str, str] = {}  # what was cast there and back → what it was before
    for name, kind in types.items():
        middle = sources[name]
        if kind == TensorProto.FLOAT and types.get(middle) == TensorProto.FLOAT16 and sources[middle] in single:
            exact[name] = sources[middle]
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = exact.get(name, name)
    used, nodes = {tensor.name for tensor in model.graph.output}, []
    for node in reversed(model.graph.node):
        if node.op_type != "Cast" or used.intersection(node.output):
            used.update(node.input)
            nodes.append(node)
    kept = [type(node).FromString(node.SerializeToString()) for node in reversed(nodes)]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _sort_nodes(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)
    producer = {tensor: place for place, node in enumerate(nodes) for tensor in node.output}
    needs = {place: [producer[t] for t in node.input if t in producer] for place, node in enumerate(nodes)}
    order = list(TopologicalSorter(needs).static_order())
    del model.graph.node[:]
    model.graph.node.extend(nodes[place] for place in order)
