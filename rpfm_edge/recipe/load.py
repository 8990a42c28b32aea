"""A recipe file, read and checked before anything runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import runtimes
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.backends import BACKENDS, runs_student
from rpfm_edge.core.config import parse, read_toml
from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError
from rpfm_edge.core.flow import MAP_STEPS, check_steps
from rpfm_edge.core.precisions import check_method, computes, require_backends, require_samples
from rpfm_edge.core.training import SMALL_MULTIPLE, check_size
from rpfm_edge.measure.budget import Budget, require_distances
from rpfm_edge.recipe.schema import BuildTable, DistillTable, Recipe, RenderTable, TeacherTable


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe.

    Raises:
        ConfigError: a missing or broken file, an unknown key, a value of another type or one that cannot work, a name
            of no student, a target that does not compute in a precision, an option that a backend does not have, or no
            file to render.
        ArtifactError: a teacher or a student that is given as an artifact and is none.
    """
    table = read_toml(Path(path))
    if isinstance(table.get("distill"), Mapping):
        raise ConfigError(
            f"{path}: [distill] is a single table",
            expected="[[distill]], one for each student",
            fix="write [[distill]], and its trajectories, store_seconds and targets_per_source as trajectories, "
            "seconds and targets_per_source of [store]; to skip it, leave it out",
        )
    if isinstance(table.get("build"), Mapping):
        table["build"] = _by_backend(table["build"], f"{path} [build]")
    recipe = parse(Recipe, table, str(path))
    _check_names(recipe, str(path))
    _check_teacher(recipe.teacher, str(path))
    _check_student(recipe, str(path))
    _check_distill(recipe, str(path))
    _check_targets(recipe, str(path))
    _check_options(recipe.build, str(path))
    _check_samples(recipe, str(path))
    asked = recipe.quantize
    check_method(asked.method, asked.least_psnr_db, "int8" if "int8" in asked.also else asked.precision)
    _check_quantize(recipe, str(path))
    Budget.from_dict(recipe.validate.budget, f"{path} [validate.budget]")
    _check_render(recipe.render, str(path))
    return recipe


def _by_backend(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """[build] with the tables of backends as its ``options``; the key of a backend has _ for -."""
    names = {name.replace("-", "_"): name for name in BACKENDS}
    for key, value in table.items():
        if key not in ("targets", *names):
            known = ["targets", *names]
            raise ConfigError(f"{where}: unknown key {key!r}", expected=f"one of {known}", fix="check the spelling")
        if key in names and not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {key} = {value!r}", expected="a table", fix="correct the value")
    targets = table.get("targets", ())
    if isinstance(targets, list) and (unknown := [one for one in targets if one not in BACKENDS]):
        raise ConfigError(
            f"{where}: targets = {targets}", expected=f"of {[*BACKENDS]}", fix=f"check the spelling of {unknown[0]!r}"
        )
    options = {names[key]: value for key, value in table.items() if key in names and value}
    return {key: table[key] for key in table if key == "targets"} | {"options": options}


def _check_teacher(table: TeacherTable, where: str) -> None:
    """One that is given is there; one that is to be trained has a size that can be cut up."""
    if table.artifact is None:
        if table.autoencoder == "small":
            check_size(table.size, SMALL_MULTIPLE, f"{where} [teacher]: ")
    elif not _is_factory(table.artifact):
        artifact.load(shipped.resolve(table.artifact), "teacher", verify=False)


def _is_factory(spec: str) -> bool:
    """Whether ``spec`` is a ``package.module:factory`` of a package that is here."""
    found = re.fullmatch(r"([A-Za-z_]\w*)(\.\w+)*:[A-Za-z_]\w*", spec)
    return found is not None and (found[1] in sys.modules or find_spec(found[1]) is not None)


def _check_distill(recipe: Recipe, where: str) -> None:
    """Every student can be trained as it is asked for."""
    for name, table in recipe.students.items():
        title, weight = f"{where} [[distill]] {name}", table.perceptual_weight
        if recipe.teacher.artifact is None and table.preset not in (None, recipe.teacher.preset):
            raise ConfigError(
                f"{title}: preset = {table.preset!r}",
                expected=f"that of the teacher, {recipe.teacher.preset!r}, whose weights it starts from",
                fix="leave it out",
            )
        if table.method != "reflow" and table.steps not in MAP_STEPS:
            raise ConfigError(
                f"{title}: steps = {table.steps}",
                expected=f"1, 2, 4 or 8 with {table.method}",
                fix="choose one of them",
            )
        if weight is not None and (weight < 0 or table.method != "endpoint"):
            raise ConfigError(
                f"{title}: perceptual_weight = {weight:g} with method {table.method}",
                expected="0 or more, with endpoint",
                fix="leave it out, or distill by endpoint",
            )
        if table.method == "reflow" and "flowmap" in _methods_before(recipe, table):
            raise ConfigError(
                f"{title}: init = {table.init!r} with method reflow",
                expected="a student without a flow map before it, whose network knows no size of a step",
                fix="leave it out, or choose another method",
            )


def _methods_before(recipe: Recipe, table: DistillTable) -> list[str]:
    """By which the weights were distilled that a student of this recipe starts from."""
    start = recipe.students.get(table.init or "")
    return [start.method, *_methods_before(recipe, start)] if start else []


def _check_targets(recipe: Recipe, where: str) -> None:
    """There is a target, every one computes in the precisions of [quantize], and some one in each of [frontier]."""
    targets, table = recipe.build.targets, recipe.quantize
    if not targets:
        raise ConfigError(f"{where} [build]: targets = []", expected="at least one", fix="name one, or leave it out")
    asked: list[tuple[str, str]] = [("[quantize]: precision", table.precision)]
    asked += [("[quantize]: also", precision) for precision in table.also]
    unfit = [(key, one) for key, one in asked if one != "fp32" and any(map(runs_student, targets))]
    if recipe.frontier:
        measured = [("[frontier]: precisions", one) for one in recipe.frontier.precisions]
        unfit += [(key, one) for key, one in measured if not any(computes(target, one) for target in targets)]
    for _, precision in asked:
        require_backends(precision, targets)
    if unfit:
        raise ConfigError(
            f"{where} {unfit[0][0]} {unfit[0][1]} for {list(targets)}",
            expected="what goes together",
            fix="leave the precision out, or targets that do not run it, as torch and torch-tensorrt run fp32 only",
        )


def _check_options(table: BuildTable, where: str) -> None:
    """Options are those of targets. A backend that is not here is asked when it builds, what its options may be."""
    for backend, options in table.options.items():
        title = f"{where} [build.{backend.replace('-', '_')}]"
        if backend not in table.targets:
            raise ConfigError(
                f"{title}: {backend} is no target", expected=f"options of {list(table.targets)}", fix="leave it out"
            )
        with suppress(BackendError):  # not installed, or without that device: what is built elsewhere is trained here
            try:
                runtimes.load(backend).checked_options(options)
            except ConfigError as error:
                raise ConfigError(f"{title}: {error.problem}", expected=error.expected, fix=error.fix) from None


def _check_samples(recipe: Recipe, where: str) -> None:
    """Where something is calibrated, the samples are enough for it."""
    table, frontier = recipe.quantize, recipe.frontier
    asked = [("[quantize]", table.samples, (table.precision, *table.also))]
    asked += [("[frontier]", frontier.samples, frontier.precisions)] if frontier else []
    for title, samples, precisions in asked:
        require_samples(f"{where} {title}: samples = {samples}", samples, precisions)


def _check_render(table: RenderTable, where: str) -> None:
    if bool(table.source) != bool(table.pose):
        given, other = ("source", "pose") if table.source else ("pose", "source")
        raise ConfigError(
            f"{where} [render]: {given} without {other}", expected="both", fix=f"give {other}, or leave {given} out"
        )
    for key, file in (("source", table.source), ("pose", table.pose)):
        if file and not Path(file).is_file():
            raise ConfigError(f"{where} [render]: {key} = {file!r}", expected="a file", fix="check the path")


def _check_quantize(recipe: Recipe, where: str) -> None:
    """What [quantize] asks for goes together, and with [qad] and the targets: found now, not after the training."""
    table, targets = recipe.quantize, recipe.build.targets
    if table.precision != "auto" and table.budget:
        problem, fix = f"[quantize.budget] with precision {table.precision}", 'set precision = "auto", or leave it out'
    elif table.precision == "auto" and "tensorrt" in targets and len(targets) > 1:
        problem, fix = f"precision auto for {list(targets)}", "plan for tensorrt alone, which needs a graph of its own"
    elif recipe.qad and table.precision not in (recipe.qad.precision, "auto"):
        problem = f"[qad] for {recipe.qad.precision} and [quantize] precision {table.precision}"
        fix = "fine-tune for the precision of the bundle"
    else:
        origin = f"{where} [quantize.budget]"
        require_distances(Budget.from_dict(table.budget, origin), origin)
        return
    raise ConfigError(f"{where}: {problem}", expected="what goes together", fix=fix)


RESERVED = ("teacher", "data")


def _check_names(recipe: Recipe, where: str) -> None:
    """Every distilled student has a name of its own, and starts from one that is there by then."""
    earlier: list[str] = []
    for entry in recipe.distill:
        name = entry.name or entry.method
        if not re.fullmatch(r"[\w-]+", name) or name in (*earlier, *RESERVED):
            problem = (
                "is there twice" if name in earlier else "is reserved" if name in RESERVED else "cannot be a folder"
            )
            raise ConfigError(
                f"{where} [[distill]]: name {name!r} {problem}",
                expected="a name of its own, of letters, digits, - and _",
                fix="give another name",
            )
        if entry.init is not None and entry.init not in earlier:
            _check_init(entry.init, earlier, f"{where} [[distill]] {name}")
        earlier.append(name)


def _check_init(init: str, earlier: Sequence[str], where: str) -> None:
    try:
        artifact.load(shipped.resolve(init), "student", verify=False)
    except ArtifactError as error:
        raise ConfigError(
            f"{where}: init = {init!r} is no earlier student ({error.problem})",
            expected=f"one of {list(earlier)}, or a student artifact",
            fix="correct it, or move that student up",
        ) from None


def _check_student(recipe: Recipe, where: str) -> None:
    """[student] names exactly one student that is there."""
    chosen, names = recipe.student, list(recipe.students)
    config: Mapping[str, Any] = {}
    if chosen.artifact:
        config = artifact.load(shipped.resolve(chosen.artifact), "student", verify=False).config
    elif not names:
        raise ConfigError(
            f"{where} makes no student", expected="[[distill]], or [student] artifact", fix="add one of them"
        )
    if chosen.from_ is not None and (chosen.artifact or chosen.from_ not in names):
        problem = "stands beside artifact" if chosen.artifact else "names no student"
        raise ConfigError(
            f"{where} [student]: from = {chosen.from_!r} {problem}",
            expected=f"one of {names}, or artifact alone",
            fix="correct it",
        )
    distilled = recipe.students[chosen.from_ or names[-1]] if names and not chosen.artifact else None
    config = {"method": distilled.method, "steps": distilled.steps} if distilled else config
    for title, steps in (("[student]", chosen.steps), ("[qad]", recipe.qad.steps if recipe.qad else None)):
        if steps is not None:
            check_steps(config, steps, f"{where} {title}: ")
