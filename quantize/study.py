"""What a plan of precisions stands on: ranges of activations, the best way to read them, and every unit's own error."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import onnx

from quantize import calibrate
from quantize.execute import Graph
from quantize.layers import load
from quantize.mixed import Assignment
from quantize.order import default_units
from quantize.qdq import insert, never_negative
from quantize.ranges import Estimator, observe
from quantize.sensitivity import Effect, Probe, sensitivity
from quantize.units import Unit, chosen, matching, units
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.files import json_digest, write_text
from rpfm_edge.core.signature import Feeds
from rpfm_edge.core.stages import Stages
from rpfm_edge.people.data import Split
from rpfm_edge.people.pose import passed, pose_input, pose_kind, prepare_feeds

if TYPE_CHECKING:
    from rpfm_edge.people.held_out import Pairs


PREPARE = "prepare"  # the whole of that graph stands among the units of the frame under this name


@dataclass(frozen=True, slots=True)
class StudyConfig:
    """``samples`` calibrate, ``probes`` pairs show errors; ``keep``: patterns of units of the frame that stay float.

    ``fused``: the target fuses attention in float and takes signed activations only, as TensorRT does.
    ``biases``: of linear layers, see ``qdq.insert``.
    """

    samples: int = 64
    probes: int = 8
    keep: tuple[str, ...] = ()
    fused: bool = False
    biases: Literal["float", "int32"] = "float"
    seed: int = 0


class Study:
    """The numbers behind a plan for a float graph; what takes long is kept in the folder of ``stages``.

    Attributes:
        units: those of the frame that may become INT8; ``whole``: whether the prepare graph may.
        ranges: estimator → graph → activation → magnitude of the last level, over the calibration samples.
        estimators: estimator → mean squared error of the picture, in grey levels, with all units in INT8.
        estimator: the one with the least error.
        probes: feeds of the frame, prepared in float.
    """

    def __init__(self, graph: Artifact, calibration: Split, pairs: Pairs, config: StudyConfig, stages: Stages) -> None:
        self.graph, self.config, self.stages = graph, config, stages
        self.models = {name: load(graph.file(f"{name}.onnx")) for name in ("prepare", "frame")}
        self.units, self.whole = allowed(self.models["frame"], config)
        self.activations: Literal["signed", "unsigned"] = "signed" if config.fused else "unsigned"
        self.ranges = self._ranges(calibration)
        self._pairs = pairs
        self.probes = self._feeds(self.models["prepare"])
        self._probe = Probe(self.models["frame"], self.probes)
        self.estimators = {name: self._error(name) for name in self.ranges}
        self.estimator: Estimator = min(self.estimators, key=self.estimators.__getitem__)

    def assignment(self, names: Sequence[str]) -> Assignment:
        """These units in INT8, the usual ones of the prepare graph among them if ``PREPARE`` is there."""
        prepare = default_units(self.models["prepare"]) if PREPARE in names else ()
        frame = tuple(sorted(name for name in names if name != PREPARE))
        int8 = {"frame": frame, "prepare": prepare}
        rest: Literal["fp32", "fp16"] = "fp16" if self.config.fused else "fp32"
        return Assignment(int8, self.estimator, "half", self.activations, self.config.biases, rest)

    def effects(self) -> list[Effect]:
        """The error of every unit of the frame by itself, and of the prepare graph as a whole."""
        drawn = [self._pairs.digest, len(self.probes), self.ranges[self.estimator], self.activations]
        work = self.stages.keep("sensitivity", json_digest([self.graph.digest, drawn]), self.stages.folder / "effects")
        ranges = self.ranges[self.estimator]
        found = sensitivity(self._probe, self.units, ranges["frame"], self.activations, work / "units.json")
        if not self.whole:
            return found
        prepare, names = self.models["prepare"], self.assignment([PREPARE]).int8["prepare"]
        rounded = insert(prepare, chosen(units(prepare), names), ranges["prepare"], activations=self.activations)
        whole = self._probe.effect(PREPARE, (), ranges["frame"], self.activations, self._feeds(rounded))
        return [*found, whole]

    def _ranges(self, calibration: Split) -> dict[Estimator, dict[str, dict[str, float]]]:
        samples, out = self.stages.folder / "samples.safetensors", self.stages.folder / "ranges.json"
        drawn = [self.config.samples, self.config.seed]
        inputs: dict[str, str | Path] = {"graph": self.graph.path, "data": calibration.root}
        self.stages.once(
            "samples", drawn, inputs, samples, lambda: calibrate.record(self.graph, calibration, samples, *drawn)
        )
        self.stages.once("ranges", self.activations, {"samples": samples}, out, lambda: self._observe(samples, out))
        return dict(json.loads(out.read_text(encoding="utf-8")))

    def _observe(self, samples: Path, out: Path) -> None:
        recorded = calibrate.load(samples)
        recorded.check(self.graph)
        found: dict[str, dict[str, dict[str, float]]] = {}
        for name, model in self.models.items():
            feeds = list(recorded.feeds(name))
            wide = never_negative(model) if self.activations == "unsigned" else frozenset()
            seen = observe(model, feeds, len(feeds))
            for estimator in get_args(Estimator):
                levels = {tensor: 255 if tensor in wide else 127 for tensor in seen}
                ranges = {tensor: one.range(estimator, levels[tensor]) for tensor, one in seen.items()}
                found.setdefault(estimator, {})[name] = ranges
        write_text(out, json.dumps(found))

    def _feeds(self, prepare: onnx.ModelProto) -> list[Feeds]:
        graph, pairs = Graph(prepare), self._pairs
        before, boundary = (self.graph.signatures[name] for name in ("prepare", "frame"))
        kind, size = pose_kind(boundary.input("pose")), (pairs.sources.shape[1], pairs.sources.shape[2])
        return [
            {
                "pose": pose_input(pairs.poses[i], kind, size),
                "noise": pairs.noise[i : i + 1],
                **passed(boundary, graph.named(prepare_feeds(before, pairs.sources[i]))),
            }
            for i in range(min(self.config.probes, len(pairs.names)))
        ]

    def _error(self, estimator: Estimator) -> float:
        products = chosen(self.units, [unit.name for unit in self.units])
        return self._probe.effect("", products, self.ranges[estimator]["frame"], self.activations).mse


def allowed(frame: onnx.ModelProto, config: StudyConfig) -> tuple[tuple[Unit, ...], bool]:
    """The units that may become INT8, and whether the prepare graph may."""
    found = units(frame)
    kept = matching([*(unit.name for unit in found), PREPARE], config.keep)
    free = (unit for unit in found if unit.quantizable and unit.name not in kept)
    return tuple(unit for unit in free if not (config.fused and unit.attention)), PREPARE not in kept
