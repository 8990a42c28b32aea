"""Recipes: one TOML file that says the whole chain, read into frozen dataclasses; an unknown key is an error."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rpfm_edge.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS = get_args(Precision)
Backend = Literal["openvino", "onnxruntime", "torch"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TeacherTable:
    """``artifact``: a path, a shipped name or a factory; without it a teacher is trained with the other keys."""

    artifact: str | None = None
    preset: str = "xs"
    autoencoder: str = "small"
    autoencoder_seconds: float = 780.0
    seconds: float = 3300.0
    guidance_scale: float = 1.5
    guidance_schedule: Literal["constant", "power-cosine", "interval"] = "constant"


@dataclass(frozen=True, slots=True)
class DistillTable:
    """How the student is distilled; ``skip`` leaves the stage out (then [student] must name an artifact).

    ``preset``: the student's architecture, where the teacher is no RPFM network."""

    skip: bool = False
    method: Literal["reflow", "flowmap", "endpoint"] = "flowmap"
    steps: int = 4
    trajectories: int = 2048
    store_seconds: float | None = None
    seconds: float = 600.0
    lr: float = 5e-4
    batch: int = 64
    targets_per_source: int = 8
    preset: str | None = None


@dataclass(frozen=True, slots=True)
class StudentTable:
    """``artifact``: build from this student instead of the distilled one. ``steps``: unrolled steps of the frame."""

    artifact: str | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class QuantizeTable:
    """``precision`` is the bundle's; ``also`` are further ones to report drift and speed for."""

    precision: Precision = "int8"
    also: tuple[Precision, ...] = ("fp32", "fp16")
    samples: int = 64


@dataclass(frozen=True, slots=True)
class BuildTable:
    """``targets`` in order of preference; options per backend in [build.openvino] and so on."""

    targets: tuple[Backend, ...] = ("openvino", "onnxruntime")
    openvino: Mapping[str, Any] = field(default_factory=dict)
    onnxruntime: Mapping[str, Any] = field(default_factory=dict)
    torch: Mapping[str, Any] = field(default_factory=dict)


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
    seconds: float = 3.0


@dataclass(frozen=True, slots=True)
class RenderTable:
    """Files to render with; without them a held-out pair of the data is rendered."""

    source: str | None = None
    pose: str | None = None


@dataclass(frozen=True, slots=True)
class Recipe:
    """The whole chain. ``out`` and files are relative to the working directory; ``data`` may be ``sample``."""

    out: str
    data: str = "sample"
    seed: int = 0
    teacher: TeacherTable = field(default_factory=TeacherTable)
    distill: DistillTable = field(default_factory=DistillTable)
    student: StudentTable = field(default_factory=StudentTable)
    quantize: QuantizeTable = field(default_factory=QuantizeTable)
    build: BuildTable = field(default_factory=BuildTable)
    validate: ValidateTable = field(default_factory=ValidateTable)
    bench: BenchTable = field(default_factory=BenchTable)
    render: RenderTable = field(default_factory=RenderTable)


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe; raises ``ConfigError`` for a missing or broken file, an unknown key or a value of another type."""
    recipe = parse(Recipe, read_toml(Path(path)), str(path))
    if recipe.distill.skip and not recipe.student.artifact:
        raise ConfigError(
            f"{path} makes no student", expected="[distill], or [student] artifact", fix="add one of them"
        )
    return recipe


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no file {path}", expected="a TOML file", fix="check the path") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error})", expected="valid TOML", fix="correct it") from None


def parse(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build the dataclass ``kind`` from a table: unknown keys, missing keys and wrong types are errors."""
    hints, known = get_type_hints(kind), [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}", expected=f"one of {known}", fix="check the spelling")
    values = {}
    for key, value in table.items():
        hint = hints[key]
        if is_dataclass(hint) and isinstance(value, Mapping):
            values[key] = parse(hint, value, f"{where} [{key}]")  # type: ignore[arg-type]
        else:
            values[key] = _checked(hint, value, f"{where}: {key}")
    try:
        return kind(**values)
    except TypeError:
        missing = [f.name for f in fields(kind) if f.name not in values]  # type: ignore[arg-type]
        raise ConfigError(f"{where} lacks a key", expected=f"{missing[0]!r}", fix="add it") from None


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
