"""A graph artifact with some units in INT8 and the rest in float, by ``qdq.insert``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfile
from typing import Any, Literal

import onnx

from quantize.apply import FLOAT_ONLY, GRAPHS, TOOLS
from quantize.layers import load
from quantize.qdq import insert
from quantize.ranges import Estimator
from quantize.typed import FOLDER as TYPED
from quantize.typed import to_typed
from quantize.units import Unit, chosen, units
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact, Stage, tool_versions
from rpfm_edge.core.errors import ConfigError

Ranges = Mapping[str, Mapping[str, float]]  # graph → activation → magnitude of the last level


@dataclass(frozen=True, slots=True)
class Assignment:
    """Names of the INT8 units by graph, and how they are rounded (``qdq.insert``, ``ranges.Observed.range``).

    ``rest`` is what the target makes of the other units: FP16 where it builds from the graph for typed libraries.
    """

    int8: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    estimator: Estimator = "mse"
    weights: Literal["half", "full"] = "half"
    activations: Literal["signed", "unsigned"] = "signed"
    biases: Literal["float", "int32"] = "float"
    rest: Literal["fp32", "fp16"] = "fp32"

    def precisions(self, graph: str, found: Sequence[Unit]) -> dict[str, str]:
        """Unit → "int8", ``rest``, or "fp32" for the map; ``ConfigError`` where that is to be INT8."""
        wanted = self.int8.get(graph, ())
        if fixed := next((unit.name for unit in found if unit.name in wanted and not unit.quantizable), None):
            raise ConfigError(
                f"{fixed} of graph {graph} in int8", expected="the map in fp32", fix="leave the align units out"
            )
        rest = {unit.name: self.rest if unit.quantizable else "fp32" for unit in found}
        return {name: "int8" if name in wanted else precision for name, precision in rest.items()}


def write(graph: Artifact, assignment: Assignment, ranges: Ranges, out: Path, settings: Mapping[str, Any]) -> Artifact:
    """Write the float ``graph`` with ``assignment`` to ``out``, and the same for strongly typed libraries beside it.

    ``config`` then holds ``plan``: graph → unit → precision. ``settings`` go into the lineage.
    """
    plan, counts = {}, {}
    with artifact.replacing_folder(out, "graph") as folder:
        for name in GRAPHS:
            model = load(graph.file(f"{name}.onnx"))
            found = units(model)
            products = chosen(found, assignment.int8.get(name, ()))
            kinds = Counter(node.op_type for node in model.graph.node if node.name in products)
            plan[name] = assignment.precisions(name, found)
            counts[name] = dict(sorted(kinds.items()))
            mixed = insert(model, products, ranges[name], assignment.weights, assignment.activations, assignment.biases)
            onnx.save(mixed, folder / f"{name}.onnx")
            if assignment.activations == "signed":
                (folder / TYPED).mkdir(exist_ok=True)
                onnx.save(to_typed(mixed), folder / TYPED / f"{name}.onnx")
        copyfile(graph.file("noise.npy"), folder / "noise.npy")
        config = {key: value for key, value in graph.config.items() if key not in FLOAT_ONLY}
        config |= {"precision": "int8", "int8_layers": counts, "plan": plan}
        stage = Stage("quantize", {"precision": "auto", **settings}, tool_versions(*TOOLS), {"graph": graph.digest})
        artifact.seal(folder, "graph", config, graph.signatures, (*graph.lineage, stage))
    return artifact.load(out, "graph")
