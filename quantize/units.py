"""What a planner may quantize by itself: the products of a graph, grouped over the unrolled steps and named by place.

A product is a Conv, Gemm or MatMul (``quantize.layers``). Products that share a weight, as the steps of a frame do, are
one unit, and so are the attention products at the same place of every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import onnx

from quantize.layers import PRODUCTS, constants, neighbours
from rpfm_edge.errors import ArtifactError, ConfigError

ATTENTION = ("qk", "av")  # names of the products without weights: queries and keys, attention and values


@dataclass(frozen=True, slots=True)
class Unit:
    """``name``: such as ``encoder.conv1``, ``block0.qkv`` or ``block0.qk``; ``products``: the names of its nodes."""

    name: str
    products: tuple[str, ...]

    @property
    def attention(self) -> bool:
        """Whether it has no weights."""
        return self.name.rpartition(".")[2] in ATTENTION


def units(model: onnx.ModelProto) -> tuple[Unit, ...]:
    """The units of a "prepare" or "frame" graph, in the order of their first product.

    Names say the place. Convolutions before the first block are ``encoder.convN``, those behind the last one
    ``decoder.convN``. ``blockB`` holds what makes queries, keys and values (``qkv``), the two attention products
    (``qk``, ``av``) and the linears behind them (``linearN``); linears before the first block are ``embed.linearN``.

    Raises:
        ArtifactError: the steps are not alike, so that the graph is none of a student's.
    """
    weights = constants(model)
    nodes = [node for node in model.graph.node if node.op_type in PRODUCTS]
    shared = [next((tensor for tensor in node.input[:2] if tensor in weights), None) for node in nodes]
    attention = [node.name for node, weight in zip(nodes, shared, strict=True) if weight is None]
    steps = max(Counter(weight for weight in shared if weight).values(), default=1)
    if not attention or len(attention) % (2 * steps):
        raise ArtifactError(
            f"the graph has {len(attention)} attention products in {steps} steps",
            expected="two for every block of every step",
            fix="export the student again",
        )
    places = {name: place % (len(attention) // steps) for place, name in enumerate(attention)}
    groups: dict[str, list[str]] = {}
    for node, weight in zip(nodes, shared, strict=True):
        groups.setdefault(weight or f"attention {places[node.name]}", []).append(node.name)
    names = _names(model, [members[0] for members in groups.values()], places)
    return tuple(Unit(names[members[0]], tuple(members)) for members in groups.values())


def _names(model: onnx.ModelProto, firsts: list[str], places: Mapping[str, int]) -> dict[str, str]:
    """First product of a unit → its name."""
    before, kinds = neighbours(model), {node.name: node.op_type for node in model.graph.node}
    feeding = {
        other: place // 2 for name, place in places.items() for other in before[name] if other not in places
    }  # what makes queries, keys and values → block
    blocks = len(set(places.values())) // 2
    block, found = -1, {}
    taken: Counter[str] = Counter()
    for name in firsts:
        if name in places:
            block = places[name] // 2
            found[name] = f"block{block}.{ATTENTION[places[name] % 2]}"
            continue
        conv = kinds[name] == "Conv"
        if not conv and name in feeding:
            found[name] = f"block{feeding[name]}.qkv"
            continue
        stage = ("decoder" if block == blocks - 1 else "encoder") if conv else "embed" if block < 0 else f"block{block}"
        taken[stage] += 1
        found[name] = f"{stage}.{'conv' if conv else 'linear'}{taken[stage] - 1}"
    if len(set(found.values())) != len(found):  # several linears make what an attention takes
        found = {name: f"{title}.{place}" for place, (name, title) in enumerate(found.items())}
    return found


def chosen(found: Iterable[Unit], names: Collection[str]) -> set[str]:
    """The products of the units with these names."""
    return {product for unit in found if unit.name in names for product in unit.products}


def matching(found: Iterable[Unit], patterns: Iterable[str]) -> set[str]:
    """Names of the units that match one of ``patterns`` (``block*.qk``); ``ConfigError`` for one that matches none."""
    names, result = [unit.name for unit in found], set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise ConfigError(
                f"{pattern!r} matches no layer", expected=f"a name or pattern of {names}", fix="check the spelling"
            )
        result |= hits
    return result


def multiplications(model: onnx.ModelProto) -> dict[str, int]:
    """Product → multiplications in one run: elements of the output × length of the sums. Shapes must be static."""
    shapes = _shapes(model)
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    counts = {}
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            output = prod(shapes[node.output[0]])
            if node.op_type == "Conv":
                counts[node.name] = output * prod(weights[node.input[1]][1:])
            else:
                transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
                left = weights.get(node.input[0]) or shapes[node.input[0]]
                counts[node.name] = output * left[-2 if transposed else -1]
    return counts


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
    }
