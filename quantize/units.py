"""What a planner may quantize by itself: the products of a graph, grouped over the unrolled steps and named by place.

A product is a Conv, Gemm or MatMul (``quantize.layers``). Products that share a weight, as the steps of a frame do, are
one unit, and so are layers that read the same activation and the attention products at one place of every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import prod

import onnx

from quantize.layers import PRODUCTS, constants, fixed_products, map_products, neighbours
from rpfm_edge.core.errors import ArtifactError, ConfigError


@dataclass(frozen=True, slots=True)
class Unit:
    """``name``: such as ``encoder.conv1``, ``block0.qkv`` or ``block0.qk``; ``products``: the names of its nodes.

    ``attention``: it has no weights. ``quantizable``: it does not compute with places, which stay in FP32.
    """

    name: str
    products: tuple[str, ...]
    attention: bool = False
    quantizable: bool = True


def units(model: onnx.ModelProto) -> tuple[Unit, ...]:
    """The units of a "prepare" or "frame" graph, in the order of their first product.

    Names say the place. Convolutions before the first block are ``encoder.convN``, those behind it ``decoder.convN``.
    ``blockB`` holds what makes queries, keys and values (``qkv``), the two attention products (``qk``, ``av``) and the
    linears behind them (``linearN``); linears before the first block are ``embed.linearN``. The attention of a foreign
    autoencoder is a block, too. The map and what finds joints (``layers.map_products``) are ``align.convN`` and
    ``align.linearN``.

    Raises:
        ArtifactError: no attention, so that the graph is none of a student's.
    """
    weights, before, mapped = constants(model), neighbours(model), map_products(model)
    fixed = fixed_products(model, before)
    nodes = {node.name: node for node in model.graph.node if node.op_type in PRODUCTS}
    weight = {
        name: next((tensor for tensor in node.input[:2] if tensor in weights), "") for name, node in nodes.items()
    }
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, node in nodes.items():
        key = (weight[name],) if weight[name] else (name,) if name in mapped else _attention(node, before[name], weight)
        groups.setdefault(key, []).append(name)
    if not any(len(key) > 1 for key in groups):
        raise ArtifactError("the graph has no attention", expected="a student's graph", fix="export it again")
    names = _names(groups, nodes, mapped)
    made = [
        Unit(names[key], tuple(members), len(key) > 1, fixed.isdisjoint(members)) for key, members in groups.items()
    ]
    return _joined(made, nodes)


def _joined(found: Sequence[Unit], nodes: Mapping[str, onnx.NodeProto]) -> tuple[Unit, ...]:
    """Units that read the same activation as one, named after the first.

    The error of rounding it is the same in both and cancels in part where their results meet, as those of the decoder's
    two paths from the latent do; with only one of them in INT8 the picture is worse than with both.
    """
    owner: dict[str, int] = {}  # activation → place of the unit that reads it first
    members: dict[int, Unit] = {}
    for place, unit in enumerate(found):
        read = {nodes[product].input[0] for product in unit.products}
        first = min((owner[tensor] for tensor in read if tensor in owner), default=place)
        owner |= {tensor: first for tensor in read if tensor not in owner}
        if first == place or unit.attention:
            members[place] = unit
        else:
            products, both = (*members[first].products, *unit.products), members[first].quantizable and unit.quantizable
            members[first] = replace(members[first], products=products, quantizable=both)
    return tuple(members.values())


def _attention(node: onnx.NodeProto, before: Collection[str], weight: Mapping[str, str]) -> tuple[str, ...]:
    """What tells an attention product from others, but not from itself in another step: role, and weights before it."""
    role = "av" if any(name in weight and not weight[name] for name in before) else "qk"
    return (role, *sorted({weight[name] for name in before if weight.get(name)}))


def _names(
    groups: Mapping[tuple[str, ...], list[str]],
    nodes: Mapping[str, onnx.NodeProto],
    mapped: Collection[str],
) -> dict[tuple[str, ...], str]:
    """Group → name, by what stands before it in the graph and what it feeds."""
    feeds: dict[str, int] = {}  # weight → the block whose attention it feeds
    blocks = 0
    for role, *feeding in (key for key in groups if len(key) > 1):
        blocks += role == "qk"
        feeds |= {weight: blocks - 1 for weight in feeding if weight not in feeds}
    block, found, taken = -1, {}, Counter[str]()
    for key, members in groups.items():
        if len(key) > 1:
            block += key[0] == "qk"
            name = f"block{block}.{key[0]}"
        elif key[0] in feeds and nodes[members[0]].op_type != "Conv":
            name = f"block{feeds[key[0]]}.qkv"
        else:
            conv = nodes[members[0]].op_type == "Conv"
            stage = ("encoder" if block < 0 else "decoder") if conv else "embed" if block < 0 else f"block{block}"
            stage = "align" if members[0] in mapped else stage
            name = f"{stage}.{'conv' if conv else 'linear'}"
        taken[name] += 1
        numbered = name.endswith((".conv", ".linear")) or taken[name] > 1
        found[key] = f"{name}{taken[name] - 1}" if numbered else name
    return found


def chosen(found: Iterable[Unit], names: Collection[str]) -> set[str]:
    """The products of the units with these names."""
    return {product for unit in found if unit.name in names for product in unit.products}


def matching(names: Collection[str], patterns: Iterable[str]) -> set[str]:
    """The names that match one of ``patterns`` (``block*.qk``); ``ConfigError`` for a pattern that matches none."""
    result: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            nearest = ", ".join(get_close_matches(pattern, names, 3, 0.0))
            raise ConfigError(
                f"{pattern!r} matches no layer",
                expected=f"a name or pattern of one of the {len(names)}, such as {nearest}",
                fix="check the spelling",
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
