"""The map of an ONNX graph: what makes the places from which a GridSample fetches the source, and the joints it starts
from. Wrong by a percent it would be wrong by pixels, so it is FP32 whatever the precision of the rest."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rpfm_edge.pipeline import JOINTS

LAYERS = ("Conv", "Gemm", "MatMul")


def map_nodes(model: Any) -> frozenset[str]:
    """Names of the nodes that depend on an input and whose result is, or reaches, the places of a GridSample."""
    return reaching(model, {node.input[1] for node in model.graph.node if node.op_type == "GridSample"})


def exact_nodes(model: Any) -> frozenset[str]:
    """Names of the nodes that are FP32 in every graph: the map, each GridSample, since coordinates in half precision
    shift by pixels, and in a "prepare" graph what makes joints of the last layers before them."""
    return map_nodes(model) | fetches(model) | reaching(model, {JOINTS}, LAYERS)


def fetches(model: Any) -> frozenset[str]:
    """Names of the nodes that fetch the source."""
    return frozenset(node.name for node in model.graph.node if node.op_type == "GridSample")


def reaching(model: Any, tensors: Collection[str], end: Collection[str] = ()) -> frozenset[str]:
    """The nodes that depend on an input and make ``tensors``, back to those of the kinds ``end``, without these."""
    varying = {tensor.name for tensor in model.graph.input}
    for node in model.graph.node:  # in topological order
        if varying.intersection(node.input):
            varying.update(node.output)
    wanted, found = set(tensors), set[str]()
    for node in reversed(model.graph.node):
        if node.op_type not in end and wanted & varying & set(node.output):
            wanted.update(node.input)
            found.add(node.name)
    return frozenset(found)
