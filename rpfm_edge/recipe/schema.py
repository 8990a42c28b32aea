"""Recipes: one TOML file that says the whole chain, read into frozen dataclasses; an unknown key is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rpfm_edge.core.precisions import Method, Precision
from rpfm_edge.core.training import Distillation, QadTable, TeacherTraining


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
    """``targets`` in order of preference; ``options`` per backend, those of [build.openvino] and so on."""

    targets: tuple[str, ...] = ("openvino", "onnxruntime")
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def options_of(self, backend: str) -> dict[str, Any]:
        """Those of one backend."""
        return dict(self.options.get(backend, {}))


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
