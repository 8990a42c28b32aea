"""Recipes: one TOML file that says the whole chain, read into frozen dataclasses; an unknown key is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from rpfm_edge.core.precisions import Method, Precision
from rpfm_edge.core.training import Distillation, QadTable, TeacherTraining

Table = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TeacherTable(TeacherTraining):
    """The teacher, given or trained."""

    artifact: Annotated[str | None, "a path, a name or a factory; default: trained by the other keys"] = None


@dataclass(frozen=True, slots=True)
class StoreTable:
    """The teacher's paths that all students of a recipe are distilled from."""

    trajectories: Annotated[int, "paths of the teacher, rounded up to shards of 64"] = 2048
    seconds: Annotated[float | None, "stop solving paths after this time, that of earlier runs included"] = None
    targets_per_source: Annotated[int, "poses of each person"] = 8


@dataclass(frozen=True, slots=True)
class DistillTable(Distillation):
    """One student. ``init`` may also be an earlier student's name."""

    name: Annotated[str | None, "of the student's folder: letters, digits, - and _; default: the method"] = None


@dataclass(frozen=True, slots=True)
class StudentTable:
    """What goes on to graphs and bundles."""

    artifact: Annotated[str | None, "build from this student instead; needed if none is distilled"] = None
    from_: Annotated[str | None, "the distilled student that goes on to graphs and bundles; default: the last"] = None
    steps: Annotated[int | None, "unrolled into the frame; default: the student's"] = None


@dataclass(frozen=True, slots=True)
class QuantizeTable:
    """Precisions, and how they are found. ``budget``: limits as in a budget file, but against the float graph."""

    precision: Annotated[Precision | Literal["auto"], "of the bundle; auto: the fastest on the first target"] = "int8"
    also: Annotated[tuple[Precision, ...], "further ones to report drift and speed for"] = ("fp32", "fp16")
    samples: Annotated[int, "calibration samples, at least 8"] = 64
    method: Annotated[Method, "of int8"] = "ptq"
    least_psnr_db: Annotated[float | None, "dB that accuracy-control keeps; default: 48"] = None
    budget: Annotated[Table, "of auto; default: psnr_db_min = 43, ssim_min = 0.985"] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BuildTable:
    """Backends. ``options``: those of [build.openvino] and so on, by backend."""

    targets: Annotated[tuple[str, ...], "in order of preference"] = ("openvino", "onnxruntime")
    options: Annotated[Mapping[str, Table], "such as [build.torch_tensorrt]"] = field(default_factory=dict)

    def options_of(self, backend: str) -> dict[str, Any]:
        """Those of one backend."""
        return dict(self.options.get(backend, {}))


@dataclass(frozen=True, slots=True)
class ValidateTable:
    """Drift of the bundle against the teacher."""

    pairs: Annotated[int, "held-out pairs"] = 32
    pictures: Annotated[int, "rows of pictures in the report"] = 6
    budget: Annotated[Table, "limits, as in [drift] of a budget file"] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BenchTable:
    """How long frames are timed."""

    runs: Annotated[int, "frames at least, for each backend and precision"] = 50
    seconds: Annotated[float, "and for at least so long"] = field(default=3.0, metadata={"from_zero": True})


@dataclass(frozen=True, slots=True)
class RenderTable:
    """Files to render with; without them a held-out pair of the data is rendered."""

    source: Annotated[str | None, "picture to render, with pose; default: a held-out pair"] = None
    pose: Annotated[str | None, "its pose, as JSON"] = None


@dataclass(frozen=True, slots=True)
class FrontierTable:
    """Quality against speed of the student that goes on, for every combination of steps, precision and target."""

    steps: Annotated[tuple[int, ...], "of the student that goes on"] = (1, 2, 4, 8)
    precisions: Annotated[tuple[Precision, ...], "each runs on one of the targets at least"] = ("fp32", "fp16", "int8")
    pairs: Annotated[int, "held-out pairs"] = 48
    samples: Annotated[int, "calibration samples, at least 8"] = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """The whole chain. ``out`` and files are relative to the working directory; ``data`` may be ``sample``."""

    out: Annotated[str, "folder of the results"]
    data: Annotated[str, "root of a data set, or sample"] = "sample"
    seed: Annotated[int, "of every draw"] = 0
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
