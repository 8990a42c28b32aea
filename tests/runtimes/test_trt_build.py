"""ONNX → plan by the real parser and builder of tensorrt_rtx, which need no GPU: settings, progress and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import BackendError, ConfigError
from runtimes.trt import api, build
from runtimes.trt import build as trt_build
from runtimes.trt.build import MIB, Settings, build_plan, parser_cause

trt = pytest.importorskip("tensorrt_rtx", reason="run: pip install 'rpfm-edge[tensorrt-rtx]'")
onnx = pytest.importorskip("onnx")
AMPERE = Settings(targets=("8.6",))


@pytest.fixture(scope="module")
def library() -> api.Library:
    return api.load("tensorrt_rtx")


def write_graph(path: Path, *nodes: tuple[str, str, str], kind: int = 1) -> Path:
    """An ONNX file of a chain of (operation, input, output) from x (1, 4, 4, 3) to y."""
    made = [onnx.helper.make_node(op, [source], [to], f"/{op}_{to}") for op, source, to in nodes]
    x, y = (onnx.helper.make_tensor_value_info(name, kind, (1, 4, 4, 3)) for name in "xy")
    y.type.tensor_type.ClearField("shape")
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(made, "g", [x], [y]), opset_imports=opset), path)
    return path


def write_map(path: Path) -> Path:
    """An ONNX file whose node "places" makes the places of a GridSample."""
    nodes = [
        onnx.helper.make_node("Neg", ["grid"], ["at"], "places"),
        onnx.helper.make_node("GridSample", ["x", "at"], ["fetched"], "fetch"),
        onnx.helper.make_node("Neg", ["fetched"], ["y"], "other"),
    ]
    shapes = {"x": (1, 3, 4, 4), "grid": (1, 4, 4, 2), "y": (1, 3, 4, 4)}
    x, grid, y = (onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items())
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x, grid], [y]), opset_imports=opset), path)
    return path


def test_builds_a_graph_that_aligns_in_every_precision(
    aligned_graph: Artifact, library: api.Library, tmp_path: Path
) -> None:
    pytest.importorskip("nncf")
    from quantize import apply, calibrate
    from rpfm_edge.people.data import sample_root
    from rpfm_edge.people.deepfashion import open_split
    from runtimes.trt.backend import graph_file
    from tests.runtimes import trt_log

    samples = calibrate.record(aligned_graph, open_split(sample_root(), "test"), tmp_path / "samples", 8)
    half = apply.quantize(aligned_graph, "fp16", tmp_path / "fp16")
    int8 = apply.quantize(aligned_graph, "int8", tmp_path / "int8", samples)
    for graph in (aligned_graph, half, int8):
        for name in ("prepare", "frame"):
            log: list[str] = []
            assert build_plan(library, graph_file(graph, name, library), AMPERE, log=log.append)
            assert trt_log.int8_products(log) == graph.config.get("int8_layers", {}).get(name, {})


def test_builds_and_lists_the_layers(graph: Artifact, library: api.Library) -> None:
    log: list[str] = []
    plan = build_plan(library, graph.file("frame.onnx"), AMPERE, log=log.append)
    assert len(plan) > 1000
    assert any("LayerType: " in line and "Datatype: UInt8" in line for line in log)


def test_weights_beside_the_graph(make_graph: Any, library: api.Library) -> None:
    graph = make_graph(external=True)
    assert build_plan(library, graph.file("frame.onnx"), AMPERE)
    (graph.path / "frame.onnx.data").unlink()
    with pytest.raises(BackendError, match=r"cannot parse .*frame\.onnx \("):
        build_plan(library, graph.file("frame.onnx"), AMPERE)


def test_a_node_that_is_refused(tmp_path: Path, library: api.Library) -> None:
    """uint8 may enter and leave, but is not computed with."""
    file = write_graph(tmp_path / "frame.onnx", ("Transpose", "x", "y"), kind=onnx.TensorProto.UINT8)
    message = (
        r"^tensorrt_rtx \S+ cannot parse \S+frame\.onnx \(node /Transpose_y of type Transpose: first input has type "
        r"UInt8 but must have type [^/]*\): expected an ONNX graph that it supports; export it again, or update Tenso"
    )
    with pytest.raises(BackendError, match=message):
        build_plan(library, file, AMPERE)


@pytest.mark.parametrize("content", [b"", b"\x08nothing", None])
def test_an_onnx_file_that_is_none(tmp_path: Path, library: api.Library, content: bytes | None) -> None:
    file = tmp_path / "frame.onnx"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BackendError, match=r"cannot parse \S+frame\.onnx \(.+\): expected an ONNX graph"):
        build_plan(library, file, AMPERE)


def test_the_cause_as_old_parsers_give_it() -> None:
    error = SimpleNamespace(node=lambda: 7, desc=lambda: "No importer registered for op: Gelu\nmore")
    parser = SimpleNamespace(num_errors=1, get_error=lambda place: error)
    assert parser_cause(parser) == "node number 7: No importer registered for op: Gelu"
    assert parser_cause(SimpleNamespace(num_errors=0)) == "it has no outputs"


def test_settings_reach_the_builder(library: api.Library) -> None:
    logger = trt.Logger()  # the builder does not keep it
    builder = trt.Builder(logger)
    settings = replace(AMPERE, workspace_mib=64, optimization_level=1)
    config = build._config(library, builder, settings, detailed=True)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 * MIB
    assert config.builder_optimization_level == 1
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert not config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    assert config.get_compute_capability(0) == trt.ComputeCapability.SM86
    config = build._config(library, builder, replace(AMPERE, version_compatible=True), detailed=False)
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


@pytest.mark.parametrize(
    ("kinds", "half", "expected"),
    [
        (("QUANTIZE", "CONVOLUTION"), False, ["FP16", "INT8", "PREFER_PRECISION_CONSTRAINTS"]),
        (("CAST", "CONVOLUTION"), True, ["FP16", "PREFER_PRECISION_CONSTRAINTS"]),
        (("CONVOLUTION",), False, []),
    ],
)
def test_flags_where_types_are_not_strong(
    library: api.Library, kinds: tuple[str, ...], half: bool, expected: list[str], tmp_path: Path
) -> None:
    """As on 8.6: what the graph has is allowed, and norms, softmax and the source's map are told to stay in FP32."""
    graph = write_map(tmp_path / "frame.onnx")
    names = ("FP16", "INT8", "PREFER_PRECISION_CONSTRAINTS")
    flag = SimpleNamespace(**{name: name for name in names})
    module = SimpleNamespace(BuilderFlag=flag, float16="float16", float32="float32")
    output = SimpleNamespace(dtype="float16" if half else "float32")
    layers = [
        SimpleNamespace(type=SimpleNamespace(name=kind), name=name, get_output=lambda place: output)
        for kind, name in (*((kind, "other") for kind in kinds), ("NORMALIZATION", "n"), ("SOFTMAX", "s"))
    ]
    layers.append(SimpleNamespace(type=layers[0].type, name="places", get_output=lambda place: output))
    network = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
    flags: list[str] = []
    old = replace(library, module=module, precision_flags=names)
    build._allow_precisions(old, network, SimpleNamespace(set_flag=flags.append), graph)
    assert flags == expected
    told = [getattr(layer, "precision", None) for layer in layers]
    assert told == [None] * len(kinds) + ["float32"] * 2 + ["float32" if expected else None]


def test_hardware_compatibility_where_the_library_has_it(library: api.Library) -> None:
    level = SimpleNamespace(AMPERE_PLUS="ampere and later")
    config = SimpleNamespace()
    builder = SimpleNamespace(create_builder_config=lambda: config)
    module = SimpleNamespace(BuilderFlag=SimpleNamespace(), HardwareCompatibilityLevel=level)
    full = replace(library, module=module, targets={}, hardware_levels=("ampere_plus",))
    build._config(full, builder, Settings(hardware_compatible="ampere_plus"), detailed=False)
    assert config.hardware_compatibility_level == "ampere and later"


def test_a_library_that_does_not_start(graph: Artifact, library: api.Library) -> None:
    """As 8.6 and 10 do without a GPU."""

    def builder(logger: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    module = SimpleNamespace(ILogger=trt.ILogger, Builder=builder)
    with pytest.raises(BackendError, match=r"cannot start \(pybind11.*nullptr\): expected a GPU with a driver"):
        build_plan(replace(library, module=module), graph.file("frame.onnx"), Settings())


@pytest.mark.parametrize("targets", [("8.7",), ("8.6", "9.0")])
def test_a_gpu_that_cannot_be_built_for(graph: Artifact, library: api.Library, targets: tuple[str, ...]) -> None:
    message = rf"cannot build for compute capability {targets[-1]} from elsewhere: expected one of \['7\.5', .*'8\.6'"
    with pytest.raises(ConfigError, match=message):
        build_plan(library, graph.file("frame.onnx"), Settings(targets=targets))


def test_a_library_that_only_builds_where_it_runs(graph: Artifact, library: api.Library) -> None:
    full = replace(library, targets={})
    with pytest.raises(ConfigError, match="expected no compute_capability; build on the device itself"):
        build_plan(full, graph.file("frame.onnx"), AMPERE)


def test_a_library_without_a_builder(graph: Artifact, library: api.Library) -> None:
    lean = replace(library, name="tensorrt_lean", builds=False)
    with pytest.raises(BackendError, match="tensorrt_lean only runs engines: expected tensorrt or tensorrt_rtx"):
        build_plan(lean, graph.file("frame.onnx"), AMPERE)


def test_a_compatibility_that_the_library_lacks(graph: Artifact, library: api.Library) -> None:
    settings = replace(AMPERE, hardware_compatible="ampere_plus")
    with pytest.raises(ConfigError, match=r"has no hardware compatibility ampere_plus: expected one of \['no'\]"):
        build_plan(library, graph.file("frame.onnx"), settings)


def test_a_build_that_fails(graph: Artifact, library: api.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt.Builder, "build_serialized_network", lambda *arguments: None)
    message = (
        r"cannot build \S+frame\.onnx \(no reason given\): .* enough memory; close other programs, lower workspace"
    )
    with pytest.raises(BackendError, match=message):
        build_plan(library, graph.file("frame.onnx"), AMPERE)


def watched(monkeypatch: pytest.MonkeyPatch, advance: Any) -> None:
    @contextmanager
    def progress(title: str, total: float) -> Iterator[Any]:
        yield advance

    monkeypatch.setattr(trt_build, "progress", progress)


def test_progress(graph: Artifact, library: api.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    watched(monkeypatch, lambda done, note="": seen.append(done))
    build_plan(library, graph.file("frame.onnx"), AMPERE)
    assert len(seen) > 2
    assert (np.diff(seen) > 0).all()
    assert seen[-1] == 1


def test_an_interrupt_ends_the_build(graph: Artifact, library: api.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def interrupt(done: float, note: str = "") -> None:
        nonlocal steps
        steps += 1
        raise KeyboardInterrupt

    watched(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_plan(library, graph.file("frame.onnx"), AMPERE)
    assert steps == 1


def test_a_damaged_timing_cache_starts_anew(tmp_path: Path, library: api.Library) -> None:
    given: list[bytes] = []

    def create(content: bytes) -> str | None:
        given.append(content)
        return "cache" if content == b"" else None

    config = SimpleNamespace(create_timing_cache=create, set_timing_cache=lambda cache, ignore_mismatch: None)
    full, file = replace(library, times_tactics=True), tmp_path / "timing"
    assert build._timing_cache(full, config, file) == "cache"
    file.write_bytes(b"damaged")
    assert build._timing_cache(full, config, file) == "cache"
    assert given == [b"", b"", b"damaged", b""] or given == [b"", b"damaged", b""]
    assert build._timing_cache(library, config, file) is None
