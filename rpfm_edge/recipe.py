"""Recipes: one TOML file that says the whole chain, read into frozen dataclasses; an unknown key is an error."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from rpfm_edge.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRECISIONS = ("fp32", "fp16", "int8")
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
    guidance_schedule: str = "constant"


@dataclass(frozen=True, slots=True)
class DistillTable:
    """How the student is distilled; ``skip`` leaves the stage out (then [student] must name an artifact)."""

    skip: bool = False
    method: str = "flowmap"
    steps: int = 4
    trajectories: int = 2048
    store_seconds: float | None = None
    seconds: float = 600.0
    lr: float = 5e-4
    batch: int = 64
    targets_per_source: int = 8


@dataclass(frozen=True, slots=True)
class StudentTable:
    """``artifact``: build from this student instead of the distilled one. ``steps``: unrolled steps of the frame."""

    artifact: str | None = None
    steps: int | None = None


@dataclass(frozen=True, slots=True)
class QuantizeTable:
    """``precision`` is the bundle's; ``also`` are further ones to report drift and speed for."""

    precision: str = "int8"
    also: tuple[str, ...] = ("fp32", "fp16")
    samples: int = 64


@dataclass(frozen=True, slots=True)
class BuildTable:
    """``targets`` in order of preference; options per backend in [build.openvino] and so on."""

    targets: tuple[str, ...] = ("openvino", "onnxruntime")
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
    for precision in (recipe.quantize.precision, *recipe.quantize.also):
        if precision not in PRECISIONS:
            raise ConfigError(
                f"{path}: precision {precision!r}", expected=f"one of {PRECISIONS}", fix="correct [quantize]"
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
    text = str(hint)
    if isinstance(value, list) and "tuple" in text:
        return tuple(value)
    accepted: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "Mapping": (Mapping,),
    }
    kinds = [kind for name, found in accepted.items() if name in text for kind in found]
    is_bool_for_number = isinstance(value, bool) and "bool" not in text
    if is_bool_for_number or not any(isinstance(value, kind) for kind in kinds):
        raise ConfigError(
            f"{where} = {value!r}", expected=text.replace("<class ", "").strip("<>"), fix="correct the value"
        )
    return value
