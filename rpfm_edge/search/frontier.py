"""Quality against speed: one student at several numbers of steps, in every precision, on every backend.

Graphs, bundles and qualities are kept below ``out/work`` and made once; times are taken anew, all engines in turns.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import runtimes
from rpfm_edge.bundle.engines import REFUSALS, built_by, size_bytes
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.chain.build import build
from rpfm_edge.chain.graph import quantize
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.backends import BACKENDS
from rpfm_edge.core.config import without_none
from rpfm_edge.core.errors import BackendError, ConfigError
from rpfm_edge.core.extras import require_module
from rpfm_edge.core.files import write_bytes, write_text
from rpfm_edge.core.flow import latent_shape
from rpfm_edge.core.precisions import CALIBRATED, PRECISIONS, require_backends, require_samples
from rpfm_edge.core.stages import Stages, console
from rpfm_edge.judge.quality import circumstances, drift, images_of
from rpfm_edge.measure import clock
from rpfm_edge.measure.clock import Call, Latency, steady
from rpfm_edge.measure.machine import where
from rpfm_edge.measure.metrics import missing_metrics
from rpfm_edge.people.data import Split, as_seen
from rpfm_edge.people.held_out import Pairs, draw_pairs
from rpfm_edge.people.splits import open_splits
from rpfm_edge.report import plots
from rpfm_edge.report.frontier import markdown, points, psnr, put_in_file
from rpfm_edge.search.candidates import pareto


@dataclass(frozen=True, slots=True)
class Candidate:
    """One engine: a student's graph with its steps unrolled, in a precision, on a backend."""

    steps: int
    precision: str
    backend: str

    @property
    def name(self) -> str:
        """Its name in the work folder."""
        return f"{self.steps}-{self.precision}-{self.backend}"


@dataclass(frozen=True, slots=True)
class _Work:
    """What every stage needs: the student, the data, the draws, and where results are kept."""

    student: Path
    teacher: str
    data: str
    samples: int
    seed: int
    pairs: Pairs
    stages: Stages
    options: Mapping[str, Mapping[str, Any]]

    @property
    def folder(self) -> Path:
        return self.stages.folder


def measure_frontier(
    student: str | Path,
    teacher: str | Path,
    data: str | Path,
    out: str | Path,
    steps: Sequence[int] = (1, 2, 4, 8),
    precisions: Sequence[str] = ("fp32", "fp16", "int8"),
    backends: Sequence[str] = ("openvino", "onnxruntime"),
    pairs: int = 48,
    samples: int = 64,
    runs: int = 30,
    seconds: float = 2.0,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measure every combination, and write ``frontier.json``, ``frontier.md`` and ``frontier.png`` into ``out``.

    The student in eager torch (FP32) stands beside the engines, and the teacher with as many Euler steps, which is
    judged but not timed. A combination that cannot be built or run is a row with the reason.

    Args:
        pairs: held-out pairs; every quality is measured on them, at the same noise.
        samples: calibration samples (INT8, FP8, NVFP4).
        runs: rounds at least; a round times one frame of every engine.
        seconds: of timed frames for each engine, about and on average: how many rounds that takes, the first one says.
        options: of backends, by name.

    Returns:
        the content of ``frontier.json``: ``rows`` (``steps``, ``precision``, ``backend``, ``against_teacher``,
        ``against_truth``, ``frame``, ``engine_bytes``, ``pareto``, or ``reason``), and the circumstances.

    Raises:
        ConfigError: a number or a name that cannot be.
        BackendError: nothing could be measured.
    """
    candidates = _candidates(steps, precisions, backends, options or {})
    if runs < 1:
        raise ConfigError(f"{runs} runs", expected="at least 1", fix="ask for more")
    clock.check_seconds(seconds)
    require_samples(f"{samples} calibration samples", samples, precisions)
    config = artifact.load(shipped.resolve(student), "student").config
    test = as_seen(open_splits(data).test, config.get("fit"))
    drawn = draw_pairs(test, pairs, tuple(config["size"]), latent_shape(config), seed)
    stages = Stages(Path(out) / "work")
    work = _Work(shipped.resolve(student), str(teacher), str(data), samples, seed, drawn, stages, options or {})

    reference = _reference(work)
    rows = [_teacher_row(work, reference, count) for count in sorted(set(steps))]
    bundles, made = _engines(work, reference, candidates)
    if not bundles:
        raise BackendError(made[0]["reason"].rstrip("."), expected="at least one engine that runs", fix="see above")
    times = _times(bundles, test, drawn.sources[0], runs, seconds)
    rows += [{**row, "frame": times[row["name"]].to_json()} if "reason" not in row else row for row in made]
    result = {
        **circumstances(drawn),
        "machine": where(_versions(work, {c.backend for c in bundles})),
        "student": str(student),
        "teacher": str(teacher),
        "data": str(data),
        "seed": seed,
        "samples": samples,
        "rounds": min(len(latency.values_s) for latency in times.values()),
        "rows": _marked(rows),
    }
    _write(Path(out), result)
    return result


def _candidates(
    steps: Sequence[int], precisions: Sequence[str], backends: Sequence[str], options: Mapping[str, Any]
) -> list[Candidate]:
    """Every combination, and eager torch, which runs the float student only."""
    for what, given, known in (("precision", precisions, PRECISIONS), ("backend", backends, sorted(BACKENDS))):
        if unknown := [one for one in given if one not in known]:
            raise ConfigError(f"unknown {what} {unknown[0]!r}", expected=f"one of {known}", fix="check the spelling")
    if not steps or min(steps) < 1:
        raise ConfigError(f"steps {list(steps)}", expected="at least one number, each at least 1", fix="correct them")
    measured = [*dict.fromkeys(backends), "torch"]
    if idle := sorted(set(options) - set(measured)):
        raise ConfigError(
            f"options of {idle[0]!r}, which is not measured", expected=f"one of {measured}", fix="correct the name"
        )
    counts = sorted(set(steps))
    engines = [(p, b) for b in dict.fromkeys(backends) if b != "torch" for p in dict.fromkeys(precisions)]
    return [Candidate(count, *engine) for count in counts for engine in (*engines, ("fp32", "torch"))]


def _reference(work: _Work) -> Path:
    """A file with the teacher's reference images of the pairs."""
    from distill.reference import REFERENCE_SOLVER, REFERENCE_STEPS

    out = work.folder / "reference.npy"

    def make() -> None:
        buffer = io.BytesIO()
        np.save(buffer, _teacher_images(work, REFERENCE_STEPS, REFERENCE_SOLVER))
        write_bytes(out, buffer.getvalue())

    drawn = [work.pairs.names, work.pairs.sources.shape, work.seed, REFERENCE_STEPS, REFERENCE_SOLVER]
    return work.stages.once("reference", drawn, {"teacher": work.teacher, "data": work.data}, out, make)[0]


def _teacher_images(work: _Work, steps: int, solver: str) -> np.ndarray:
    from distill.reference import teacher_images

    images: np.ndarray = teacher_images(work.teacher, *work.pairs.inputs, [(steps, solver)])[steps, solver]
    return images


def _teacher_row(work: _Work, reference: Path, steps: int) -> dict[str, Any]:
    name, inputs = f"{steps}-teacher", {"teacher": work.teacher}
    quality = _quality(work, name, inputs, reference, lambda: _teacher_images(work, steps, "euler"))
    return {"name": name, "steps": steps, "precision": "fp32", "backend": "teacher", **quality}


def _quality(
    work: _Work, name: str, inputs: Mapping[str, str | Path], reference: Path, render: Callable[[], np.ndarray]
) -> dict[str, Any]:
    """Distances of the images that ``render`` makes of the pairs to the reference and to the ground truth."""
    out = work.folder / "quality" / f"{name}.json"

    def make() -> None:
        write_text(out, json.dumps(drift(render(), np.load(reference), work.pairs.truths)))

    # The reference stands for the teacher and the pairs; a metric that has become available is measured.
    stage = work.stages.once(f"quality-{name}", missing_metrics(), {"reference": reference, **inputs}, out, make)
    return dict(json.loads(stage[0].read_text(encoding="utf-8")))


def _engines(
    work: _Work, reference: Path, candidates: Iterable[Candidate]
) -> tuple[dict[Candidate, Path], list[dict[str, Any]]]:
    """Build and judge every candidate; returns the bundles that work, and a row for every candidate."""
    graphs: dict[tuple[int, str], Path] = {}
    bundles, rows = {}, []
    for candidate in candidates:
        row = {"name": candidate.name, **{k: getattr(candidate, k) for k in ("steps", "precision", "backend")}}
        try:
            require_backends(candidate.precision, [candidate.backend])
            key = candidate.steps, candidate.precision
            graphs[key] = graphs.get(key) or _graph(work, *key)
            bundle = _bundle(work, candidate, graphs[key])
            render = partial(images_of, bundle, candidate.backend, work.pairs)
            row |= _quality(work, candidate.name, {"bundle": bundle}, reference, render)
            row["engine_bytes"] = size_bytes(artifact.load(bundle, "bundle", verify=False), candidate.backend)
            bundles[candidate] = bundle
        except (*REFUSALS, ConfigError) as error:  # of one combination, as the choices as a whole were checked before
            console.print(f"{candidate.name}: {error}", markup=False, highlight=False)
            row["reason"] = str(error)
        rows.append(row)
    return bundles, rows


def _bundle(work: _Work, candidate: Candidate, graph: Path) -> Path:
    """A bundle of its own for each candidate, so that one backend that refuses a graph does not fail another."""
    out = work.folder / "bundles" / candidate.name
    backend, options = candidate.backend, dict(work.options.get(candidate.backend, {}))
    compiled = partial(build, graph, out, backend, {backend: options})
    made_by = built_by(backend, options)
    return work.stages.once(f"build-{candidate.name}", made_by, {"graph": graph}, out, compiled)[0]


def _graph(work: _Work, steps: int, precision: str) -> Path:
    """The graph with ``steps`` unrolled; the float one is exported once and the others are made from it."""
    folder, student, data = work.folder / "graphs", work.student, work.data
    out = folder / f"{steps}-{precision}"
    if precision == "fp32":
        export = partial(quantize, student, data, out, "fp32", steps)
        return work.stages.once(f"export-{steps}", steps, {"student": student}, out, export)[0]
    graph, draws = _graph(work, steps, "fp32"), [work.samples, work.seed]
    convert = partial(quantize, graph, data, out, precision, None, *draws)
    config = draws if precision in CALIBRATED else None
    return work.stages.once(f"{precision}-{steps}", config, {"graph": graph, "data": data}, out, convert)[0]


def _times(
    bundles: Mapping[Candidate, Path], test: Split, source: np.ndarray, runs: int, seconds: float
) -> dict[str, Latency]:
    """Times of a frame of every candidate, by name: ``source`` in the pose of the first held-out target."""
    with ExitStack() as opened:
        calls: dict[str, Call] = {}
        for candidate, bundle in bundles.items():
            pipe = opened.enter_context(Pipeline.open(bundle, candidate.backend))
            pose = test.pose(int(test.pairs[0][1]), pipe.size)
            calls[candidate.name] = partial(pipe.render, pipe.prepare(source), pose)
        round_s = sum(latency.p50_s for latency in steady(calls, 1, warmup=1).values())
        rounds = max(runs, math.ceil(seconds * len(calls) / round_s))
        console.print(f"[bold]times[/bold] of {len(calls)} engines, {rounds} rounds in turns")
        return steady(calls, rounds)


def _versions(work: _Work, backends: Iterable[str]) -> dict[str, str]:
    found = ((runtimes.load(one), work.options.get(one)) for one in sorted(backends))
    return {name: version for runtime, options in found for name, version in runtime.versions(options).items()}


def _marked(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with ``pareto``: no other is as fast and, to a tenth of a dB, as close to the teacher, and better in one."""
    timed = [row for row in rows if "frame" in row]
    best = pareto([(row["frame"]["fps"], round(psnr(row), 1)) for row in timed])
    marks = {row["name"]: mark for row, mark in zip(timed, best, strict=True)}
    return [{**row, "pareto": marks.get(row["name"], False)} for row in rows]


def _write(out: Path, result: Mapping[str, Any]) -> None:
    write_text(out / "frontier.json", json.dumps(result, indent=1))
    write_text(out / "frontier.md", markdown(result))
    write_bytes(out / "frontier.png", plots.frontier_png(points(result["rows"])))


def frontier(
    student: str | Path,
    against: str | Path,
    data: str | Path,
    out: str | Path,
    readme: str | Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Quality against speed of a student at several steps, precisions and backends; see ``measure_frontier``.

    Args:
        against: the teacher.
        readme: a text file whose lines between ``<!-- frontier:begin -->`` and ``<!-- frontier:end -->`` become the
            table.
        changes: arguments of ``measure_frontier`` (steps, precisions, backends, pairs, …); None is no change.
    """
    for module, extra in (("torch", "distill"), ("skimage", "validate"), ("matplotlib", "validate")):
        require_module(module, extra)
    if readme is not None:
        put_in_file(Path(readme), None)  # a file without the two markers is refused before anything slow
    result = measure_frontier(student, against, data, out, **without_none(changes))
    if readme is not None:
        put_in_file(Path(readme), result)
    return result
