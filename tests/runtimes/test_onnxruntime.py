"""ONNX Runtime: providers, damaged graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, BackendError
from rpfm_edge.core.signature import Signature, TensorSpec

pytest.importorskip("onnxruntime")
from runtimes import ort

OPTIONS = {"threads": 1}


def test_a_provider_that_is_not_there(graph: Artifact, engine: Path) -> None:
    with pytest.raises(BackendError, match=r"has no NopeExecutionProvider: expected one of \[.*'CPUExecutionProvider'"):
        ort.build(graph, "frame", engine, {"provider": "NopeExecutionProvider"})


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_falls_back(graph: Artifact, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build with CUDA on a machine without a GPU lists the provider and then runs on the CPU."""
    monkeypatch.setattr(ort.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(BackendError, match="falls back from CUDAExecutionProvider to CPUExecutionProvider"):
        ort.build(graph, "frame", engine, {"provider": "CUDAExecutionProvider"})


def test_a_damaged_engine(graph: Artifact, engine: Path, tiny: Any) -> None:
    ort.build(graph, "frame", engine, OPTIONS)
    content = (engine / "model.onnx").read_bytes()
    (engine / "model.onnx").write_bytes(content[: len(content) // 2])
    with (
        pytest.raises(ArtifactError, match=r"model\.onnx is missing or damaged \(.+\): .* build the engine again"),
        ort.open(engine, tiny.SIGNATURE, OPTIONS),
    ):
        pass


def test_an_onnx_file_that_is_none(graph: Artifact, engine: Path) -> None:
    (graph.path / "frame.onnx").write_bytes(b"\x08nothing")
    with pytest.raises(BackendError, match=r"ONNX Runtime cannot load .*frame\.onnx \(.+\): expected an ONNX graph"):
        ort.build(graph, "frame", engine, OPTIONS)
    assert not list(engine.iterdir())


def test_an_engine_of_another_graph(graph: Artifact, engine: Path, tiny: Any) -> None:
    ort.build(graph, "frame", engine, OPTIONS)
    other = Signature(tiny.SIGNATURE.inputs, (TensorSpec("image", tiny.IMAGE, "uint8"),))
    message = r"outputs image uint8\[1, 8, 6, 3\], tokens .*: expected image uint8\[1, 8, 6, 3\]; build the engine"
    with pytest.raises(ArtifactError, match=message), ort.open(engine, other, OPTIONS):
        pass
