"""What is checked: a folder per case with student, teacher and bundles, made beforehand on any machine with torch."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rpfm_edge import api
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.files import write_text

RECORD, PRECISIONS = "case.json", ("fp16", "int8")
SPREAD = 0.02  # of what is added to random weights, so that no layer starts at zero


@dataclass(frozen=True, slots=True)
class Case:
    """A prepared case. ``trained`` is false for random weights: they tell speed and precision, not quality."""

    name: str
    trained: bool
    steps: int
    folder: Path

    @property
    def student(self) -> Path:
        return self.folder / "student"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    def bundle(self, precision: str) -> Path:
        """The bundle in one of ``PRECISIONS``, without TensorRT engines."""
        return self.folder / precision


def read_case(folder: Path) -> Case:
    """The case in ``folder``; raises ``ConfigError`` if ``prepare`` has not finished there."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Case(str(record["name"]), bool(record["trained"]), int(record["steps"]), folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} is no prepared case ({error})",
            expected=f"a folder with {RECORD}",
            fix="run: python scripts/gpu_check.py prepare --out FOLDER",
        ) from None


def prepare(spec: str, root: Path, data: str, steps: int) -> Case:
    """Make case ``spec`` in ``root``; what is there already stays.

    Args:
        spec: ``NAME=STUDENT,TEACHER`` (paths or shipped names), or the name of a preset for random weights.
        data: of the INT8 calibration.
        steps: unrolled in the frame.
    """
    name, _, given = spec.partition("=")
    folder = root / name
    if (folder / RECORD).is_file():
        return read_case(folder)
    if given:
        _copy_given(spec, given, folder)
    else:
        random_weights(name, folder, steps)
    with tempfile.TemporaryDirectory(prefix=".graphs.", dir=folder) as scratch:
        graph = Path(scratch) / "fp32"
        for precision in PRECISIONS:
            if (folder / precision).is_dir():
                continue
            if not graph.is_dir():
                api.quantize(folder / "student", data, graph, "fp32", steps=steps)
            made = api.quantize(graph, data, Path(scratch) / precision, precision)
            api.build(made.path, folder / precision, "onnxruntime")
    case = Case(name, bool(given), steps, folder)
    record = {key: value for key, value in asdict(case).items() if key != "folder"}
    write_text(folder / RECORD, json.dumps(record, indent=1))
    return case


def _copy_given(spec: str, given: str, folder: Path) -> None:
    student, _, teacher = given.partition(",")
    if not (student and teacher):
        raise ConfigError(f"case {spec!r}", expected="NAME=STUDENT,TEACHER or NAME", fix="give both, or neither")
    kinds: tuple[artifact.Kind, artifact.Kind] = ("student", "teacher")
    for kind, source in zip(kinds, (student, teacher), strict=True):
        loaded = artifact.load(shipped.resolve(source), kind)
        if not (folder / kind).is_dir():
            with artifact.replacing_folder(folder / kind, kind) as scratch:
                shutil.copytree(loaded.path, scratch, dirs_exist_ok=True)


def random_weights(name: str, folder: Path, steps: int, seed: int = 0) -> None:
    """A teacher and a student of preset ``name`` with random weights and the shipped student's autoencoder."""
    import torch

    from distill.guidance import Guidance
    from distill.rpfm import RPFM, preset
    from distill.student import DistillConfig, create_student, load_student, save_student
    from distill.teacher import NetworkTeacher, load_teacher, save_teacher

    architecture = preset(name)
    shipped, loaded = load_student("student:xs")
    config = DistillConfig(method="flowmap", steps=steps)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        network = RPFM(architecture)
        for parameter in network.parameters():
            parameter.add_(SPREAD * torch.randn_like(parameter))
    size = (int(loaded.config["size"][0]), int(loaded.config["size"][1]))
    teacher = NetworkTeacher(network, shipped.autoencoder, Guidance(), size)
    save_teacher(teacher, folder / "teacher", (), torch.float16)
    student = create_student(load_teacher(folder / "teacher"), config)
    save_student(student, folder / "student", config, size, (), torch.float16)
