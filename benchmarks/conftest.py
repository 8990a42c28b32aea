"""Options and artifacts of the benchmarks, and the way each of them prints and keeps what it measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from rpfm_edge import api, artifact, assets, measure
from rpfm_edge.data import has_split
from rpfm_edge.errors import RpfmError

PEOPLE = Path(__file__).parent.parent.parent / "shared" / "people"
THREADS = 2  # of every engine, so that figures of machines with more cores stay comparable
LIBRARIES = ("torch", "openvino", "nncf", "numpy")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rpfm-edge")
    group.addoption("--teacher", default="teacher:xs", help="path or shipped name")
    group.addoption("--student", default="student:xs", help="path or shipped name")
    group.addoption("--data", default=None, help="data set; default: ../shared/people, or else the packaged sample")
    group.addoption("--pairs", type=int, default=32, help="held-out pairs that quality is measured on")
    group.addoption("--rounds", type=int, default=200, help="rounds in which the calls to compare take turns")


@dataclass(frozen=True)
class Chosen:
    """The values of the options."""

    teacher: str
    student: str
    data: str
    pairs: int
    rounds: int


@pytest.fixture(scope="session")
def chosen(request: pytest.FixtureRequest) -> Chosen:
    option = request.config.getoption
    data = option("--data") or (str(PEOPLE) if has_split(PEOPLE, "test") else "sample")
    try:
        for spec in (option("--teacher"), option("--student")):
            artifact.load(assets.resolve(spec))
    except RpfmError as error:
        pytest.fail(str(error), pytrace=False)
    return Chosen(option("--teacher"), option("--student"), data, option("--pairs"), option("--rounds"))


@pytest.fixture(scope="session")
def bundles(chosen: Chosen, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Precision → bundle of the student at one step; fp32 has the torch backend too."""
    folder = tmp_path_factory.mktemp("bundles")
    graph = api.quantize(chosen.student, chosen.data, folder / "fp32", "fp32", steps=1).path
    graphs = {"fp32": graph, "int8": api.quantize(graph, chosen.data, folder / "int8", "int8").path}
    targets = {"fp32": ["openvino", "torch"], "int8": ["openvino"]}
    options = {precision: {name: {"threads": THREADS} for name in names} for precision, names in targets.items()}
    return {
        precision: api.build(made, folder / f"bundle-{precision}", targets[precision], options[precision]).path
        for precision, made in graphs.items()
    }


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled engines go to a folder of this run."""
    monkeypatch.setenv("RPFM_EDGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


Conclude = Callable[..., None]


@pytest.fixture
def conclude(benchmark: Any, chosen: Chosen, capsys: pytest.CaptureFixture[str]) -> Conclude:
    """Print a table, the machine and the verdicts, keep all of it in ``extra_info``, and fail if a target is missed."""

    def report(
        title: str, header: Sequence[str], rows: Sequence[Sequence[str]], verdicts: Mapping[str, bool], **raw: Any
    ) -> None:
        where = measure.where(artifact.tool_versions(*LIBRARIES))
        benchmark.extra_info |= {"machine": where, "options": vars(chosen), "verdicts": dict(verdicts), **raw}
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
