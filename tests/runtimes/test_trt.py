"""The TensorRT backend as a whole, as far as it goes without a GPU: options, the build, the record and the refusals."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rpfm_edge import canary
from rpfm_edge.artifact import Artifact, file_digest
from rpfm_edge.errors import ArtifactError, BackendError, ConfigError, ParityError
from runtimes import trt, trt_api, trt_cuda
from runtimes.trt_cuda import Device

HERE = Device("NVIDIA RTX A4000", "8.6", "13.0")
CROSS = {"compute_capability": "8.6"}


def no_gpu() -> None:
    """Skip where there is a GPU."""
    api = pytest.importorskip("cuda.bindings.runtime")
    if api.cudaGetDeviceCount()[1]:
        pytest.skip("this machine has a GPU")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "DLA"}, r"option device is 'DLA': expected 'GPU', because a DLA multiplies by constants only"),
        ({"optimization_level": 6}, "option optimization_level is 6: expected 0 to 5"),
        ({"cuda_graph": 1}, "option cuda_graph is 1: expected true or false"),
        ({"workspace_mib": True}, "option workspace_mib is True: expected an integer, 0 or more"),
        ({"hardware_compatible": "all"}, r"option hardware_compatible is 'all': expected one of \['no', "),
        ({"library": "trt"}, r"option library is 'trt': expected one of \['auto', 'tensorrt', 'tensorrt_rtx'"),
    ],
)
def test_refuses_options(graph: Artifact, engine: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trt.build(graph, "frame", engine, options)
    assert not list(engine.iterdir())


def test_without_a_gpu(graph: Artifact, engine: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    no_gpu()
    with pytest.raises(BackendError, match=r"no NVIDIA GPU can be used .* run on the device, update its driver"):
        trt.build(graph, "frame", engine, {})
    assert not list(engine.iterdir())


def test_without_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendError, match=r"cuda is not installed .* run: pip install 'rpfm-edge\[tensorrt\]'"):
        trt_cuda.device()


def test_the_typed_graph_goes_first(make_graph: Any) -> None:
    graph: Artifact = make_graph()
    library = trt_api.Library(None, "tensorrt", "10.3.0", True, (), (), True, True, {}, (), False)
    old = trt_api.Library(None, "tensorrt", "8.6.0", True, (), ("FP16",), False, True, {}, (), False)
    assert trt.graph_file(graph, "frame", library) == graph.path / "frame.onnx"
    typed = Artifact(graph.path, "graph", {}, {}, {**graph.files, "typed/frame.onnx": ""}, ())
    assert trt.graph_file(typed, "frame", library) == graph.path / "typed" / "frame.onnx"
    assert trt.graph_file(typed, "frame", old) == graph.path / "frame.onnx"


def test_external_weights_are_part_of_the_key(tiny_graph: Artifact) -> None:
    file = tiny_graph.file("frame.onnx")
    files = [{**tiny_graph.files, "frame.onnx.data": sha} for sha in ("0" * 64, "1" * 64)]
    keys = {trt.graph_digest(replace(tiny_graph, files=one), file) for one in (tiny_graph.files, *files)}
    assert len(keys) == 3


def test_builds_for_another_gpu(graph: Artifact, engine: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    trt.build(graph, "frame", engine, CROSS)
    made = json.loads((engine / "plan.json").read_text())
    assert {file.name for file in engine.iterdir()} == {"model.plan", "plan.json"}
    assert made["graph"] == trt.graph_digest(graph, graph.file("frame.onnx"))
    assert made["plan"] == file_digest(engine / "model.plan")
    assert (made["device"], made["targets"]) == (None, ["8.6"])
    monkeypatch.setattr(trt, "device", lambda: Device("Orin", "8.7", "12.6"))
    with (
        pytest.raises(BackendError, match=r"was built for compute capability \['8\.6'\].* build it on this device"),
        trt.open(engine, tiny.SIGNATURE, CROSS),
    ):
        pass


def test_takes_a_plan_from_the_cache(graph: Artifact, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    trt.build(graph, "frame", engine, CROSS)
    first = (engine / "model.plan").read_bytes()
    built: list[Any] = []
    monkeypatch.setattr(trt, "build_plan", lambda *arguments: built.append(arguments) or b"another")
    trt.build(graph, "frame", engine, CROSS | {"cuda_graph": False, "identities": 2})
    assert (engine / "model.plan").read_bytes() == first
    assert not built
    trt.build(graph, "frame", engine, CROSS | {"optimization_level": 2})
    assert len(built) == 1


class Answer:
    """A session that answers what it was told to: a stand-in for an engine on a GPU."""

    def __init__(self, signature: Any, outputs: Any) -> None:
        self.signature, self.outputs = signature, outputs

    def run(self, feeds: Any) -> Any:
        return self.outputs


@pytest.mark.parametrize("right", [True, False])
def test_an_engine_is_compared_before_it_is_kept(
    graph: Artifact, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    """The GPU and its engine are stood in for; it is shown that a wrong answer ends the build and is not cached."""
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("onnxruntime")
    known = canary.record(graph)
    assert known is not None
    answer = {spec.name: known[spec.name].astype(spec.dtype) for spec in graph.signatures["frame"].outputs}
    if not right:
        answer["tokens"] = -answer["tokens"]

    @contextmanager
    def open(*arguments: Any) -> Any:
        yield Answer(graph.signatures["frame"], answer)

    monkeypatch.setattr(trt, "device", lambda: HERE)
    monkeypatch.setattr(trt, "build_plan", lambda *arguments: b"plan")
    monkeypatch.setattr(trt, "open", open)
    if right:
        trt.build(graph, "frame", engine, {})
    else:
        message = (
            r"tensorrt_rtx \S+ computes tokens of graph frame wrongly, -6\.0 dB from ONNX Runtime: expected at least"
        )
        with pytest.raises(ParityError, match=message):
            trt.build(graph, "frame", engine, {})
    assert bool(list((tmp_path / "cache").rglob("*.plan"))) is right


def test_says_when_nothing_was_compared(
    graph: Artifact, engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(trt, "device", lambda: HERE)
    monkeypatch.setattr(trt, "build_plan", lambda *arguments: b"plan")
    monkeypatch.setattr(canary, "record", lambda graph: None)
    trt.build(graph, "frame", engine, {})
    assert "engine frame was not compared, because the bundle has no canary" in capsys.readouterr().err


def test_a_plan_that_the_library_refuses(graph: Artifact, engine: Path, tiny: Any, monkeypatch: Any) -> None:
    """Without a driver no plan can be loaded, which is how a plan that does not fit after all would look."""
    pytest.importorskip("tensorrt_rtx")
    no_gpu()
    trt.build(graph, "frame", engine, CROSS)
    monkeypatch.setattr(trt, "device", lambda: HERE)
    message = r"cannot load \S+model\.plan: .* rpfm-edge build BUNDLE --target tensorrt --out BUNDLE\.$"
    with pytest.raises(ArtifactError, match=message), trt.open(engine, tiny.SIGNATURE, CROSS):
        pass
