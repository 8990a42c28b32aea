"""The map of an ONNX graph: what makes the places from which a GridSample fetches the source, and the joints it starts
from.

Its places are coordinates: wrong by a percent they would be wrong by pixels, so what computes with them is FP32
whatever the precision of the rest. Between, convolutions look at features and say by how much a place is corrected; an
error of a percent there is one of a tenth of a pixel.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rpfm_edge.core.signature import JOINTS

LAYERS = ("Conv", "Gemm", "MatMul")


def map_nodes(model: Any) -> frozenset[str]:
    """Names of the nodes that depend on an input and whose result is, or reaches, the places of a GridSample."""
    return reaching(model, {node.input[1] for node in model.graph.node if node.op_type == "GridSample"})


def exact_nodes(model: Any) -> frozenset[str]:
    """Names of the nodes that are FP32 in every graph: those of the map that compute with places, each GridSample, and
    in a "prepare" graph what makes joints of the last layers before them."""
    return place_nodes(model) | fetches(model) | reaching(model, {JOINTS}, LAYERS)


def place_nodes(model: Any) -> frozenset[str]:
    """Names of the map's nodes that compute with places: from the inputs up to the first convolutions, and from the
    last ones, whose results are corrections, to the places themselves; both convolutions included."""
    names = map_nodes(model)
    mapped = [node for node in model.graph.node if node.name in names]
    behind, found = set[str](), set[str]()
    for node in mapped:  # in topological order
        if not behind.intersection(node.input):
            found.add(node.name)
        if node.op_type == "Conv" or behind.intersection(node.input):
            behind.update(node.output)
    wanted = {node.input[1] for node in model.graph.node if node.op_type == "GridSample"}
    for node in reversed(mapped):
        if wanted.intersection(node.output):
            found.add(node.name)
            wanted.update(node.input if node.op_type != "Conv" else ())
    return frozenset(found)


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
