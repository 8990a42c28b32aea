"""A recipe from teacher to report. A stage is run again only if its config or one of its inputs changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rpfm_edge import api, artifact, assets
from rpfm_edge.artifact import file_digest, json_digest, tool_versions, write_text
from rpfm_edge.errors import ArtifactError
from rpfm_edge.evidence import compare_steps, judge, render_picture, write_page
from rpfm_edge.recipe import Recipe, load_recipe

console = Console(stderr=True)
LIBRARIES = ("torch", "onnx", "onnxsim", "onnxruntime", "nncf", "openvino")


@dataclass(frozen=True, slots=True)
class Stages:
    """Where results and their records lie; ``once`` is the whole of the resuming."""

    folder: Path

    def once(
        self, name: str, config: Any, inputs: Mapping[str, str | Path], out: Path, make: Callable[[], Any]
    ) -> tuple[Path, bool]:
        """Run ``make``, which writes ``out``, unless the record says that this very thing was made.

        Returns ``out`` and whether it is fresh.
        """
        record = self.folder / "stages" / f"{name}.json"
        key = json_digest(
            {
                "config": config,
                "tools": tool_versions(*LIBRARIES),
                "inputs": {k: identity(v) for k, v in inputs.items()},
            }
        )
        if _recorded(record) == {"key": key, "digest": identity(out)}:
            console.print(f"[dim]{name}: unchanged[/dim]")
            return out, False
        console.print(f"[bold]{name}[/bold]")
        begun = self.folder / "stages" / f"{name}.begun.json"
        if _recorded(begun) != {"key": key}:  # unfinished work of another config must not be continued
            shutil.rmtree(out.with_name(out.name + ".work"), ignore_errors=True)
            write_text(begun, json.dumps({"key": key}))
        make()
        write_text(record, json.dumps({"key": key, "digest": identity(out)}))
        return out, True


def identity(thing: str | Path) -> str:
    """The digest of an artifact or a file; other strings (factories, data set names) stand for themselves."""
    path = Path(thing)
    try:
        folder = assets.resolve(thing)
        if (folder / artifact.MANIFEST).is_file():
            return artifact.load(folder, verify=False).digest
    except ArtifactError:
        pass
    return file_digest(path) if path.is_file() else str(thing)


def _recorded(record: Path) -> dict[str, str]:
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def run_recipe(path: Path) -> dict[str, Any]:
    """Run the recipe at ``path``; returns the paths of bundle, report and picture, and the violations of the budget."""
    recipe = load_recipe(path)
    out = Path(recipe.out)
    out.mkdir(parents=True, exist_ok=True)
    stages = Stages(out)
    teacher = _teacher(recipe, stages)
    distilled = _distill(recipe, stages, teacher)
    student = recipe.student.artifact or str(distilled)
    graphs = _quantize(recipe, stages, student)
    bundles = {precision: _build(recipe, stages, precision, graph) for precision, graph in graphs.items()}

    evidence, config = out / "evidence.json", asdict(recipe)
    inputs: dict[str, str | Path] = {"teacher": teacher, "student": student, **bundles}
    if distilled:
        inputs["distilled"] = distilled
        measured = {k: config[k] for k in ("data", "seed", "validate")}
        stages.once(
            "gain",
            measured,
            {"teacher": teacher, "distilled": distilled},
            out / "gain.json",
            lambda: compare_steps(recipe, teacher, distilled, out / "gain.json"),
        )
    judged = {k: config[k] for k in ("data", "seed", "validate", "bench", "quantize")}
    stages.once("evidence", judged, inputs, evidence, lambda: judge(recipe, teacher, student, bundles, evidence))

    picture, bundle = out / "render.png", out / "bundle"
    shown = {"bundle": bundle, "data": recipe.data} | {k: v for k, v in config["render"].items() if v}
    stages.once("render", config["render"], shown, picture, lambda: render_picture(recipe, bundle, picture))
    sources: dict[str, str | Path] = {"evidence": evidence, "picture": picture, "gain": out / "gain.json"}
    page = out / "report.html"
    stages.once("report", config, sources, page, lambda: write_page(recipe, path, teacher, student, distilled, page))
    found = json.loads(evidence.read_text(encoding="utf-8"))
    return {
        "bundle": str(bundle),
        "report": str(page),
        "report_json": str(out / "report.json"),
        "picture": str(picture),
        "violations": found["violations"],
    }


def _teacher(recipe: Recipe, stages: Stages) -> str | Path:
    if recipe.teacher.artifact:
        return recipe.teacher.artifact
    fields = {k: v for k, v in asdict(recipe.teacher).items() if k not in ("artifact", "preset")}
    out = stages.folder / "teacher"
    stages.once(
        "teacher",
        [asdict(recipe.teacher), recipe.seed],
        {"data": recipe.data},
        out,
        lambda: api.train(recipe.teacher.preset, recipe.data, out, seed=recipe.seed, **fields),
    )
    return out


def _distill(recipe: Recipe, stages: Stages, teacher: str | Path) -> Path | None:
    if recipe.distill.skip:
        return None
    fields = {k: v for k, v in asdict(recipe.distill).items() if k != "skip"}
    out = stages.folder / "student"
    stages.once(
        "distill",
        [fields, recipe.seed],
        {"teacher": teacher, "data": recipe.data},
        out,
        lambda: api.distill(teacher, recipe.data, out, seed=recipe.seed, **fields),
    )
    return out


def _quantize(recipe: Recipe, stages: Stages, student: str) -> dict[str, Path]:
    """Precision → graph; the float graph is exported once and the others are made from it."""
    folder, steps, seed = stages.folder / "graphs", recipe.student.steps, recipe.seed
    samples, fp32 = recipe.quantize.samples, folder / "fp32"
    stages.once(
        "export", steps, {"student": student}, fp32, lambda: api.quantize(student, recipe.data, fp32, "fp32", steps)
    )
    graphs: dict[str, Path] = {}
    for precision in dict.fromkeys((*recipe.quantize.also, recipe.quantize.precision)):
        out = folder / precision
        if precision != "fp32":
            stages.once(
                precision,
                [samples, seed],
                {"graph": fp32, "data": recipe.data},
                out,
                lambda out=out, precision=precision: api.quantize(
                    fp32, recipe.data, out, precision, None, samples, seed
                ),  # type: ignore[misc]
            )
        graphs[precision] = out
    return graphs


def _build(recipe: Recipe, stages: Stages, precision: str, graph: Path) -> Path:
    chosen = precision == recipe.quantize.precision
    out = stages.folder / "bundle" if chosen else stages.folder / "bundles" / precision
    options: dict[str, dict[str, Any]] = {name: dict(getattr(recipe.build, name)) for name in recipe.build.targets}
    targets = list(recipe.build.targets)
    stages.once(
        f"build-{precision}", [targets, options], {"graph": graph}, out, lambda: api.build(graph, out, targets, options)
    )
    return out
