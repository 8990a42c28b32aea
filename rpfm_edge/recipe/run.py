"""A recipe from teacher to report. A stage is run again only if its config or one of its inputs changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rpfm_edge.bundle.engines import built_by
from rpfm_edge.chain.build import build
from rpfm_edge.chain.graph import quantize
from rpfm_edge.chain.train import distill, fine_tune, train
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import EVIDENCE
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.extras import require_module
from rpfm_edge.core.files import json_digest
from rpfm_edge.core.stages import Stages, identity
from rpfm_edge.judge.gain import GainConfig, measure_gain
from rpfm_edge.measure.joints import missing_pose
from rpfm_edge.measure.metrics import missing_metrics
from rpfm_edge.recipe.evidence import judge, keep_evidence, render_picture
from rpfm_edge.recipe.load import load_recipe
from rpfm_edge.recipe.page import write_page
from rpfm_edge.recipe.schema import Recipe
from rpfm_edge.search.frontier import measure_frontier
from rpfm_edge.search.planner import plan


def run_recipe(path: Path) -> dict[str, Any]:
    """Run the recipe at ``path``; returns the paths of bundle, report and picture, and the violations of the budget."""
    recipe = load_recipe(path)
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(out)
    teacher = _teacher(recipe, stages)
    students = _students(recipe, stages, teacher)
    _gain(recipe, stages, teacher, students)
    student = recipe.student.artifact or str(students[recipe.student.from_ or list(students)[-1]])
    student = _fine_tune(recipe, stages, student)
    graphs = _quantize(recipe, stages, student)
    bundles = {precision: _build(recipe, stages, precision, graph) for precision, graph in graphs.items()}
    _frontier(recipe, stages, teacher, student)

    evidence, pictures, config = out / "evidence.json", out / "pictures", asdict(recipe)
    inputs: dict[str, str | Path] = {"teacher": teacher, "student": student, **bundles}
    judged = {k: config[k] for k in ("data", "seed", "validate", "bench", "quantize", "build")}
    judged |= {"missing": _missing(), "built_by": _built_by(recipe)}
    take = partial(judge, recipe, teacher, student, bundles, evidence)
    stages.once("evidence", judged, inputs, evidence, take, also=[pictures])
    found = json.loads(evidence.read_text(encoding="utf-8"))
    picture, bundle = out / "render.png", out / "bundle"
    own = artifact.load(bundle, "bundle", verify=False)  # one made again, with the same content, has lost its evidence
    keep_evidence(own, found, recipe.quantize.precision, missing_only=True)

    shown = {"bundle": bundle, "data": recipe.data} | {k: v for k, v in config["render"].items() if v}
    stages.once("render", config["render"], shown, picture, lambda: render_picture(recipe, bundle, picture))
    sources: dict[str, str | Path] = {"evidence": evidence, "picture": picture}
    sources |= {"gain": out / "gain.json", "frontier": out / "frontier" / "frontier.json"}
    page, numbers = out / "report.html", out / "report.json"
    write = partial(write_page, recipe, path, teacher, student, students, page)
    stages.once("report", config, sources, page, write, also=[numbers])
    return {
        "bundle": str(bundle),
        "report": str(page),
        "report_json": str(numbers),
        "picture": str(picture),
        "violations": found["violations"],
    }


def _teacher(recipe: Recipe, stages: Stages) -> str | Path:
    if recipe.teacher.artifact:
        return recipe.teacher.artifact
    fields = {k: v for k, v in asdict(recipe.teacher).items() if k not in ("artifact", "preset")}
    out, cache = stages.folder / "teacher", str(stages.folder / "cache")
    stages.once(
        "teacher",
        [asdict(recipe.teacher), recipe.seed],
        {"data": recipe.data},
        out,
        lambda: train(recipe.teacher.preset, recipe.data, out, seed=recipe.seed, cache=cache, **fields),
        tools=(),
    )
    return out


def _students(recipe: Recipe, stages: Stages, teacher: str | Path) -> dict[str, Path]:
    """Name → student, each distilled from the one store of the recipe."""
    made: dict[str, Path] = {}
    if not recipe.distill:
        return made
    folder, store = stages.folder, asdict(recipe.store)
    paths = [identity(teacher), identity(recipe.data), recipe.seed, recipe.store.targets_per_source]
    shared = {
        "store": str(stages.keep("store", json_digest(paths), folder / "store")),
        "cache": str(folder / "cache"),
        "trajectories": recipe.store.trajectories,
        "store_seconds": recipe.store.seconds,
        "targets_per_source": recipe.store.targets_per_source,
    }
    for name, table in recipe.students.items():
        fields = {k: v for k, v in asdict(table).items() if k not in ("name", "init")}
        init = made.get(table.init, table.init) if table.init else None
        inputs = {"teacher": teacher, "data": recipe.data, **({"init": init} if init else {})}
        out = folder / "students" / name
        fields |= {"init": str(init) if init else None, **shared}
        make = partial(distill, teacher, recipe.data, out, seed=recipe.seed, **fields)
        made[name] = out
        stages.once(f"distill-{name}", [asdict(table), store, recipe.seed], inputs, out, make, tools=())
    return made


def _fine_tune(recipe: Recipe, stages: Stages, student: str) -> str:
    """The student that goes on, after quantization-aware distillation where the recipe asks for it."""
    if recipe.qad is None:
        return student
    out, fields = stages.folder / "qad", asdict(recipe.qad)
    fields["steps"] = fields["steps"] or recipe.student.steps
    make = partial(fine_tune, student, recipe.data, out, seed=recipe.seed, **fields)
    stages.once("qad", [fields, recipe.seed], {"student": student, "data": recipe.data}, out, make, tools=())
    return str(out)


def _quantize(recipe: Recipe, stages: Stages, student: str) -> dict[str, Path]:
    """Precision → graph; the float graph is exported once and the others are made from it."""
    folder, steps, seed = stages.folder / "graphs", recipe.student.steps, recipe.seed
    samples, fp32 = recipe.quantize.samples, folder / "fp32"
    stages.once(
        "export", steps, {"student": student}, fp32, lambda: quantize(student, recipe.data, fp32, "fp32", steps)
    )
    graphs: dict[str, Path] = {}
    asked = {"method": recipe.quantize.method, "least_psnr_db": recipe.quantize.least_psnr_db}
    for precision in dict.fromkeys((*recipe.quantize.also, recipe.quantize.precision)):
        out = folder / precision
        if precision == "auto":
            _plan(recipe, stages, fp32, out)
        elif precision != "fp32":
            way = asked if precision == "int8" and asked["method"] != "ptq" else {}
            stages.once(
                precision,
                [samples, seed, *way.values()],
                {"graph": fp32, "data": recipe.data},
                out,
                lambda out=out, precision=precision, way=way: quantize(
                    fp32, recipe.data, out, precision, None, samples, seed, **way
                ),  # type: ignore[misc]
            )
        graphs[precision] = out
    return graphs


def _plan(recipe: Recipe, stages: Stages, graph: Path, out: Path) -> None:
    """The fastest precision per layer on the first target."""
    target, table, seed = recipe.build.targets[0], recipe.quantize, recipe.seed
    options: dict[str, dict[str, Any]] = {target: recipe.build.options_of(target)}

    def make() -> None:
        found = plan(graph, recipe.data, out, target, table.budget, None, options, samples=table.samples, seed=seed)
        if not found["chosen"]:
            raise ConfigError(
                f"no precision meets the budget of [quantize] ({found['best']} is the nearest)",
                expected="limits that the float graph meets",
                fix=f"see {out}.plan/report.html",
            )

    made_by = built_by(target, options[target])
    config = [target, made_by, dict(table.budget), table.samples, seed]
    stages.once("auto", config, {"graph": graph, "data": recipe.data}, out, make, also=[out / EVIDENCE / "plan.json"])


def _build(recipe: Recipe, stages: Stages, precision: str, graph: Path) -> Path:
    chosen = precision == recipe.quantize.precision
    out = stages.folder / "bundle" if chosen else stages.folder / "bundles" / precision
    options: dict[str, dict[str, Any]] = {name: recipe.build.options_of(name) for name in recipe.build.targets}
    targets = list(recipe.build.targets)
    made_by = [targets, _built_by(recipe)]
    compiled = partial(build, graph, out, targets, options)
    stages.once(f"build-{precision}", made_by, {"graph": graph}, out, compiled)
    return out


def _built_by(recipe: Recipe) -> dict[str, Any]:
    """Target → what its engines and their speed depend on."""
    return {target: built_by(target, recipe.build.options_of(target)) for target in recipe.build.targets}


def _missing() -> list[str]:
    """The measures that cannot be taken here; once they can, the evidence is taken again."""
    return [*sorted(missing_metrics()), *(["pck"] if missing_pose() else [])]


def _gain(recipe: Recipe, stages: Stages, teacher: str | Path, students: Mapping[str, Path]) -> None:
    """``gain.json``: what the students distilled here gained and lost."""
    if not students:
        return
    out, config = stages.folder / "gain.json", GainConfig(pairs=recipe.validate.pairs, seed=recipe.seed)
    stages.once(
        "gain",
        [asdict(config), recipe.data, sorted(missing_metrics())],
        {"teacher": teacher, **students},
        out,
        lambda: measure_gain(teacher, students, recipe.data, out, config),
    )


def _frontier(recipe: Recipe, stages: Stages, teacher: str | Path, student: str) -> None:
    """``frontier/``: quality against speed, where the recipe asks for it."""
    if recipe.frontier is None:
        return
    out, bench = stages.folder / "frontier", asdict(recipe.bench)
    targets = recipe.build.targets
    options = {name: recipe.build.options_of(name) for name in targets}
    config = {**asdict(recipe.frontier), "backends": targets, "options": options, "seed": recipe.seed, **bench}
    stages.once(
        "frontier",
        [config, recipe.data, _built_by(recipe)],
        {"teacher": teacher, "student": student},
        out / "frontier.json",
        lambda: measure_frontier(student, teacher, recipe.data, out, **config),
        also=[out / "frontier.md", out / "frontier.png"],
    )


def run(recipe: str | Path) -> dict[str, Any]:
    """Run a recipe from teacher to report; stages whose inputs and config did not change are not run again."""
    for module in ("matplotlib", "jinja2"):  # of the page, which comes last
        require_module(module, "validate")
    return run_recipe(Path(recipe))
