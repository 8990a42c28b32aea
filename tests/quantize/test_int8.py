"""INT8: that it happened, how weights and activations are stored, and that two runtimes see the same picture in it."""

from __future__ import annotations

import builtins
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from onnx import TensorProto, numpy_helper

import runtimes
from quantize import calibrate
from quantize.execute import Graph
from quantize.int8 import Int8Config, to_int8
from quantize.layers import plan
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, ConfigError
from rpfm_edge.core.signature import Feeds
from rpfm_edge.measure.metrics import psnr_db

# OpenVINO against ONNX Runtime: both round the same numbers, a few of them to the other neighbour.
AGREEMENT_DB, AGREEMENT = 40.0, 0.01  # of images, and relative, of keys and values


def few(samples: Path, name: str, count: int = 8) -> list[Feeds]:
    return list(islice(calibrate.load(samples).feeds(name), count))


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def weights(model: onnx.ModelProto) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Node → INT8 weight, scale, axis of the scale, for every layer whose weight is stored in INT8."""
    stored, found = initializers(model), {}
    maker = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        source = maker.get(node.input[1]) if node.op_type in ("Conv", "Gemm") else None
        if source and source.input[0] in stored:
            axis = next(attribute.i for attribute in source.attribute if attribute.name == "axis")
            found[node.name] = (stored[source.input[0]], stored[source.input[1]], axis)
    return found


@pytest.mark.parametrize("name", ["prepare", "frame"])
def test_planned_layers_are_int8_and_counted(tiny_graph: Artifact, tiny_int8: Artifact, name: str) -> None:
    """Counted by the stored weights here, by both inputs there."""
    exact, model = (onnx.load(graph.file(f"{name}.onnx")) for graph in (tiny_graph, tiny_int8))
    planned = plan(exact).quantized
    found = weights(model)
    assert set(found) == set(planned)
    kinds = {node.name: node.op_type for node in exact.graph.node}
    expected = {kind: [kinds[node] for node in planned].count(kind) for kind in ("Conv", "Gemm")}
    assert tiny_int8.config["int8_layers"][name] == expected
    assert min(expected.values()) > 0


@pytest.mark.parametrize("name", ["prepare", "frame"])
def test_weights_are_per_channel_symmetric_and_near_the_float_ones(
    tiny_graph: Artifact, tiny_int8: Artifact, name: str
) -> None:
    exact, model = (onnx.load(graph.file(f"{name}.onnx")) for graph in (tiny_graph, tiny_int8))
    floats, nodes = initializers(exact), {node.name: node for node in exact.graph.node}
    for layer, (stored, scale, axis) in weights(model).items():
        weight = floats[nodes[layer].input[1]]
        transposed = any(attribute.name == "transB" and attribute.i for attribute in nodes[layer].attribute)
        outputs = 0 if nodes[layer].op_type == "Conv" or transposed else 1
        assert axis % weight.ndim == outputs
        assert scale.shape == (weight.shape[outputs],)
        assert stored.dtype == np.int8
        assert np.abs(stored.astype(int)).max() <= 64
        shape = [-1 if place == outputs else 1 for place in range(weight.ndim)]
        error = np.abs(stored * scale.reshape(shape) - weight) / scale.reshape(shape)
        assert error.max() <= 0.5 + 1e-3


def test_every_activation_is_signed_and_has_no_zero_point(tiny_int8: Artifact) -> None:
    for name in ("prepare", "frame"):
        model = onnx.load(tiny_int8.file(f"{name}.onnx"))
        stored = initializers(model)
        zeros = [stored[node.input[2]] for node in model.graph.node if node.op_type.endswith("quantizeLinear")]
        assert zeros
        for zero in zeros:
            assert zero.dtype == np.int8
            assert not zero.any()


def test_the_options_reach_the_graph(tiny_graph: Artifact, samples: Path) -> None:
    model = onnx.load(tiny_graph.file("frame.onnx"))
    full, _ = to_int8(model, few(samples, "frame"), Int8Config(weights="full", activations="unsigned"))
    assert max(np.abs(stored.astype(int)).max() for stored, _, _ in weights(full).values()) == 127
    types = {tensor.data_type for tensor in full.graph.initializer}
    assert {TensorProto.INT8, TensorProto.UINT8} <= types


def test_signed_activations_keep_the_range(tiny_graph: Artifact, samples: Path) -> None:
    model = onnx.load(tiny_graph.file("frame.onnx"))
    stored = {}
    for kind in ("signed", "unsigned"):
        quantized, _ = to_int8(model, few(samples, "frame"), Int8Config(activations=kind))
        values = initializers(quantized)
        stored[kind] = {
            node.name: (values[node.input[1]], np.iinfo(values[node.input[2]].dtype).max)
            for node in quantized.graph.node
            if node.op_type == "QuantizeLinear"
        }
    assert {top for _, top in stored["unsigned"].values()} == {127, 255}
    for name, (scale, top) in stored["unsigned"].items():
        signed, other = stored["signed"][name]
        assert scale * top == pytest.approx(signed * other, rel=1e-6)


def test_steps_share_their_weights_unless_they_are_smoothed(tiny_graph: Artifact, samples: Path) -> None:
    """Smoothing each step by its own scales needs own copies; the picture stays as near as without."""
    model, feeds = onnx.load(tiny_graph.file("frame.onnx")), few(samples, "frame")
    plain, smooth = (to_int8(model, feeds, Int8Config(smooth_quant_alpha=alpha))[0] for alpha in (None, 0.5))
    sizes = [sum(v.nbytes for v in initializers(m).values() if v.dtype == np.int8) for m in (plain, smooth)]
    linears = sum(w.size for name, (w, _, _) in weights(smooth).items() if w.ndim == 2)
    assert sizes[1] - sizes[0] >= linears / 2
    expected = Graph(model)(feeds[0])[0]
    drift = [psnr_db(Graph(quantized)(feeds[0])[0], expected) for quantized in (plain, smooth)]
    assert drift[1] > drift[0] - 3


def run_on(backend: str, graph: Artifact, name: str, feeds: list[Feeds], folder: Path) -> np.ndarray:
    """The first output for each of ``feeds``, from the backend's own build and session."""
    runtime, engine = runtimes.load(backend), folder / f"{backend}-{name}"
    engine.mkdir()
    runtime.build(graph, name, engine, {})
    with runtime.open(engine, graph.signatures[name], {}) as session:
        return np.stack([next(iter(session.run(feed).values()))[0] for feed in feeds])


def test_openvino_and_onnxruntime_agree(tiny_int8: Artifact, samples: Path, tmp_path: Path) -> None:
    """Both graphs through both backends: OpenVINO goes wrong on some quantized layers; the plan keeps them in float."""
    images, source_kv = (
        [run_on(backend, tiny_int8, name, few(samples, name), tmp_path) for backend in ("openvino", "onnxruntime")]
        for name in ("frame", "prepare")
    )
    assert min(psnr_db(ours, theirs) for ours, theirs in zip(*images, strict=True)) >= AGREEMENT_DB
    assert np.linalg.norm(source_kv[0] - source_kv[1]) <= AGREEMENT * np.linalg.norm(source_kv[1])


@pytest.mark.parametrize("name", ["prepare", "frame"])
def test_openvino_runs_int8_kernels(tiny_int8: Artifact, name: str) -> None:
    """By OpenVINO's own account of what it executes: every quantized layer, and no other."""
    core = openvino.Core()
    compiled = core.compile_model(tiny_int8.file(f"{name}.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    facts = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ordered_ops()]
    layers = [fact for fact in facts if fact["layerType"].astype(str) in ("Convolution", "FullyConnected")]
    in_int8 = [fact for fact in layers if fact["runtimePrecision"].astype(str) in ("i8", "u8")]
    assert len(in_int8) == sum(tiny_int8.config["int8_layers"][name].values())


def test_nothing_is_printed(tiny_graph: Artifact, samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to_int8(onnx.load(tiny_graph.file("prepare.onnx")), few(samples, "prepare"))
    assert capsys.readouterr() == ("", "")


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"INT8 option weights is 'quarter': expected one of \('half', 'full'\)"):
        Int8Config(weights="quarter")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="INT8 option activations is 'float'"):
        Int8Config(activations="float")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"INT8 option smooth_quant_alpha is 1\.5: expected 0 to 1"):
        Int8Config(smooth_quant_alpha=1.5)


def test_nncf_that_skips_a_layer(tiny_graph: Artifact, samples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nncf

    class Skipping(nncf.IgnoredScope):
        def __init__(self, names: list[str]) -> None:
            super().__init__(names=[*names, "Gemm_skipped"])

    model = onnx.load(tiny_graph.file("prepare.onnx"))
    next(node for node in model.graph.node if node.name == plan(model).quantized[-1]).name = "Gemm_skipped"
    monkeypatch.setattr(nncf, "IgnoredScope", Skipping)
    with pytest.raises(ArtifactError, match="differs from its plan in 1 layers, Gemm_skipped first"):
        to_int8(model, few(samples, "prepare"))


def test_nncf_is_told_to_report_to_nobody_before_it_is_loaded(
    tiny_graph: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at NNCF_CI while it is imported."""
    monkeypatch.setenv("NNCF_CI", "")  # so that it is as before after the test
    monkeypatch.delenv("NNCF_CI")

    class Imported(Exception):
        pass

    def loads(name: str, *rest: Any) -> Any:
        if name == "nncf":
            raise Imported(os.environ.get("NNCF_CI", ""))
        return load(name, *rest)

    load = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", loads)
    with pytest.raises(Imported, match="1"):
        to_int8(onnx.load(tiny_graph.file("prepare.onnx")), [])
