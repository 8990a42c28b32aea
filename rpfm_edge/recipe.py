"""Recipes: one TOML file that says the whole chain, read into frozen dataclasses; an unknown key is an error."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from math import inf, isfinite
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import runtimes
from rpfm_edge import artifact, assets
from rpfm_edge.errors import ArtifactError, BackendError, ConfigError
from rpfm_edge.flow import MAP_STEPS, check_steps
from rpfm_edge.metrics import Budget, require_distances
from rpfm_edge.pose import PoseKind
from rpfm_edge.precisions import STUDENT_ONLY, Precision, computes, require_backends, require_samples

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRECISIONS = get_args(Precision)
Method = Literal["ptq", "sweep", "accuracy-control"]
METHODS = get_args(Method)
Backend = Literal["openvino", "onnxruntime", "tensorrt", "torch-tensorrt", "torch"]
T = TypeVar("T")
SMALL_MULTIPLE = 16  # pixels per latent of the small autoencoder, 8, times the networks' patch, 2
COUNTS = ("steps", "batch", "trajectories", "targets_per_source", "sources", "autoencoder_batch", "pairs", "runs")
FROM_ZERO = ("seed", "pictures")
AMOUNTS = ("seconds", "autoencoder_seconds", "alignment_seconds", "decoder_seconds", "store_seconds", "lr", "ema")


@dataclass(frozen=True, slots=True)
class TeacherTraining:
    """How a teacher is made from nothing: an autoencoder, with ``pose = "keypoints"`` an alignment, the flow network on
    the latents, and with an alignment a decoder that sees it.

    ``seconds`` are training time of the network. ``compile``: by torch.compile.
    """

    preset: str = "xs"
    pose: PoseKind = "keypoints"
    size: tuple[int, int] = (256, 176)
    autoencoder: str = "small"  # or the folder of a diffusers AutoencoderKL
    autoencoder_seconds: float = 780.0
    autoencoder_batch: int = 8
    alignment_seconds: float = 2400.0
    decoder_seconds: float = 1200.0
    seconds: float = 3300.0
    lr: float = 1e-3
    ema: float = 0.999
    sources: int = 4
    targets_per_source: int = 8
    guidance_scale: float = 1.5
    guidance_schedule: Literal["constant", "power-cosine", "interval"] = "constant"
    compile: bool = False


@dataclass(frozen=True, slots=True)
class TeacherTable(TeacherTraining):
    """``artifact``: a path, a shipped name or a factory; without it a teacher is trained with the other keys."""

    artifact: str | None = None


@dataclass(frozen=True, slots=True)
class StoreTable:
    """The teacher's paths that all students of a recipe are distilled from; ``seconds`` bounds the solving."""

    trajectories: int = 2048
    seconds: float | None = None
    targets_per_source: int = 8


@dataclass(frozen=True, slots=True)
class Distillation:
    """How a student is made from a teacher. ``init``: a student (path or shipped name) whose weights it starts from.

    ``preset``: the student's architecture, where the teacher is no RPFM network. ``perceptual_weight``: of the decoded
    edges, with ``endpoint`` only.
    """

    method: Literal["reflow", "flowmap", "endpoint"] = "flowmap"
    steps: int = 4
    seconds: float = 600.0
    lr: float = 5e-4
    batch: int = 64
    init: str | None = None
    preset: str | None = None
    perceptual_weight: float | None = None
    compile: bool = False


@dataclass(frozen=True, slots=True)
class DistillTable(Distillation):
    """One student. ``name``: the method if left out. ``init`` may also be an earlier student's name."""

    name: str | None = None


@dataclass(frozen=True, slots=True)
class StudentTable:
    """What goes on to graphs and bundles: the distilled student ``from`` (the last one if left out), or ``artifact``.

    ``steps``: unrolled steps of the frame."""

    artifact: str | None = None
    from_: str | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class QadTable:
    """Fine-tunes a student for the precision that it will be quantized to: its rounded self learns to make the pictures
    of its float self.

    ``steps``: unrolled; those of [student] if left out, or the student's own. ``lr``: 1e-5 for int8 and 2e-5 for
    int4-weights, whose grid is coarser, if left out. ``batch``: poses of one source in a batch.
    """

    precision: Literal["int8", "int4-weights"] = "int8"
    steps: int | None = None
    seconds: float = 400.0
    lr: float | None = None
    batch: int = 4


@dataclass(frozen=True, slots=True)
class QuantizeTable:
    """``precision`` is the bundle's; ``also`` are further ones to report drift and speed for. ``method`` and
    ``least_psnr_db`` are of int8. ``auto`` is the fastest precision per layer on the first target that meets
    ``budget``: limits as in a budget file, but against the float graph."""

    precision: Precision | Literal["auto"] = "int8"
    also: tuple[Precision, ...] = ("fp32", "fp16")
    samples: int = 64
    method: Method = "ptq"
    least_psnr_db: float | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BuildTable:
    """``targets`` in order of preference; options per backend in [build.openvino] and so on."""

    targets: tuple[Backend, ...] = ("openvino", "onnxruntime")
    openvino: Mapping[str, Any] = field(default_factory=dict)
    onnxruntime: Mapping[str, Any] = field(default_factory=dict)
    tensorrt: Mapping[str, Any] = field(default_factory=dict)
    torch_tensorrt: Mapping[str, Any] = field(default_factory=dict)
    torch: Mapping[str, Any] = field(default_factory=dict)

    def options(self, backend: str) -> dict[str, Any]:
        """Those of [build.BACKEND], with _ for - in the backend's name."""
        return dict(getattr(self, backend.replace("-", "_")))


@dataclass(frozen=True, slots=True)
class ValidateTable:
    """``pairs``: held-out pairs; ``budget``: limits on the bundle's drift against the teacher, as in a budget file."""

    pairs: int = 32
    pictures: int = 6
    budget: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BenchTable:
    """At least ``runs`` frames and ``seconds`` for each backend and precision."""

    runs: int = 50
    seconds: float = field(default=3.0, metadata={"from_zero": True})


@dataclass(frozen=True, slots=True)
class RenderTable:
    """Files to render with; without them a held-out pair of the data is rendered."""

    source: str | None = None
    pose: str | None = None


@dataclass(frozen=True, slots=True)
class FrontierTable:
    """Quality against speed of the student that goes on, for every combination of steps, precision and target."""

    steps: tuple[int, ...] = (1, 2, 4, 8)
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "int8")
    pairs: int = 48
    samples: int = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """The whole chain. ``out`` and files are relative to the working directory; ``data`` may be ``sample``."""

    out: str
    data: str = "sample"
    seed: int = 0
    teacher: TeacherTable = field(default_factory=TeacherTable)
    store: StoreTable = field(default_factory=StoreTable)
    distill: tuple[DistillTable, ...] = ()
    student: StudentTable = field(default_factory=StudentTable)
    qad: QadTable | None = None
    quantize: QuantizeTable = field(default_factory=QuantizeTable)
    build: BuildTable = field(default_factory=BuildTable)
    validate: ValidateTable = field(default_factory=ValidateTable)
    bench: BenchTable = field(default_factory=BenchTable)
    render: RenderTable = field(default_factory=RenderTable)
    frontier: FrontierTable | None = None

    @property
    def students(self) -> dict[str, DistillTable]:
        """Name → how it is distilled, in order."""
        return {one.name or one.method: one for one in self.distill}


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


def check_size(size: tuple[int, int], multiple: int, where: str = "") -> None:
    """Raise ``ConfigError`` for pictures that cannot be cut into latents and these into patches."""
    if any(side < multiple or side % multiple for side in size):
        nearest = [max(1, round(side / multiple)) * multiple for side in size]
        raise ConfigError(
            f"{where}size = {list(size)}",
            expected=f"multiples of {multiple}, pixels per latent times the patch",
            fix=f"take {nearest}",
        )


def _check_teacher(table: TeacherTable, where: str) -> None:
    """One that is given is there; one that is to be trained has a size that can be cut up."""
    if table.artifact is None:
        if table.autoencoder == "small":
            check_size(table.size, SMALL_MULTIPLE, f"{where} [teacher]: ")
    elif not _is_factory(table.artifact):
        artifact.load(assets.resolve(table.artifact), "teacher", verify=False)


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
    unfit = [(key, one) for key, one in asked if one != "fp32" and set(targets) & set(STUDENT_ONLY)]
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
    for backend in (backend for backend in get_args(Backend) if table.options(backend)):
        title = f"{where} [build.{backend.replace('-', '_')}]"
        if backend not in table.targets:
            raise ConfigError(
                f"{title}: {backend} is no target", expected=f"options of {list(table.targets)}", fix="leave it out"
            )
        with suppress(BackendError):  # not installed, or without that device: what is built elsewhere is trained here
            try:
                runtimes.load(backend).checked_options(table.options(backend))
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


def check_method(method: str, least_psnr_db: float | None, precision: str) -> None:
    """Raise ``ConfigError`` for a method of INT8 that is unknown or does not fit the rest."""
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}", expected=f"one of {METHODS}", fix="check the spelling")
    if method != "ptq" and precision != "int8":
        raise ConfigError(f"method {method} for {precision}", expected="int8", fix="leave the method out")
    if least_psnr_db is not None and method != "accuracy-control":
        raise ConfigError(
            f"a least PSNR for method {method}", expected="method accuracy-control", fix="choose it, or leave it out"
        )


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
        artifact.load(assets.resolve(init), "student", verify=False)
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
        config = artifact.load(assets.resolve(chosen.artifact), "student", verify=False).config
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


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no file {path}", expected="a TOML file", fix="check the path") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})", expected="valid TOML", fix="correct it") from None


def parse(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build the dataclass ``kind`` from a table: unknown keys, missing keys, wrong types, counts below 1, times and
    rates that are not positive, and numbers that are not finite are errors.

    A field ``from_`` is the key ``from``, which Python keeps for itself.
    """
    hints = {name.rstrip("_"): hint for name, hint in get_type_hints(kind).items()}
    known = {f.name.rstrip("_"): f for f in fields(kind)}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            names = list(known)
            raise ConfigError(f"{where}: unknown key {key!r}", expected=f"one of {names}", fix="check the spelling")
    values = {known[key].name: _value(hints[key], value, where, key) for key, value in table.items()}
    for key, value in table.items():
        _check_range(key, value, where, from_zero="from_zero" in known[key].metadata)
    try:
        return kind(**values)
    except TypeError:
        missing = [key for key in known if key not in table]
        raise ConfigError(f"{where} lacks a key", expected=f"{missing[0]!r}", fix="add it") from None


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    """A value of a key: a table becomes its dataclass, an array of tables a tuple of them."""
    inner = next((one for one in (hint, *get_args(hint)) if is_dataclass(one)), None)
    if inner and get_origin(hint) is tuple and _fits(tuple[Mapping[str, Any], ...], value):
        rows = enumerate(value, 1)
        return tuple(parse(inner, row, f"{where} [[{key}]] {number}") for number, row in rows)  # type: ignore[arg-type]
    if inner and get_origin(hint) is not tuple and isinstance(value, Mapping):
        return parse(inner, value, f"{where} [{key}]")  # type: ignore[arg-type]
    return _checked(hint, value, f"{where}: {key}")


def _check_range(key: str, value: Any, where: str, from_zero: bool) -> None:
    numbers = value if isinstance(value, list | tuple) else (value,)
    if key in COUNTS and min(numbers, default=0) < 1:
        expected = "at least 1"
    elif key in FROM_ZERO and not 0 <= value < 2**63:  # torch and numpy take no larger seeds
        expected = "0 or more" if value < 0 else "less than 2 ** 63"
    elif key in AMOUNTS and not (0 < value < inf or (from_zero and value == 0)):
        expected = "a finite number" + (", 0 or more" if from_zero else " above 0")
    elif key == "ema" and value >= 1:
        expected = "below 1"
    elif isinstance(value, float) and not isfinite(value):
        expected = "a finite number"
    else:
        return
    shown = f"{value:g}" if isinstance(value, float) else value
    raise ConfigError(f"{where}: {key} = {shown}", expected=expected, fix="correct the value")


def _checked(hint: Any, value: Any, where: str) -> Any:
    if not _fits(hint, value):
        raise ConfigError(f"{where} = {value!r}", expected=_words(hint), fix="correct the value")
    return tuple(value) if isinstance(value, list) else value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value read from TOML is of a type: lists stand for tuples, integers do for floats, booleans do not."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(one, value) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        hints = arguments[:1] * len(value) if Ellipsis in arguments and isinstance(value, list | tuple) else arguments
        return (
            isinstance(value, list | tuple)
            and len(value) == len(hints)
            and all(_fits(one, entry) for one, entry in zip(hints, value, strict=True))
        )
    if origin is Mapping:
        return isinstance(value, Mapping)
    return type(value) in ((int, float) if hint is float else (hint,))


def _words(hint: Any) -> str:
    """A type as a reader of TOML knows it."""
    origin, arguments = get_origin(hint), [one for one in get_args(hint) if one is not type(None)]
    if origin in (Union, UnionType):
        return " or ".join(_words(one) for one in arguments)
    if origin is Literal:
        return f"one of {arguments}"
    if origin is tuple:
        kinds = dict.fromkeys(_words(one) for one in arguments if one is not Ellipsis)
        return f"a list{'' if Ellipsis in arguments else f' of {len(arguments)}'}, each {' or '.join(kinds)}"
    names = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return names.get(hint, "a table")
