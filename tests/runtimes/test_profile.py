"""Layer times: every product of a real graph is found once, and nothing is left behind."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import runtimes
from quantize import apply, calibrate
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import BackendError, ConfigError, SignatureError
from rpfm_edge.core.runtime import LayerTime
from rpfm_edge.measure.metrics import psnr_db
from rpfm_edge.people.data import sample_root
from rpfm_edge.people.deepfashion import open_split
from runtimes import profiling
from runtimes.trt import cuda as trt_cuda
from runtimes.trt import profile
from runtimes.trt.api import Library
from runtimes.trt.run import TensorRTSession
from tests.runtimes.trt_fake import FakeCuda, FakeEngine

onnx = pytest.importorskip("onnx")
OPTIONS = {"threads": 1}
PRODUCTS = ("Conv", "Gemm", "MatMul")


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def exported(
    request: pytest.FixtureRequest, tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """A frame of two steps in one of the precisions."""
    folder, samples = tmp_path_factory.mktemp("profiled"), None
    if request.param == "fp32":
        return tiny_graph
    if request.param == "int8":
        pytest.importorskip("nncf")
        samples = calibrate.record(tiny_graph, open_split(sample_root(), "test"), folder / "samples", 16)
    return apply.quantize(tiny_graph, request.param, folder / "graph", samples)


@pytest.fixture(params=["openvino", "onnxruntime"])
def runtime(request: pytest.FixtureRequest) -> Any:
    if reason := runtimes.available()[request.param]:
        pytest.skip(reason)
    return runtimes.load(request.param)


def zeros(graph: Artifact, name: str = "frame") -> dict[str, np.ndarray]:
    return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in graph.signatures[name].inputs}


def test_every_product_is_timed_once(
    runtime: Any, exported: Artifact, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    runtime.build(exported, "frame", engine, OPTIONS)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    layers: list[LayerTime] = runtime.profile(engine, exported.signatures["frame"], OPTIONS, zeros(exported), 3)

    nodes = onnx.load(exported.file("frame.onnx")).graph.node
    products = [node.name for node in nodes if node.op_type in PRODUCTS]
    found = Counter(name for layer in layers for name in layer.names)
    assert len(products) > 20
    assert {name: found[name] for name in products} == dict.fromkeys(products, 1)
    assert all(layer.kind and layer.seconds >= 0 for layer in layers)
    assert all(layer.seconds > 0 for layer in layers if "Conv" in layer.kind or "conv" in layer.kind)
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before


def test_an_openvino_engine_is_smaller_than_its_graph_and_makes_the_same_image(
    exported: Artifact, engine: Path, tmp_path: Path
) -> None:
    """Against OpenVINO's own reading of the ONNX file, saved and run."""
    openvino = pytest.importorskip("openvino")
    runtimes.load("openvino").build(exported, "frame", engine, OPTIONS)
    core = openvino.Core()
    plain = core.read_model(exported.file("frame.onnx"))
    openvino.save_model(plain, tmp_path / "plain" / "model.xml", compress_to_fp16=False)
    ours, theirs = (sum(file.stat().st_size for file in folder.iterdir()) for folder in (engine, tmp_path / "plain"))
    assert ours < theirs * (0.8 if exported.config["precision"] == "int8" else 1.0)
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.integers(0, 256, zero.shape, np.uint8) if zero.dtype == np.uint8 else rng.normal(0, 1, zero.shape)
        for name, zero in zeros(exported).items()
    }
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    image, expected = (
        core.compile_model(model, "CPU", settings)(feeds)["image"]
        for model in (core.read_model(engine / "model.xml"), plain)
    )
    assert expected.std() > 1
    assert psnr_db(image[0], expected[0]) > (45 if exported.config["precision"] == "int8" else 90)
    kinds = Counter(operation.get_type_name() for operation in core.read_model(engine / "model.xml").get_ops())
    assert not kinds["ShapeOf"]


@pytest.mark.parametrize("exported", ["int8"], indirect=True)
def test_int8_shows_in_the_kind(tiny_graph: Artifact, exported: Artifact, engine: Path) -> None:
    pytest.importorskip("openvino")
    runtime = runtimes.load("openvino")
    runtime.build(exported, "frame", engine, OPTIONS)
    layers = runtime.profile(engine, exported.signatures["frame"], OPTIONS, zeros(exported), 1)
    quantized = [node.name for node in onnx.load(exported.file("frame.onnx")).graph.node if node.op_type == "Gemm"]
    kinds = {name: layer.kind for layer in layers for name in layer.names if name in quantized}
    assert any(kind.lower().endswith("i8") for kind in kinds.values())


def test_refuses_what_run_refuses(runtime: Any, graph: Artifact, engine: Path, tiny: Any) -> None:
    runtime.build(graph, "frame", engine, OPTIONS)
    feeds = tiny.feeds(0)
    with pytest.raises(SignatureError, match="noise"):
        runtime.profile(engine, tiny.SIGNATURE, OPTIONS, {**feeds, "noise": feeds["noise"][..., :1]}, 1)
    with pytest.raises(ConfigError, match="0 runs: expected at least 1; ask for more"):
        runtime.profile(engine, tiny.SIGNATURE, OPTIONS, feeds, 0)
    with pytest.raises(ConfigError, match=r"unknown .* option 'speed'"):
        runtime.profile(engine, tiny.SIGNATURE, {"speed": 1}, feeds, 1)


def test_torch_says_why_not(graph: Artifact, engine: Path, tiny: Any) -> None:
    with pytest.raises(
        BackendError, match=r"torch cannot say what each layer costs, because it runs the student itself"
    ):
        runtimes.load("torch").profile(engine, tiny.SIGNATURE, {}, tiny.feeds(0))


def test_onnxruntime_on_a_gpu_says_why_not(
    graph: Artifact, engine: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ort = pytest.importorskip("runtimes.ort")
    monkeypatch.setattr(ort.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(BackendError, match="its profiler times only the launch of kernels on CUDAExecutionProvider"):
        ort.profile(engine, tiny.SIGNATURE, {"provider": "CUDAExecutionProvider"}, tiny.feeds(0))


def test_the_median_leaves_the_warm_up_out() -> None:
    times = [9.0] * profiling.WARM_UP + [1.0, 3.0, 2.0]
    entries = [(kernel, (kernel,), "kind", factor * s) for s in times for kernel, factor in (("a", 1), ("b", 10))]
    assert profiling.medians(entries) == [LayerTime(("a",), "kind", 2.0), LayerTime(("b",), "kind", 20.0)]


class ProfiledEngine(FakeEngine):
    """An engine that reports two layers whenever it runs, and describes the first."""

    described = """{"Layers": [{"Name": "__myl_Fc_0", "TacticName": "sm86_gemm",
        "Metadata": "[ONNX Layer: /a/MatMul]\\u001e[ONNX Layer: /a/Add]"}, "text"]}"""

    def create_engine_inspector(self) -> SimpleNamespace:
        return SimpleNamespace(get_engine_information=lambda form: self.described)

    def report(self) -> None:
        for context in self.contexts:
            if profiler := getattr(context, "profiler", None):
                for layer, ms in (("__myl_Fc_0", 2.0), ("/b/Conv + PWN(/b/Relu)", 1.0), ("Reformatting CopyNode", 0.5)):
                    profiler.report_layer_time(layer, ms)
                return


def test_tensorrt_reports_by_its_profiler(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control flow only: the stand-in has neither kernels nor times."""
    cuda = FakeCuda()
    monkeypatch.setattr(trt_cuda, "runtime_api", lambda: cuda)

    def compute(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        engine.report()
        return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in tiny.SIGNATURE.outputs}

    engine = ProfiledEngine(cuda, tiny.SIGNATURE, compute)
    module = SimpleNamespace(IProfiler=object, LayerInformationFormat=SimpleNamespace(JSON=1))
    library = Library(module, "tensorrt", "10.3.0", True, (), (), True, True, {}, (), False)
    with ExitStack() as resources:
        session = TensorRTSession(library, engine, tiny.SIGNATURE, resources, 1, False)
        resources.callback(session.close)
        assert profile.layer_times(library, session, tiny.feeds(0), 4) == [
            LayerTime(("/a/MatMul", "/a/Add"), "sm86_gemm", 2e-3),
            LayerTime(("/b/Conv", "/b/Relu"), "/b/Conv + PWN(/b/Relu)", 1e-3),
            LayerTime((), "Reformatting CopyNode", 5e-4),
        ]
