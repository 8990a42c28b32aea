"""The TensorRT backend as a whole, as far as it goes without a GPU: options, the build, the record and the refusals."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rpfm_edge.chain import build
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError, ParityError
from rpfm_edge.core.files import file_digest
from rpfm_edge.measure import canary
from runtimes.trt import api as trt_api
from runtimes.trt import backend, cuda
from runtimes.trt import backend as trt
from runtimes.trt.cuda import Device

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
        ({"optimization_level": 6}, "option optimization_level is 6: expected an integer, 0 to 5"),
        ({"cuda_graph": 1}, "option cuda_graph is 1: expected true or false"),
        ({"workspace_mib": True}, "option workspace_mib is True: expected an integer, 0 to 2147483647"),
        ({"hardware_compatible": "all"}, r"option hardware_compatible is 'all': expected one of \['no', "),
        ({"library": "trt"}, r"option library is 'trt': expected one of \['auto', 'tensorrt', 'tensorrt_rtx'"),
    ],
)
def test_refuses_options(graph: Artifact, engine: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backend.build(graph, "frame", engine, options)
    assert not list(engine.iterdir())


def test_without_a_gpu(graph: Artifact, engine: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    no_gpu()
    with pytest.raises(BackendError, match=r"no NVIDIA GPU can be used .* run on the device, update its driver"):
        backend.build(graph, "frame", engine, {})
    assert not list(engine.iterdir())


def test_without_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendError, match=r"cuda is not installed .* run: pip install 'rpfm-edge\[tensorrt\]'"):
        cuda.device()


def test_the_typed_graph_goes_first(make_graph: Any) -> None:
    graph: Artifact = make_graph()
    library = trt_api.Library(None, "tensorrt", "10.3.0", True, (), (), True, True, {}, (), False)
    old = trt_api.Library(None, "tensorrt", "8.6.0", True, (), ("FP16",), False, True, {}, (), False)
    assert backend.graph_file(graph, "frame", library) == graph.path / "frame.onnx"
    typed = Artifact(graph.path, "graph", {}, {}, {**graph.files, "typed/frame.onnx": ""}, ())
    assert backend.graph_file(typed, "frame", library) == graph.path / "typed" / "frame.onnx"
    assert backend.graph_file(typed, "frame", old) == graph.path / "frame.onnx"


def test_external_weights_are_part_of_the_key(tiny_graph: Artifact) -> None:
    file = tiny_graph.file("frame.onnx")
    files = [{**tiny_graph.files, "frame.onnx.data": sha} for sha in ("0" * 64, "1" * 64)]
    keys = {backend.graph_digest(replace(tiny_graph, files=one), file) for one in (tiny_graph.files, *files)}
    assert len(keys) == 3


def test_builds_for_another_gpu(graph: Artifact, engine: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    backend.build(graph, "frame", engine, CROSS)
    made = json.loads((engine / "plan.json").read_text())
    assert {file.name for file in engine.iterdir()} == {"model.plan", "plan.json"}
    assert made["graph"] == backend.graph_digest(graph, graph.file("frame.onnx"))
    assert made["plan"] == file_digest(engine / "model.plan")
    assert (made["device"], made["targets"]) == (None, ["8.6"])
    monkeypatch.setattr(trt, "device", lambda: Device("Orin", "8.7", "12.6"))
    with (
        pytest.raises(BackendError, match=r"was built for compute capability \['8\.6'\].* build it on this device"),
        backend.open(engine, tiny.SIGNATURE, CROSS),
    ):
        pass


def test_takes_a_plan_from_the_cache(graph: Artifact, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    backend.build(graph, "frame", engine, CROSS)
    first = (engine / "model.plan").read_bytes()
    built: list[Any] = []
    monkeypatch.setattr(trt, "build_plan", lambda *arguments: built.append(arguments) or b"another")
    backend.build(graph, "frame", engine, CROSS | {"cuda_graph": False, "identities": 2})
    assert (engine / "model.plan").read_bytes() == first
    assert not built
    backend.build(graph, "frame", engine, CROSS | {"optimization_level": 2})
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
    known = build.record(graph)
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
        backend.build(graph, "frame", engine, {}, known)
    else:
        message = (
            r"tensorrt_rtx \S+ computes tokens of graph frame wrongly, -6\.0 dB from ONNX Runtime: expected at least"
        )
        with pytest.raises(ParityError, match=message):
            backend.build(graph, "frame", engine, {}, known)
    assert bool(list((tmp_path / "cache").rglob("*.plan"))) is right


def test_says_when_nothing_was_compared(
    graph: Artifact, engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(trt, "device", lambda: HERE)
    monkeypatch.setattr(trt, "build_plan", lambda *arguments: b"plan")
    backend.build(graph, "frame", engine, {})
    assert "engine frame was not compared, because the bundle has no canary" in capsys.readouterr().err


def test_the_canary_is_recorded_once_for_all_graphs(
    tiny_graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engine and comparison are stood in for; what is counted is real."""
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("onnxruntime")
    recorded, compared, record = [], [], build.record

    @contextmanager
    def open(*arguments: Any) -> Any:
        yield None

    monkeypatch.setattr(trt, "device", lambda: HERE)
    monkeypatch.setattr(trt, "build_plan", lambda *arguments: b"plan")
    monkeypatch.setattr(trt, "open", open)
    monkeypatch.setattr(build, "record", lambda graph: recorded.append(graph) or record(graph))
    monkeypatch.setattr(canary, "check", lambda graph, name, *rest: compared.append(name))
    build.build(tiny_graph.path, tmp_path / "bundle", ["tensorrt"])
    assert (len(recorded), compared) == (1, ["prepare", "frame"])


@pytest.fixture
def elsewhere(graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """An engine in a bundle that was built for another GPU; and what is loaded and compared from here on.

    The builder and the engine are stood in for: the plans are texts that are never run.
    """
    pytest.importorskip("tensorrt_rtx")
    log: list[str] = []

    def load(library: Any, plan: bytes, *rest: Any) -> Any:
        log.append(plan.decode())
        raise InterruptedError  # there is no GPU to load it on

    monkeypatch.setattr(trt, "_compare", lambda graph, name, *rest: log.append(f"compared {name}"))
    monkeypatch.setattr(trt, "_deserialize", load)
    monkeypatch.setattr(trt, "device", lambda: replace(HERE, capability="8.9"))
    monkeypatch.setattr(trt, "build_plan", lambda *arguments: b"old plan")
    made = build.build(graph.path, tmp_path / "bundle", ["tensorrt"])
    monkeypatch.setattr(trt, "device", lambda: HERE)
    monkeypatch.setattr(trt, "build_plan", lambda *arguments: log.append("built") or b"new plan")
    log.clear()
    return made.path / "engines" / "tensorrt" / "frame", log


def test_an_engine_that_does_not_fit_is_built_again_in_the_cache(
    elsewhere: tuple[Path, list[str]], tmp_path: Path, tiny: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, log = elsewhere
    before = artifact.load(tmp_path / "bundle", "bundle")
    for expected in (["built", "compared frame", "new plan"], ["new plan"]):
        with pytest.raises(InterruptedError), backend.open(engine, tiny.SIGNATURE, {}):
            pass
        assert log == expected
        log.clear()
    told = capsys.readouterr().err
    assert told.count("is of another GPU, driver or version of TensorRT; building it again, into the cache") == 1
    assert artifact.load(tmp_path / "bundle", "bundle").files == before.files  # which verifies every file
    assert any(file.read_bytes() == b"new plan" for file in (tmp_path / "cache").rglob("*.plan"))


def test_an_engine_that_does_not_fit_is_refused_where_nothing_can_or_may_build(
    elsewhere: tuple[Path, list[str]], tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, log = elsewhere
    message = r"model\.plan was built for .* build it on this device: rpfm-edge build \S+bundle --target tensorrt"
    with pytest.raises(BackendError, match=message), backend.open(engine, tiny.SIGNATURE, {"rebuild": False}):
        pass
    runs_only = replace(trt_api.load(), builds=False)
    monkeypatch.setattr(trt, "load_library", lambda name: runs_only)
    with pytest.raises(BackendError, match=message), backend.open(engine, tiny.SIGNATURE, {}):
        pass
    assert not log


def test_versions_are_of_the_library_that_the_options_name() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    assert backend.versions({"library": "tensorrt_rtx"}) == {"tensorrt_rtx": library.__version__}
    with pytest.raises(BackendError, match="TensorRT is not installed: expected the package tensorrt_dispatch"):
        backend.versions({"library": "tensorrt_dispatch"})


def test_a_plan_that_the_library_refuses(graph: Artifact, engine: Path, tiny: Any, monkeypatch: Any) -> None:
    """Without a driver no plan can be loaded, which is how a plan that does not fit after all would look."""
    pytest.importorskip("tensorrt_rtx")
    no_gpu()
    backend.build(graph, "frame", engine, CROSS)
    monkeypatch.setattr(trt, "device", lambda: HERE)
    message = r"cannot load \S+model\.plan: .* rpfm-edge build BUNDLE --target tensorrt --out BUNDLE\.$"
    with pytest.raises(ArtifactError, match=message), backend.open(engine, tiny.SIGNATURE, CROSS):
        pass
