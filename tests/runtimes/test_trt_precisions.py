"""FP8 and NVFP4 on TensorRT: built where GPU and library have them, refused with a reason where one has not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpfm_edge.chain.build import build as build_bundle
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import BackendError, ConfigError
from rpfm_edge.measure import canary
from runtimes.trt import api, backend, build
from runtimes.trt import backend as trt
from runtimes.trt.cuda import Device
from tests.runtimes import trt_log


@pytest.mark.parametrize(("precision", "capability"), [("fp8", "8.6"), ("nvfp4", "8.9")])
def test_a_target_that_lacks_it(make_graph: Any, engine: Path, precision: str, capability: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    words = f"GPUs of compute capability {capability} do not compute in {precision}: expected .*; quantize to int8 or"
    with pytest.raises(ConfigError, match=words):
        backend.build(make_graph(precision=precision), "frame", engine, {"compute_capability": f"12.0 {capability}"})
    assert not list(engine.iterdir())


def test_a_device_that_lacks_it(make_graph: Any, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(trt, "device", lambda: Device("Orin", "8.7", "12.6"))
    with pytest.raises(
        ConfigError, match=r"GPUs of compute capability 8\.7 do not compute in fp8: expected 8\.9 or later"
    ):
        backend.build(make_graph(precision="fp8"), "frame", engine, {})
    assert not list(engine.iterdir())


@pytest.mark.parametrize(
    ("version", "flags", "types", "precision", "needed"),
    [
        ("8.6.2", ("FP16",), ("FP8",), "fp8", "TensorRT 10 or later"),
        ("8.6.2", ("FP16",), (), "nvfp4", r"TensorRT 10\.8 or later"),
        ("10.3.0", (), ("FP8",), "nvfp4", r"TensorRT 10\.8 or later"),
    ],
)
def test_a_library_that_lacks_it(
    version: str, flags: tuple[str, ...], types: tuple[str, ...], precision: str, needed: str
) -> None:
    module = SimpleNamespace(DataType=SimpleNamespace(**dict.fromkeys(types)))
    library = api.Library(module, "tensorrt", version, True, (), flags, not flags, True, {}, (), False)
    with pytest.raises(
        BackendError, match=f"tensorrt {version} does not build {precision}: expected {needed}; update it"
    ):
        build.require_precision(library, precision)
    build.require_precision(library, "int8")
    newer = replace(library, precision_flags=(), module=SimpleNamespace(DataType=SimpleNamespace(FP8=0, FP4=0)))
    build.require_precision(newer, precision)


@pytest.fixture(scope="module")
def samples(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    calibrate = pytest.importorskip("quantize.calibrate")
    from rpfm_edge.people.data import sample_root
    from rpfm_edge.people.deepfashion import open_split

    out: Path = tmp_path_factory.mktemp("samples") / "a.safetensors"
    return Path(calibrate.record(tiny_graph, open_split(sample_root(), "test"), out, 8))


@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_the_whole_way_to_an_engine(
    tiny_graph: Artifact, samples: Path, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized, and built by the backend for a GPU that is not here; the log says what the kernels compute in."""
    pytest.importorskip("tensorrt_rtx")
    from quantize import apply

    log: list[str] = []

    def build_plan(*arguments: Any) -> bytes:
        return build.build_plan(*arguments, log=log.append)

    monkeypatch.setattr(trt, "build_plan", build_plan)
    graph = apply.quantize(tiny_graph, precision, tmp_path / "quantized", samples)
    made = build_bundle(graph.path, tmp_path / "bundle", ["tensorrt"], {"tensorrt": {"compute_capability": "12.0"}})
    assert {"engines/tensorrt/prepare/model.plan", "engines/tensorrt/frame/model.plan", canary.FILE} <= set(made.files)
    for kind, name in (("fp8", "FP8"), ("nvfp4", "FP4E2M1")):
        wanted: Counter[str] = Counter()
        for found in graph.config.get(f"{kind}_layers", {}).values():
            wanted.update(found)
        assert trt_log.products(log, name) == wanted
