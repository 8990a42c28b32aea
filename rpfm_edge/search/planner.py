"""The fastest precision per layer whose pictures still pass: measured on a device, with people that did not calibrate.

1. Ranges of activations from training people; the estimator with the least error.
2. What each unit of the frame costs in error, alone, and what it saves in time, by the backend's own profile.
3. Candidates: the units that save most per error, more and more of them; each is built, rendered and judged by the
   budget, and the border between passing and failing is bisected.
4. All candidates and the float graphs timed in turns; the fastest that passes is kept.

Everything but the times lies in a work folder and is not made again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import runtimes
from rpfm_edge.bundle.engines import REFUSALS, built_by
from rpfm_edge.chain.graph import check_unrolled, export_float, require_data
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.artifact import EVIDENCE, Artifact
from rpfm_edge.core.backends import BACKENDS, runs_student
from rpfm_edge.core.config import without_none
from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError
from rpfm_edge.core.extras import require_module
from rpfm_edge.core.files import finite, write_text
from rpfm_edge.core.stages import Stages, console
from rpfm_edge.measure.budget import Budget, require_distances
from rpfm_edge.measure.clock import Latency
from rpfm_edge.measure.machine import where
from rpfm_edge.people.data import as_seen
from rpfm_edge.people.held_out import draw_pairs
from rpfm_edge.people.splits import open_splits
from rpfm_edge.report.plan import psnr_db
from rpfm_edge.search.candidates import EXACT, Candidates, PlanConfig, Row, pareto

if TYPE_CHECKING:
    from quantize.sensitivity import Effect
    from quantize.study import Study


BUDGET = Budget(psnr_db_min=43.0, ssim_min=0.985)  # with 41 dB the error of xs against the truth rises by 1.5 %
FRAMES_PER_PERSON = 300  # over which the time of prepare is spread: ten seconds of video
TIE = 0.01  # of the fastest frame: below that times are equal, and the smaller error wins
BISECTIONS, PROFILES = 4, 3


def plan_precision(graph: Artifact, data: str | Path, out: Path, config: PlanConfig) -> dict[str, Any]:
    """Write the fastest form of the float ``graph`` that meets the budget on ``config.target`` to ``out``.

    Returns:
        ``units`` (error, SQNR of the velocity by step, seconds saved, precision), ``frontier`` (candidates: drift from
        the float graph, frame times, violations, whether none is faster and closer), ``chosen``, and the circumstances;
        also kept as ``evidence/plan.json`` of the artifact. If nothing meets the budget, ``chosen`` is None, ``best``
        names the nearest, and nothing is written to ``out``. Either way ``work_folder(out)`` gets ``frontier.json``,
        and ``report.html`` where its libraries are installed. Candidates that could not be made stand in ``refused``
        with the reason; if the time that units save cannot be measured for want of one of them, ``unmeasured`` says
        why.

    Raises:
        ArtifactError: a graph that is quantized already.
        ConfigError: a number or a budget that cannot be, or a pattern that matches no unit.
    """
    from quantize.layers import load
    from quantize.order import ordered
    from quantize.study import Study, StudyConfig, allowed

    _check(graph, config)
    row = BACKENDS[config.target]
    narrowed = StudyConfig(config.samples, config.probes, config.keep, row.fuses_attention, row.biases, config.seed)
    allowed(load(graph.file("frame.onnx")), narrowed)  # a wrong pattern is said now
    stages, splits = Stages(work_folder(out)), open_splits(data)
    size, shape = tuple(graph.config["size"]), graph.config["latent_shape"]
    pairs = draw_pairs(as_seen(splits.validation, graph.config.get("fit")), config.pairs, size, shape, config.seed)
    candidates = Candidates(graph, pairs, config, stages)
    candidates.exact()  # first of all: it shows soon whether the target works here
    study = Study(graph, splits.training, pairs, narrowed, stages)
    effects = study.effects()
    saved_s, unmeasured = _saved_s(study, candidates)
    rows, refused = _explore(study, candidates, ordered(effects, saved_s))
    frontier = _frontier(rows, candidates.frame_times(rows))
    result = _result(config, study, effects, saved_s, frontier)
    result |= {"refused": refused, "unmeasured": unmeasured, "pairs": pairs.names, "data": str(data)}
    if result["chosen"]:  # kept first: what only reports must not lose it
        _keep(next(row for row in rows if row["name"] == result["chosen"]), out, result)
    write_text(stages.folder / "frontier.json", json.dumps(finite(result), indent=1))
    _report(stages.folder / "report.html", result)
    return result


def work_folder(out: Path) -> Path:
    """Where the work on ``out`` is kept."""
    return out.with_name(out.name + ".plan")


def _check(graph: Artifact, config: PlanConfig) -> None:
    if graph.config["precision"] != "fp32":
        raise ArtifactError(
            f"{graph.path} is in {graph.config['precision']} already", expected="an fp32 graph", fix="start from it"
        )
    if min(config.points, config.rounds, config.probes) < 1:
        counts = f"{config.points} points, {config.rounds} rounds and {config.probes} probes"
        raise ConfigError(counts, expected="at least 1 of each", fix="ask for more")
    if config.target in BACKENDS and runs_student(config.target):
        raise ConfigError(
            f"{config.target} runs the float student only", expected="a backend that runs graphs", fix="choose one"
        )
    runtimes.load(config.target)
    require_distances(config.budget)


def _saved_s(study: Study, candidates: Candidates) -> tuple[dict[str, float], str | None]:
    """Unit → seconds that it saves in a frame when it is INT8, by profiles of the float engine and of one all in INT8.

    Without a profile the difference of the two frames is divided by work. Prepare saves its share of every frame. If
    one of the two engines cannot be made, the reason is returned, too, and a unit counts with its share of the work.
    """
    from quantize.study import PREPARE

    names = [*(unit.name for unit in study.units), *([PREPARE] if study.whole else [])]
    refusal: str | None = None
    try:
        rows = [_base(candidates), _mixed(study, candidates, names)]
    except REFUSALS as error:
        console.print(f"{error} So units count by their multiplications.", markup=False, highlight=False)
        rows, refusal = [{**candidates.exact(), "units": []}], str(error)
    out, engines = study.stages.folder / "saved.json", {row["name"]: row["bundle"] for row in rows}

    def measured() -> None:
        found = _spent_s(study, candidates, rows) if refusal else _measured_s(study, candidates, rows)
        write_text(out, json.dumps(found))

    made_by = [names, PROFILES, built_by(candidates.config.target, candidates.config.options)]
    study.stages.once("saved", made_by, engines, out, measured)  # kept: another order would make other candidates
    return dict(json.loads(out.read_text(encoding="utf-8"))), refusal


def _spent_s(study: Study, candidates: Candidates, exact: Sequence[Row]) -> dict[str, float]:
    """Unit → its share, by work, of the seconds that the float graph takes: the most that it could save."""
    from quantize.order import divided_by_work
    from quantize.study import PREPARE

    frame, prepare = candidates.frame_times(exact)[EXACT], candidates.prepare_times(exact)[EXACT]
    spent = divided_by_work(study.models["frame"], study.units, frame.p50_s)
    return spent | {PREPARE: prepare.p50_s / FRAMES_PER_PERSON}


def _base(candidates: Candidates) -> Row:
    """What a unit is in if it is not INT8: FP16 where engines are built from the graph for typed libraries."""
    return candidates.half() if BACKENDS[candidates.config.target].fuses_attention else candidates.exact()


def _measured_s(study: Study, candidates: Candidates, rows: Sequence[Row]) -> dict[str, float]:
    from quantize.order import divided_by_profile, divided_by_work
    from quantize.study import PREPARE

    names = [unit.name for unit in study.units]
    try:
        repeats = candidates.profiles(rows, "frame", study.probes[0], PROFILES)
        exact, rounded = (
            [divided_by_profile(study.units, [(one.names, one.seconds) for one in kernels]) for kernels in found]
            for found in repeats
        )
        saved = {name: _median(exact, name) - _median(rounded, name) for name in names}
    except BackendError as error:
        console.print(f"{error} So the time saved is divided by multiplications.", markup=False, highlight=False)
        saved = divided_by_work(study.models["frame"], study.units, _difference(candidates.frame_times(rows)))
    return saved | {PREPARE: _difference(candidates.prepare_times(rows)) / FRAMES_PER_PERSON}


def _median(found: Sequence[Mapping[str, float]], name: str) -> float:
    return float(np.median([seconds[name] for seconds in found]))


def _difference(times: Mapping[str, Latency]) -> float:
    """By how much the second is faster."""
    first, second = (latency.p50_s for latency in times.values())
    return first - second


def _mixed(study: Study, candidates: Candidates, names: Sequence[str]) -> Row:
    """A candidate named after the number of its INT8 units, which the order of a study makes unambiguous."""
    row = candidates.mixed(f"int8-{len(names)}", study.assignment(names), study.ranges[study.estimator])
    return {**row, "units": list(names)}


def _explore(study: Study, candidates: Candidates, order: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """The float graphs, beginnings of ``order`` at even distances, and some where passing turns into failing.

    What cannot be built or run is returned apart, with the reason.
    """
    from quantize.order import grid

    def first(count: int) -> Row:
        return _attempt(f"int8-{count}", order[:count], partial(_mixed, study, candidates, order[:count]))

    found = {count: first(count) for count in grid(len(order), candidates.config.points)}
    for _ in range(BISECTIONS):
        passing = max((count for count, row in found.items() if not row["violations"]), default=0)
        failing = min((count for count in found if count > passing), default=passing)
        if failing - passing < 2:
            break
        middle = (passing + failing) // 2
        found[middle] = first(middle)
    exact = {**candidates.exact(), "units": []}
    rows = [exact, _attempt("fp16", (), candidates.half), *(found[count] for count in sorted(found))]
    return [row for row in rows if "bundle" in row], [row for row in rows if "bundle" not in row]


def _attempt(name: str, units: Sequence[str], make: Callable[[], Row]) -> Row:
    """A candidate, or why there is none: an activation that FP16 cannot hold, an engine that does not build."""
    try:
        return {**make(), "units": list(units)}
    except REFUSALS as error:
        console.print(f"{name}: {error}", markup=False, highlight=False)
        return {"name": name, "units": list(units), "violations": [str(error)]}


def _frontier(rows: Sequence[Row], times: Mapping[str, Latency]) -> list[Row]:
    """Rows with their times, and whether no other is both faster and, to a tenth of a dB, closer to the float graph."""
    best = pareto([(times[row["name"]].fps, round(psnr_db(row), 1)) for row in rows])
    exact_s = times[EXACT].p50_s
    return [
        {
            **{key: value for key, value in row.items() if key not in ("graph", "bundle")},
            "frame": times[row["name"]].to_json(),
            "speedup": exact_s / times[row["name"]].p50_s,
            "pareto": mark,
        }
        for row, mark in zip(rows, best, strict=True)
    ]


def choose(frontier: Sequence[Row]) -> str | None:
    """The fastest that passes; of those within ``TIE`` of it the one with the smallest error."""
    passing = [row for row in frontier if not row["violations"]]
    if not passing:
        return None
    fastest_s = min(row["frame"]["p50_s"] for row in passing)
    tied = [row for row in passing if row["frame"]["p50_s"] <= (1 + TIE) * fastest_s]
    return str(max(tied, key=psnr_db)["name"])


def _result(
    config: PlanConfig,
    study: Study,
    effects: Sequence[Effect],
    saved_s: Mapping[str, float],
    frontier: Sequence[Row],
) -> dict[str, Any]:
    chosen = choose(frontier)
    best = chosen or max(frontier, key=lambda row: (-len(row["violations"]), psnr_db(row)))["name"]
    kept = next(row["units"] for row in frontier if row["name"] == best)
    rest = study.assignment(()).rest
    precision = rest if kept else best  # fp32 or fp16
    return {
        "target": config.target,
        "options": dict(config.options),
        "budget": {key: value for key, value in asdict(config.budget).items() if value is not None},
        "chosen": chosen,
        "best": best,
        "rest": rest,
        "estimators": study.estimators,
        "estimator": study.estimator,
        "units": [
            {
                **asdict(effect),
                "psnr_db": effect.psnr_db,
                "saved_s": saved_s[effect.name],
                "precision": "int8" if effect.name in kept else precision,
            }
            for effect in effects
        ],
        "frontier": list(frontier),
        "samples": config.samples,
        "seed": config.seed,
        "machine": where(runtimes.load(config.target).versions(dict(config.options))),
    }


def _report(path: Path, result: Mapping[str, Any]) -> None:
    """The page, where what it needs is installed: a plan does not fail for want of it."""
    from rpfm_edge.report.page import write_report

    try:
        write_report(path, {"title": "rpfm-edge plan of precisions", "machine": result["machine"], "plan": result})
    except BackendError as error:
        console.print(f"No report: {error}", markup=False, highlight=False)


def _keep(row: Row, out: Path, result: Mapping[str, Any]) -> None:
    """Copy the chosen graph to ``out``, with the study as its evidence."""
    source = artifact.load(row["graph"], "graph")
    with artifact.replacing_folder(out, "graph") as folder:
        for name in source.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, folder / name)
        write_text(folder / EVIDENCE / "plan.json", json.dumps(finite(result), indent=1))
        artifact.seal(folder, "graph", source.config, source.signatures, source.lineage)


def plan(
    student: str | Path,
    data: str | Path | None,
    out: str | Path,
    target: str,
    budget: str | Path | Mapping[str, float] | None = None,
    steps: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **numbers: Any,
) -> dict[str, Any]:
    """Export a student (or take a float graph) and write the fastest precision per layer that meets a budget.

    Args:
        target: the backend that has to be fast, here, on this machine; ``options`` are per backend, as for ``build``.
        budget: a TOML file with a table [drift], or that table: limits against the float graph. Default:
            ``planner.BUDGET``.
        numbers: further fields of ``candidates.PlanConfig``.

    Returns:
        what ``planner.plan_precision`` returns. Work is kept in ``out.plan``, and continued from there.
    """
    require_module("onnxruntime", "quantize")
    artifact.require_free(out, "graph")
    limits = _budget(budget) if budget else BUDGET
    source, out = shipped.resolve(student), Path(out)
    kind = artifact.load(source, "student", "graph").kind
    check_unrolled(steps, kind)
    if not target or set(options or {}) - {target}:
        problem = f"options of {sorted(set(options) - {target})[0]!r}" if target and options else "no target"
        raise ConfigError(f"{problem} for a plan", expected="one target, and its options", fix="give --target")
    data = require_data(data, "int8")
    config = PlanConfig(target, limits, options=dict((options or {}).get(target, {})), **without_none(numbers))
    if kind == "student":
        stages, graph = Stages(work_folder(out)), work_folder(out) / "float"
        stages.once("export", steps, {"student": source}, graph, lambda: export_float(source, graph, steps))
        source = graph
    return plan_precision(artifact.load(source, "graph"), data, out, config)


def _budget(given: str | Path | Mapping[str, float]) -> Budget:
    return Budget.from_dict(given) if isinstance(given, Mapping) else Budget.load(Path(given))
