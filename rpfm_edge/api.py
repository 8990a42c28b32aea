"""Every command as a Python function of the same name and arguments; the command line only prints what these return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import runtimes
from rpfm_edge import artifact, assets
from rpfm_edge import doctor as _doctor
from rpfm_edge.artifact import Artifact
from rpfm_edge.baseline import FOLDER
from rpfm_edge.bench import bench_backend
from rpfm_edge.bench import stages as stages  # of this module, too
from rpfm_edge.bench import sustained as sustained
from rpfm_edge.bundle import add_evidence, read_evidence
from rpfm_edge.bundle import build as build
from rpfm_edge.errors import ConfigError
from rpfm_edge.flow import guidance_scale
from rpfm_edge.image import save_png
from rpfm_edge.measure import check_seconds
from rpfm_edge.metrics import Budget, missing_extra
from rpfm_edge.pipeline import Pipeline, require_engine
from rpfm_edge.pose import read_pose
from rpfm_edge.precisions import CALIBRATED, Precision
from rpfm_edge.recipe import PRECISIONS, check_method, parse, read_toml
from rpfm_edge.regression import FAILURES, GateConfig, run_against, run_gate, run_save
from rpfm_edge.splits import open_splits, sample_inputs
from rpfm_edge.stages import Stages
from rpfm_edge.validate import judge_bundle


def doctor(precision: str | None = None) -> dict[str, Any]:
    """What is installed, which backends work, what to do about those that do not.

    ``precision`` is the one that an engine is to be built in, such as ``"fp8"``: on a Jetson, the advice says if its
    GPU has none.
    """
    return _doctor.diagnose(precision)


def train(config: str | Path, data: str | Path, out: str | Path, **changes: Any) -> Artifact:
    """Train an RPFM teacher.

    Args:
        config: a preset (xs, s, b, l), or a TOML file with the fields of ``distill.commands.TrainRecipe``.
        data: the root of a data set in one of DeepFashion's layouts, or ``sample``.
        changes: fields that override the config's; None is no change.
    """
    teach = _distill_module("teach")
    text = str(config)
    table = read_toml(Path(config)) if text.endswith(".toml") else {"preset": text}
    recipe = parse(teach.TrainRecipe, {**table, **_given(changes)}, text)
    teach.preset(recipe.preset)  # what is wrong is said now, not after the autoencoder's training
    guidance_scale(0.0, recipe.guidance_scale, recipe.guidance_schedule)
    artifact.require_free(out, "teacher")
    splits = open_splits(data)
    made: Artifact = teach.train(recipe, splits.training, Path(out), splits.validation)
    return made


def distill(teacher: str | Path, data: str | Path, out: str | Path, **changes: Any) -> Artifact:
    """Distill a teacher to few steps; or, with the method "qad", fine-tune a student for INT8 or INT4 weights.

    Args:
        teacher: a path, a shipped name (``teacher:xs``) or ``package.module:factory``; with "qad" a student.
        changes: fields of ``distill.commands.DistillRecipe`` (method, steps, seconds, …), with "qad" of ``QadRecipe``
            (precision, steps, seconds, …); None is no change.
    """
    artifact.require_free(out, "student")
    commands, given = _distill_module("commands"), _given(changes)
    made: Artifact
    _check_idle(commands, given)
    if given.get("method") == "qad":
        del given["method"]
        qad = parse(commands.QadRecipe, given, "distill by qad")
        made = commands.fine_tune(qad, str(teacher), open_splits(data).training, Path(out))
    else:
        recipe = parse(commands.DistillRecipe, given, "distill")
        made = commands.distill(recipe, str(teacher), open_splits(data).training, Path(out))
    return made


def _check_idle(commands: Any, given: Mapping[str, Any]) -> None:
    """Refuse what only the other way to distill knows."""
    by_qad = given.get("method") == "qad"
    qad, others = ({field.name for field in fields(one)} for one in (commands.QadRecipe, commands.DistillRecipe))
    idle = [name for name in given if name != "method" and name in (others - qad if by_qad else qad - others)]
    if idle:
        raise ConfigError(
            f"{idle[0]} is {'no option' if by_qad else 'an option'} of the method qad",
            expected="another method" if by_qad else "that method",
            fix=f"leave {idle[0]} out, or change the method",
        )


def quantize(
    student: str | Path,
    data: str | Path | None,
    out: str | Path,
    precision: str = "int8",
    steps: int | None = None,
    samples: int = 64,
    seed: int = 0,
    *,
    method: str = "ptq",
    least_psnr_db: float | None = None,
) -> Artifact:
    """Export a student (or take a float graph) and write the graph in ``precision``, one of ``PRECISIONS``.

    Args:
        data: only int8, fp8 and nvfp4 need it; None for the others.
        samples: how many calibration samples are drawn from the training identities of ``data``.
        method: of int8. "ptq" calibrates; "sweep" tries estimators of ranges and SmoothQuant first, keeps what it
            measured in ``out.work``, continues from there, and writes it into the lineage; "accuracy-control" leaves
            as many layers in float as ``least_psnr_db`` needs (default: ``quantize.methods.LEAST_PSNR_DB``).
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}", expected=f"one of {PRECISIONS}", fix="check the spelling")
    check_method(method, least_psnr_db, precision)
    if precision in CALIBRATED:
        _check_data(data, precision)
    artifact.require_free(out, "graph")
    source, out = assets.resolve(student), Path(out)
    kind = artifact.load(source, "student", "graph").kind
    _check_steps(steps, kind)
    if kind == "student" and precision == "fp32":
        return _export(source, out, steps)
    with artifact.scratch_folder(out) as scratch:
        graph = _export(source, scratch / "graph", steps).path if kind == "student" else source
        return _quantize_graph(
            graph, data, out, precision, {"count": samples, "seed": seed}, scratch, (method, least_psnr_db)
        )


def _check_data(data: str | Path | None, precision: str) -> str | Path:
    if data is None:
        raise ConfigError(f"no data for precision {precision}", expected="a data set, or sample", fix="give --data")
    return data


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
    _require("onnxruntime", "quantize")
    from rpfm_edge.candidates import PlanConfig
    from rpfm_edge.planner import BUDGET, plan_precision, work_folder

    artifact.require_free(out, "graph")
    limits = _budget(budget) if budget else BUDGET
    source, out = assets.resolve(student), Path(out)
    kind = artifact.load(source, "student", "graph").kind
    _check_steps(steps, kind)
    if not target or set(options or {}) - {target}:
        problem = f"options of {sorted(set(options) - {target})[0]!r}" if target and options else "no target"
        raise ConfigError(f"{problem} for precision auto", expected="one target, and its options", fix="give --target")
    data = _check_data(data, "auto")
    config = PlanConfig(target, limits, options=dict((options or {}).get(target, {})), **_given(numbers))
    if kind == "student":
        stages, graph = Stages(work_folder(out)), work_folder(out) / "float"
        stages.once("export", steps, {"student": source}, graph, lambda: _export(source, graph, steps))
        source = graph
    return plan_precision(artifact.load(source, "graph"), data, out, config)


def _budget(given: str | Path | Mapping[str, float]) -> Budget:
    return Budget.from_dict(given) if isinstance(given, Mapping) else Budget.load(Path(given))


def _check_steps(steps: int | None, kind: str) -> None:
    if steps is not None and (steps < 1 or kind == "graph"):
        fix = "leave steps out, they are in the graph" if kind == "graph" else "give a positive number of steps"
        raise ConfigError(f"{steps} steps for a {kind}", expected="at least 1, for a student", fix=fix)


def _export(student: Path, out: Path, steps: int | None) -> Artifact:
    _require("torch", "distill")
    from distill.export import export

    made: Artifact = export(student, out, steps)
    return made


def _quantize_graph(
    graph: Path,
    data: str | Path | None,
    out: Path,
    precision: str,
    draw: Mapping[str, int],
    scratch: Path,
    way: tuple[str, float | None],
) -> Artifact:
    _require("nncf", "quantize")
    from quantize import apply, calibrate, methods

    loaded, recorded, chosen = artifact.load(graph, "graph"), None, None
    if precision in CALIBRATED:
        recorded = scratch / "calibration.safetensors"
        calibrate.record(loaded, open_splits(_check_data(data, precision)).training, recorded, **draw)
        chosen = methods.choose(*way, loaded, recorded, out.with_name(out.name + ".work"))
    return apply.quantize(loaded, cast(Precision, precision), out, recorded, *(chosen or ()))


def validate(
    bundle: str | Path,
    against: str | Path,
    data: str | Path,
    budget: str | Path | None = None,
    backend: str | None = None,
    pairs: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Drift of a bundle against its teacher and the ground truth on held-out pairs.

    ``violations`` of the result lists what is over the budget. The drift of all backends is kept in the bundle as
    evidence ``drift``; that of one ``backend`` is not, so that it does not replace what is known of the others.
    """
    _require("torch", "distill")
    _require("skimage", "validate")
    loaded = artifact.load(assets.resolve(bundle), "bundle")
    backends = _backends(loaded, backend)
    limits = Budget.load(Path(budget)) if budget else Budget()
    evidence = judge_bundle(loaded, against, open_splits(data).test, backends, pairs, limits, seed)
    if backend is None:
        add_evidence(loaded, "drift", evidence)
    return evidence


def bench(bundle: str | Path, backend: str | None = None, runs: int = 50, seconds: float = 3.0) -> dict[str, Any]:
    """Times of prepare and frame on each backend of the bundle (or one), with the packaged sample as input.

    A backend that fails does not end the others: its reason is in ``failures``. One whose library is not installed here
    is in ``skipped`` likewise, unless it was asked for. If none can be timed, the first error is raised.
    """
    check_seconds(seconds)
    loaded = artifact.load(assets.resolve(bundle), "bundle")
    source, pose = sample_inputs(tuple(loaded.config["size"]))
    names, skipped = _installed(loaded, backend)
    evidence: dict[str, Any] = {"backends": []}
    failures: dict[str, Exception] = {}
    for name in names:
        try:
            measured = bench_backend(loaded, name, source, pose, runs, seconds)
            evidence["backends"].append(measured)
        except FAILURES as error:
            failures[name] = error
    if failures and not evidence["backends"]:
        raise next(iter(failures.values()))
    if failures:
        evidence["failures"] = {name: str(error) for name, error in failures.items()}
    evidence |= skipped
    if backend is None:
        add_evidence(loaded, "speed", evidence)
    return evidence


def gate(
    bundle: str | Path,
    name: str | None = None,
    against: str | Path | None = None,
    backend: str | None = None,
    baselines: str | Path = FOLDER,
    **changes: Any,
) -> dict[str, Any]:
    """Whether a frame of the bundle became slower than the baseline ``name``, or than that of the bundle ``against``.

    Args:
        baselines: the folder of the baselines, and of ``results/``.
        changes: fields of ``regression.GateConfig`` (max_slowdown, rounds, seconds, limit_s); None is no change.

    Returns:
        ``verdict`` (pass, regression, error, no baseline or unstable), ``exit_code``, ``backends``, and ``skipped``, as
        in ``bench``, if any is.
    """
    if (name is None) == (against is None):
        raise ConfigError(
            "nothing, or two things, to hold the bundle against",
            expected="a baseline's name or another bundle",
            fix="give one of --gate and --against",
        )
    config, loaded = GateConfig(**_given(changes)), artifact.load(assets.resolve(bundle), "bundle")
    backends, skipped = _installed(loaded, backend)
    if name is not None:
        return run_gate(loaded, backends, name, Path(baselines), config) | skipped
    other = artifact.load(assets.resolve(str(against)), "bundle")
    return run_against(loaded, backends, other, Path(baselines), config) | skipped


def save_baseline(
    bundle: str | Path, name: str, backend: str | None = None, baselines: str | Path = FOLDER, **changes: Any
) -> dict[str, Any]:
    """Measure a frame of the bundle and keep that, with a copy of the bundle, as the baseline ``name`` of this device.

    Arguments and result are as in ``gate``.
    """
    config, loaded = GateConfig(**_given(changes)), artifact.load(assets.resolve(bundle), "bundle")
    backends, skipped = _installed(loaded, backend)
    return run_save(loaded, backends, name, Path(baselines), config) | skipped


def _installed(bundle: Artifact, backend: str | None) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The one that was asked for, or the backends of a bundle whose libraries are here; and, if any is not, a record
    ``skipped`` of the reasons. ``BackendError`` if none is left."""
    names = [backend] if backend else list(bundle.config["backends"])
    reasons = {} if backend else {name: why for name in names if (why := runtimes.why_not(name)) is not None}
    usable = [name for name in names if name not in reasons]
    for name in usable or names[:1]:
        require_engine(bundle, name)
    return usable, {"skipped": reasons} if reasons else {}


def _backends(bundle: Artifact, backend: str | None) -> list[str]:
    """The one that was asked for, or all of the bundle; each is refused before anything slow if it cannot be used."""
    names = [backend] if backend else list(bundle.config["backends"])
    for name in names:
        require_engine(bundle, name)
    return names


def render(
    bundle: str | Path,
    source: str | Path,
    pose: str | Path,
    out: str | Path,
    backend: str | None = None,
    source_pose: str | Path | None = None,
) -> Path:
    """Render the person of an image file in the pose of a JSON file, as PNG.

    ``source_pose``: the joints in the image, as JSON; those that it has not are found, as all are without it.
    """
    with Pipeline.open(bundle, backend) as pipe:
        joints = read_pose(source_pose, pipe.size) if source_pose else None
        image = pipe.render(pipe.prepare(source, joints), read_pose(pose, pipe.size))
    save_png(Path(out), image)
    return Path(out)


def inspect(path: str | Path) -> dict[str, Any]:
    """Kind, config, signatures, lineage and evidence of an artifact; verifies the sha256 of every file."""
    loaded = artifact.load(assets.resolve(path))
    return {
        "path": str(loaded.path),
        "kind": loaded.kind,
        "digest": loaded.digest,
        "config": {k: v for k, v in loaded.config.items() if k != "losses"},
        "signatures": {name: s.to_json() for name, s in loaded.signatures.items()},
        "files": {
            name: {"sha256": sha, "bytes": (loaded.path / name).stat().st_size} for name, sha in loaded.files.items()
        },
        "lineage": [{f.name: getattr(stage, f.name) for f in fields(stage)} for stage in loaded.lineage],
        "evidence": read_evidence(loaded),
    }


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
        _require(module, extra)
    from rpfm_edge.frontier import measure_frontier
    from rpfm_edge.frontier_table import put_in_file

    if readme is not None:
        put_in_file(Path(readme), None)  # a file without the two markers is refused before anything slow
    result = measure_frontier(student, against, data, out, **_given(changes))
    if readme is not None:
        put_in_file(Path(readme), result)
    return result


def run(recipe: str | Path) -> dict[str, Any]:
    """Run a recipe from teacher to report; stages whose inputs and config did not change are not run again."""
    for module in ("matplotlib", "jinja2"):  # of the page, which comes last
        _require(module, "validate")
    from rpfm_edge.run import run_recipe

    return run_recipe(Path(recipe))


def _given(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if value is not None}


def _distill_module(name: str) -> Any:
    _require("torch", "distill")
    _require("accelerate", "distill")
    return import_module(f"distill.{name}")


def _require(module: str, extra: str) -> None:
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise missing_extra(module, extra)
