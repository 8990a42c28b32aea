"""The torch reference: which graphs it runs, whose code it runs, what it demands of a student."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, BackendError, SignatureError
from runtimes import torch_reference

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("without", ["student", "factory"])
def test_refuses_a_graph_without_its_student(make_graph: Callable[..., Artifact], engine: Path, without: str) -> None:
    graph = make_graph(student=without != "student")
    if without == "factory":
        graph.config.pop("factory")  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="runs only the float student that a graph was exported from"):
        torch_reference.build(graph, "frame", engine, {})
    assert not list(engine.iterdir())


@pytest.mark.parametrize("spec", ["runpy:run_path", "pytest:main", "os.path:exists", "", ":"])
def test_runs_no_code_of_untrusted_packages(
    make_graph: Callable[..., Artifact], engine: Path, tiny: Any, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_reference.build(make_graph(), "frame", engine, {})
    (engine / "factory.json").write_text(json.dumps({"factory": spec, "graph": "frame"}))
    (engine / "student" / "__main__.py").write_text("raise SystemExit('ran')")
    message = r"in a package that is not trusted: .*\['distill', 'tiny_student'\]; .*\$RPFM_EDGE_FACTORIES"
    with pytest.raises(BackendError, match=message), torch_reference.open(engine, tiny.SIGNATURE, {}):
        pass


@pytest.mark.parametrize("spec", ["tiny_student:nothing", "tiny_student.nothing:factory", "tiny_student"])
def test_a_factory_that_is_not_there(make_graph: Callable[..., Artifact], engine: Path, spec: str) -> None:
    with pytest.raises(
        BackendError, match=rf"factory '{spec}' cannot be imported \(.+\): expected package\.module:func"
    ):
        torch_reference.build(make_graph(factory=spec), "frame", engine, {})


def test_a_factory_without_the_graph(graph: Artifact, engine: Path, tiny: Any) -> None:
    torch_reference.build(graph, "frame", engine, {})
    (engine / "factory.json").write_text(json.dumps({"factory": "tiny_student:factory", "graph": "prepare"}))
    with (
        pytest.raises(BackendError, match=r"makes no graph 'prepare': expected one of \['frame'\]"),
        torch_reference.open(engine, tiny.SIGNATURE, {}),
    ):
        pass


def test_a_student_that_was_altered(graph: Artifact, engine: Path, tiny: Any) -> None:
    torch_reference.build(graph, "frame", engine, {})
    with (engine / "student" / "model.safetensors").open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(ArtifactError, match="altered or cut short"), torch_reference.open(engine, tiny.SIGNATURE, {}):
        pass


def test_outputs_that_are_not_the_graphs(make_graph: Callable[..., Artifact], engine: Path, tiny: Any) -> None:
    torch_reference.build(make_graph(factory="tiny_student:wrong_outputs"), "frame", engine, {})
    with (
        torch_reference.open(engine, tiny.SIGNATURE, {}) as session,
        pytest.raises(
            SignatureError, match=r"torch student returns .*'image': 'float32.*expected .*'tokens': 'float32"
        ),
    ):
        session.run(tiny.feeds(0))


def test_threads_are_given_back(graph: Artifact, engine: Path, tiny: Any) -> None:
    before = torch.get_num_threads()
    torch_reference.build(graph, "frame", engine, {})
    with torch_reference.open(engine, tiny.SIGNATURE, {"threads": before + 1}) as session:
        assert torch.get_num_threads() == before + 1
        assert np.isfinite(session.run(tiny.feeds(0))["tokens"]).all()
    assert torch.get_num_threads() == before
