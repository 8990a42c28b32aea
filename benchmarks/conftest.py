"""Options and artifacts of the benchmarks, and the way each of them prints and keeps what it measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from rpfm_edge import api
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.backends import BACKENDS
from rpfm_edge.core.errors import RpfmError
from rpfm_edge.judge.baseline import FOLDER
from rpfm_edge.measure import device_state, machine
from rpfm_edge.people.deepfashion import has_split

PEOPLE = Path(__file__).parent.parent.parent / "shared" / "people"
THREADS = 2  # of every engine, so that figures of machines with more cores stay comparable
CPU_BACKENDS = ("openvino", "onnxruntime", "torch")
LIBRARIES = ("torch", "openvino", "onnxruntime", "nncf", "numpy")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rpfm-edge")
    group.addoption("--teacher", default="teacher:xs", help="path or shipped name")
    group.addoption("--student", default="student:xs", help="path or shipped name")
    group.addoption("--data", default=None, help="data set; default: ../shared/people, or else the packaged sample")
    group.addoption("--pairs", type=int, default=32, help="held-out pairs that quality is measured on")
    group.addoption("--bundle", default=None, help="measure the frames of this bundle, and nothing else")
    group.addoption("--steps", default="1", help="steps of the student's frames, such as 1,4")
    group.addoption("--rounds", type=int, default=200, help="rounds in which the calls to compare take turns")
    group.addoption("--gate", default=None, help="fail if a frame became slower than this baseline")
    group.addoption("--save-baseline", default=None, help="keep the frames' times as this baseline")
    group.addoption("--max-slowdown", default="5%", help="what a frame may lose, such as 5%% or 0.05")
    group.addoption("--baselines", default=str(FOLDER), help="folder of the baselines")


@dataclass(frozen=True)
class Chosen:
    """The values of the options."""

    teacher: str
    student: str
    data: str
    pairs: int
    rounds: int
    bundle: str | None


@pytest.fixture(scope="session")
def chosen(request: pytest.FixtureRequest) -> Chosen:
    option = request.config.getoption
    data = option("--data") or (str(PEOPLE) if has_split(PEOPLE, "test") else "sample")
    try:
        for spec in (option("--teacher"), option("--student")):
            artifact.load(shipped.resolve(spec))
    except RpfmError as error:
        pytest.fail(str(error), pytrace=False)
    return Chosen(
        option("--teacher"), option("--student"), data, option("--pairs"), option("--rounds"), option("--bundle")
    )


@dataclass(frozen=True)
class Case:
    """A frame to measure. ``bundle`` None: the student's, built when its turn comes. A frame has batch 1: a stream of
    poses comes one by one; ``benchmarks.growth`` measures larger ones.
    """

    bundle: Path | None
    backend: str
    precision: str
    steps: int
    size: tuple[int, int]
    batch: int = 1

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.backend}-{self.precision}-{self.steps}-{height}x{width}-{self.batch}"


def cases(bundle: str | None, student: str, steps: Sequence[int]) -> list[Case]:
    """Those of a bundle, one for each backend that it has, or of a student: every backend, in the precisions that it
    computes in. Torch runs the float student only, torch-tensorrt takes no quantized graph.
    """
    if bundle:
        loaded = artifact.load(shipped.resolve(bundle), "bundle")
        config = loaded.config
        facts = (config["precision"], config["steps"], tuple(config["size"]))
        return [Case(loaded.path, backend, *facts) for backend in config["backends"]]
    size = tuple(artifact.load(shipped.resolve(student), "student").config["size"])
    precisions = {"torch": ("fp32",), "torch-tensorrt": ("fp32", "fp16")}
    pairs = [(b, p) for b in BACKENDS for p in precisions.get(b, ("fp32", "fp16", "int8"))]
    return [Case(None, backend, precision, count, size) for count in steps for backend, precision in pairs]


CASES = pytest.StashKey[list[Case]]()


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    try:
        steps = [int(number) for number in option("--steps").split(",")]
    except ValueError:
        raise pytest.UsageError(f"--steps {option('--steps')}: expected numbers such as 1,4") from None
    try:
        config.stash[CASES] = cases(option("--bundle"), option("--student"), steps)
    except RpfmError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.config.stash[CASES], ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--bundle`` only that bundle is measured: what builds or trains is left out."""
    if config.getoption("--bundle"):
        items[:] = [item for item in items if "case" in getattr(item, "fixturenames", ())]


@dataclass(frozen=True)
class Builder:
    """Graphs and bundles of a student, each made once in ``folder``."""

    student: str
    data: str
    folder: Path

    def graph(self, precision: str, steps: int) -> Path:
        out = self.folder / f"{precision}-{steps}"
        if not (out / artifact.MANIFEST).is_file():
            if precision == "fp32":
                api.quantize(self.student, self.data, out, "fp32", steps=steps)
            else:
                api.quantize(self.graph("fp32", steps), self.data, out, precision)
        return out

    def bundle(self, precision: str, steps: int, backends: Sequence[str]) -> Path:
        out = self.folder / f"bundle-{precision}-{steps}-{'-'.join(backends)}"
        if not (out / artifact.MANIFEST).is_file():
            options = {name: {"threads": THREADS} for name in backends if name in CPU_BACKENDS}
            api.build(self.graph(precision, steps), out, list(backends), options)
        return out


@pytest.fixture(scope="session")
def builder(chosen: Chosen, tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(chosen.student, chosen.data, tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="session")
def bundles(builder: Builder) -> dict[str, Path]:
    """Precision → bundle of the student at one step; fp32 has the torch backend too."""
    targets = {"fp32": ["openvino", "torch"], "int8": ["openvino"]}
    return {precision: builder.bundle(precision, 1, backends) for precision, backends in targets.items()}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled engines go to a folder of this run."""
    monkeypatch.setenv("RPFM_EDGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


Conclude = Callable[..., None]


@pytest.fixture
def conclude(benchmark: Any, chosen: Chosen, capsys: pytest.CaptureFixture[str]) -> Conclude:
    """Print a table, the machine and the verdicts, keep all of it in ``extra_info``, and fail if a target is missed.

    The device's state before is that at the beginning of the test.
    """
    before = device_state.read()

    def report(
        title: str, header: Sequence[str], rows: Sequence[Sequence[str]], verdicts: Mapping[str, bool], **raw: Any
    ) -> None:
        where = machine.where(artifact.tool_versions(*LIBRARIES))
        facts = {"machine": where, "state": device_state.around(before), "options": vars(chosen)}
        benchmark.extra_info |= {**facts, "verdicts": dict(verdicts), **raw}
        table = Table(*header, title=title, box=None, title_justify="left")
        for row in rows:
            table.add_row(*row)
        versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        with capsys.disabled():
            console = Console(highlight=False, soft_wrap=True, width=120)
            console.print("\n", table, sep="")
            console.print(f"measured on {where['cpu']}, {where['usable_cores']} of {where['cores']} cores; {versions}")
            for target, met in verdicts.items():
                console.print(f"{'met' if met else 'MISSED'}: {target}", style="green" if met else "red")
        if missed := [target for target, met in verdicts.items() if not met]:
            pytest.fail("missed: " + "; ".join(missed), pytrace=False)

    return report
