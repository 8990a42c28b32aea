"""FP16: weights and activations of an ONNX graph in half precision; its inputs and outputs keep their types."""

from __future__ import annotations

from graphlib import TopologicalSorter

import onnx

# LayerNormalization squares a residual stream that may outgrow FP16, and Softmax sums over all keys, which a GPU would
# do in FP16 too. Round sees grey levels up to 255, where FP16 has steps of 1/8 and turns near-ties into ties.
FLOAT32_OPS = ("LayerNormalization", "GroupNormalization", "InstanceNormalization", "Softmax", "Round", "Clip")


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` in FP16; ``FLOAT32_OPS`` stay in FP32 between casts."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    half: onnx.ModelProto = convert_float_to_float16(
        copy, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPS]
    )
    _sort_nodes(half)  # the converter appends its casts, and ONNX wants every tensor made before it is used
    onnx.checker.check_model(half, full_check=True)
    return half


def _sort_nodes(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)
    producer = {tensor: place for place, node in enumerate(nodes) for tensor in node.output}
    needs = {place: [producer[t] for t in node.input if t in producer] for place, node in enumerate(nodes)}
    order = list(TopologicalSorter(needs).static_order())
    del model.graph.node[:]
    model.graph.node.extend(nodes[place] for place in order)
