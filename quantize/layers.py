"""Which layers of an exported graph are quantized: decided by where they stand in it, never by the exporter's names.

A *product* is a Conv, Gemm or MatMul; a *layer* is a product with weights. Two products are neighbours if nothing but
cheap operations lies between them. The *map* is what makes the places that a GridSample fetches; what computes with
places is in FP32 whatever the precision of the rest (``source_map``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from rpfm_edge.core.errors import ArtifactError
from rpfm_edge.core.signature import JOINTS
from rpfm_edge.core.source_map import map_nodes, place_nodes, reaching

PRODUCTS = ("Conv", "Gemm", "MatMul")
IMAGE = onnx.TensorProto.UINT8
PASSED = ("Relu", "Concat", "Slice", "Split", "Squeeze", "Unsqueeze", "Pad", "Identity", "Cast", "DepthToSpace", "Clip")


@dataclass(frozen=True, slots=True)
class Plan:
    """Names of nodes: the layers to quantize, and the products that stay float."""

    quantized: tuple[str, ...]
    kept: tuple[str, ...]


def plan(model: onnx.ModelProto, corrections: bool = False) -> Plan:
    """Divide the products of ``model``, a "prepare" or "frame" graph; with ``corrections`` those convolutions of the
    map that say how it is corrected are quantized, too.

    These stay float, because an error there is not averaged out by what follows, or costs little to avoid:

    - attention: the products without weights;
    - the first layers, reached by an input of the graph: convolutions of pictures, the patch embedding of every step
      (OpenVINO 2026.4 is off by 29 % where the concatenation of noise and pose and the embedding behind it are both
      quantized), and the decoder's first ones, which the noise reaches by the sum over the steps;
    - what is added to or joined with the noise: the head of every step and the last layer of the pose encoder;
    - the embedding of the source's patches: the first linear layer of all;
    - convolutions of what was rearranged, such as unshuffled into channels: NNCF quantizes before the Reshape, and
      there OpenVINO 2026.4 is off by 20 % unless its low-precision transformations are switched off;
    - the last layers, which write the picture;
    - the map (``map_products``).

    Raises:
        ArtifactError: a rule that matches nothing, nothing left to quantize, or a layer that no input reaches: the
            embedding of time and the modulations made from it must have been folded into constants.
    """
    weights = constants(model)
    products = {node.name: node for node in model.graph.node if node.op_type in PRODUCTS}
    before, mapped = neighbours(model), map_products(model)
    layers = {name for name, node in products.items() if any(tensor in weights for tensor in node.input)} - mapped
    if unfolded := sorted(name for name in layers if not before[name]):
        raise ArtifactError(
            f"layer {unfolded[0]} depends on no input",
            expected="time embedding and modulations folded into constants",
            fix="export the student again",
        )
    first, joined = _first(model, layers, before), _joined(model, layers, before)
    last = {
        other
        for output in model.graph.output
        if output.type.tensor_type.elem_type == IMAGE
        for other in before[output.name]
    }
    stem, attention = _stem(model, layers, mapped), set(products) - layers - mapped
    fixed = fixed_products(model, before) if corrections else mapped
    kept = attention | fixed | first | joined | (last & layers) | stem | _rearranged(model)
    for rule, found in {"attention": attention, "first layers": first, "first linear layer": stem}.items():
        _require(found, rule, model)
    if any(output.type.tensor_type.elem_type == IMAGE for output in model.graph.output):
        _require(last & layers, "last layers", model)
        _require(joined, "layers joined with the noise", model)
    quantized = [name for name in products if name not in kept]
    _require(quantized, "layers to quantize", model)
    return Plan(tuple(quantized), tuple(name for name in products if name in kept))


def load(path: Path) -> onnx.ModelProto:
    """The graph of a file, with its Constant nodes as initializers, where weights are looked for."""
    model = onnx.load(path)
    graph, made = model.graph, set[str]()
    for node in graph.node:
        if node.op_type == "Constant":
            tensor = next(attribute.t for attribute in node.attribute if attribute.name == "value")
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            made.add(tensor.name)
    nodes = [node for node in graph.node if node.op_type != "Constant"]
    shapes = [value for value in graph.value_info if value.name not in made]  # the types of initializers stand in them
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.value_info.extend(shapes)
    return model


def heads(model: onnx.ModelProto) -> tuple[str, ...]:
    """Outputs of the last linear layer of every step: the velocity in patches; none for a "prepare" graph."""
    weights = constants(model)
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    layers = {node.name for node in products if any(tensor in weights for tensor in node.input)} - map_products(model)
    joined = _joined(model, layers, neighbours(model))
    return tuple(node.output[0] for node in products if node.name in joined and node.op_type != "Conv")


def constants(model: onnx.ModelProto) -> set[str]:
    """Names of the tensors that do not depend on an input."""
    return {tensor.name for tensor in model.graph.initializer} | {
        output for node in model.graph.node if node.op_type == "Constant" for output in node.output
    }


def neighbours(model: onnx.ModelProto) -> dict[str, set[str]]:
    """Product (by name) or output → the products and graph inputs that reach it past cheap operations alone."""
    reach: dict[str, set[str]] = {tensor.name: {tensor.name} for tensor in model.graph.input}
    before: dict[str, set[str]] = {}
    for node in model.graph.node:  # ONNX keeps nodes in topological order
        found: set[str] = set().union(*(reach.get(tensor, set()) for tensor in node.input))
        if node.op_type in PRODUCTS:
            before[node.name] = found
            found = {node.name}
        reach |= dict.fromkeys(node.output, found)
    return before | {tensor.name: reach[tensor.name] for tensor in model.graph.output}


def map_products(model: onnx.ModelProto) -> frozenset[str]:
    """Names of the products of the map, of those that reach the joints of a "prepare" graph, which the map starts from,
    and of those that nothing else precedes, such as what tells the map's layers apart."""
    found = set(map_nodes(model) | reaching(model, {JOINTS}))
    before = neighbours(model)
    products = [node.name for node in model.graph.node if node.op_type in PRODUCTS]
    for name in products:  # in topological order
        if before[name] and before[name] <= found:
            found.add(name)
    return frozenset(found & set(products))


def fixed_products(model: onnx.ModelProto, before: Mapping[str, set[str]]) -> frozenset[str]:
    """Those of ``map_products`` that compute with places, or read the same as one that does, or that an input of the
    graph reaches; in a "prepare" graph, which runs once per person, all."""
    mapped, exact = map_products(model), place_nodes(model)
    if not exact:
        return mapped
    inputs = {tensor.name for tensor in model.graph.input}
    read = {node.input[0] for node in model.graph.node if node.name in exact and node.op_type in PRODUCTS}
    beside = {node.name for node in model.graph.node if read.intersection(node.input)}
    return frozenset(name for name in mapped if name in exact | beside or before[name] & inputs)


def _first(model: onnx.ModelProto, layers: set[str], before: dict[str, set[str]]) -> set[str]:
    """The layers that an input of the graph reaches."""
    inputs = {tensor.name for tensor in model.graph.input}
    return {name for name in layers if before[name] & inputs}


def _joined(model: onnx.ModelProto, layers: set[str], before: dict[str, set[str]]) -> set[str]:
    """The layers whose result meets an input of the graph on the way to the next layer."""
    return {other for name in _first(model, layers, before) for other in before[name]} & layers


def _stem(model: onnx.ModelProto, layers: set[str], mapped: Collection[str]) -> set[str]:
    """The linear layers that no other matrix product precedes, but of the map."""
    behind: set[str] = set()
    found: set[str] = set()
    for node in model.graph.node:
        linear = node.op_type in ("Gemm", "MatMul") and node.name not in mapped
        preceded = bool(behind & set(node.input))
        if linear and not preceded and node.name in layers:
            found.add(node.name)
        if linear or preceded:
            behind |= set(node.output)
    return found


def _rearranged(model: onnx.ModelProto) -> set[str]:
    """The convolutions whose input NNCF would quantize before a Reshape or Transpose: there is nothing else between.

    The Reshapes of a group norm are not of that kind: behind them its scale, and most often an activation, stands.
    """
    moved: set[str] = set()
    found: set[str] = set()
    for node in model.graph.node:
        touched = bool(moved & set(node.input))
        if node.op_type == "Conv" and node.input[0] in moved:
            found.add(node.name)
        if node.op_type in ("Reshape", "Transpose") or (touched and node.op_type in PASSED):
            moved |= set(node.output)
    return found


def _require(found: Iterable[str], rule: str, model: onnx.ModelProto) -> None:
    if not set(found):
        outputs = [tensor.name for tensor in model.graph.output]
        raise ArtifactError(
            f"the graph that makes {outputs} has no {rule}",
            expected="a prepare or frame graph of a student",
            fix="export the student again",
        )
