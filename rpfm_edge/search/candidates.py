"""Candidates of a plan: each built for the target, rendered and judged once; all timed in turns."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import runtimes
from rpfm_edge.bundle.engines import built_by, size_bytes
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.chain.build import build
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.files import json_digest, write_bytes, write_text
from rpfm_edge.core.signature import Feeds
from rpfm_edge.core.stages import Stages
from rpfm_edge.judge.quality import images_of
from rpfm_edge.measure import clock
from rpfm_edge.measure.budget import Budget
from rpfm_edge.measure.clock import steady
from rpfm_edge.measure.metrics import Summary, compare, missing_metrics
from rpfm_edge.people.held_out import Pairs

if TYPE_CHECKING:
    from quantize.mixed import Assignment, Ranges
    from rpfm_edge.core.runtime import LayerTime


EXACT = "fp32"  # the name of the float candidate, which all are compared with
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """How to plan.

    Attributes:
        target: the backend that has to be fast; ``options`` are its own.
        budget: limits on the pictures, against those of the float graph on the same backend.
        samples: calibration samples, of training people.
        pairs: what candidates are judged on, of validation people; ``probes`` of them show the effect of every unit.
        keep: names or patterns of units of the frame that stay float.
        points: candidates at even distances, beside those where passing turns into failing.
        rounds: of timing.
    """

    target: str
    budget: Budget
    samples: int = 64
    pairs: int = 24
    probes: int = 8
    keep: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    points: int = 8
    rounds: int = 40
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Candidates:
    """Makes candidates of the float ``graph`` below the folder of ``stages``, and judges them on ``pairs``."""

    graph: Artifact
    pairs: Pairs
    config: PlanConfig
    stages: Stages

    def exact(self) -> Row:
        """The float graph itself."""
        return self._judged(EXACT, self.graph.path)

    def half(self) -> Row:
        """The graph in FP16."""
        from quantize import apply

        out = self._folder("fp16") / "graph"
        write = partial(apply.quantize, self.graph, "fp16", out)
        self.stages.once("fp16-graph", None, {"graph": self.graph.path}, out, write)
        return self._judged("fp16", out)

    def mixed(self, name: str, assignment: Assignment, ranges: Ranges) -> Row:
        """The graph with these units in INT8."""
        from quantize import mixed

        out = self._folder(name) / "graph"
        settings = {"target": self.config.target, "estimator": assignment.estimator}
        write = partial(mixed.write, self.graph, assignment, ranges, out, settings)
        key = [asdict(assignment), json_digest(ranges)]
        self.stages.once(f"{name}-graph", key, {"graph": self.graph.path}, out, write)
        return self._judged(name, out)

    def _folder(self, name: str) -> Path:
        return self.stages.folder / "candidates" / name

    def _judged(self, name: str, graph: Path) -> Row:
        folder, target, options = self._folder(name), self.config.target, dict(self.config.options)
        made, images = folder / "bundle", folder / "images.npy"
        made_by = [target, built_by(target, options)]
        compiled = partial(build, graph, made, target, {target: options})
        self.stages.once(f"{name}-bundle", made_by, {"graph": graph}, made, compiled)
        render = partial(self._render, made, images)
        self.stages.once(f"{name}-images", [made_by, self.pairs.digest], {"bundle": made}, images, render)
        drift = self._drift(name, images)
        engines = size_bytes(artifact.load(made, "bundle", verify=False), target)
        return {
            "name": name,
            "graph": str(graph),
            "bundle": str(made),
            "against_float": drift,
            "violations": self.config.budget.check(drift),
            "engine_bytes": engines,
        }

    def _render(self, made: Path, out: Path) -> None:
        buffer = io.BytesIO()
        np.save(buffer, images_of(made, self.config.target, self.pairs))
        write_bytes(out, buffer.getvalue())

    def _drift(self, name: str, images: Path) -> Summary:
        """The distances of a candidate's pictures to those of the float graph."""
        reference, out = self._folder(EXACT) / "images.npy", self._folder(name) / "drift.json"

        def make() -> None:
            write_text(out, json.dumps(compare(np.load(reference), np.load(images))))

        inputs: dict[str, str | Path] = {"images": images, "reference": reference}
        self.stages.once(f"{name}-drift", sorted(missing_metrics()), inputs, out, make)
        return dict(json.loads(out.read_text(encoding="utf-8")))

    def frame_times(self, rows: Sequence[Row]) -> dict[str, clock.Latency]:
        """Candidate → times of a frame (engine and copies; drawing the pose is the same for all), in turns."""
        with ExitStack() as opened:
            calls: dict[str, Callable[[], object]] = {}
            for row in rows:
                pipe = opened.enter_context(Pipeline.open(row["bundle"], self.config.target))
                person = pipe.prepare(self.pairs.sources[0])
                calls[row["name"]] = partial(pipe.render_input, person, pipe.pose_input(self.pairs.poses[0]))
            return steady(calls, self.config.rounds, warmup=2)

    def prepare_times(self, rows: Sequence[Row]) -> dict[str, clock.Latency]:
        """Candidate → times of preparing a person, in turns."""
        with ExitStack() as opened:
            calls: dict[str, Callable[[], object]] = {}
            for row in rows:
                pipe = opened.enter_context(Pipeline.open(row["bundle"], self.config.target))
                calls[row["name"]] = partial(pipe.prepare, self.pairs.sources[0])
            return steady(calls, 5, warmup=1)

    def profiles(self, rows: Sequence[Row], graph: str, feeds: Feeds, repeats: int) -> list[list[list[LayerTime]]]:
        """For every candidate its kernels' times in one of its graphs, ``repeats`` times, in turns."""
        runtime = runtimes.load(self.config.target)
        found: list[list[list[LayerTime]]] = [[] for _ in rows]
        for _ in range(repeats):
            for place, row in enumerate(rows):
                made = artifact.load(row["bundle"], "bundle", verify=False)
                engine = made.path / "engines" / self.config.target / graph
                found[place].append(runtime.profile(engine, made.signatures[graph], dict(self.config.options), feeds))
        return found


def pareto(scores: Sequence[tuple[float, float]]) -> list[bool]:
    """For each pair of scores, more being better: whether no other is at least as good in both and better in one."""
    return [not any(x >= a and y >= b and (x > a or y > b) for x, y in scores) for a, b in scores]
