"""Stages by place in the graph, against the exporter's names, which the code never looks at."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from rpfm_edge import api
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError
from rpfm_edge.core.runtime import LayerTime
from rpfm_edge.judge.breakdown import (
    ALIGNMENT,
    AROUND,
    DECODER,
    DRAWING,
    POSE,
    SOURCE,
    UNKNOWN,
    breakdown,
    by_stage,
    stages,
)
from rpfm_edge.people.splits import open_splits
from tests.conftest import TINY_SIZE, TINY_STEPS


@pytest.fixture(scope="module")
def tiny_bundle(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return api.build(tiny_graph.path, tmp_path_factory.mktemp("b") / "bundle", ["openvino", "onnxruntime", "torch"])


def names_say(name: str) -> str | None:
    """The stage that the exporter's name of a product gives away."""
    for part, stage in (("/pose_encoder/", POSE), ("/decoder/", DECODER), ("/latent_to_patches/", DECODER)):
        if part in name:
            return stage
    return None


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_stages_of_an_exported_graph(tiny_graph: Artifact, tmp_path: Path, precision: str) -> None:
    graph = tiny_graph if precision == "fp32" else api.quantize(tiny_graph.path, "sample", tmp_path / "g", precision)
    model = onnx.load(graph.file("frame.onnx"))
    found = stages(model)
    kinds = {node.name: node.op_type for node in model.graph.node}
    told = {name: stage for name in found if (stage := names_say(name))}
    assert {found[name] == stage for name, stage in told.items()} == {True}
    assert set(told.values()) == {POSE, DECODER}
    assert set(found.values()) == {POSE, SOURCE, DECODER, *(f"step {k + 1}" for k in range(TINY_STEPS))}
    products = Counter(stage for name, stage in found.items() if kinds[name] in ("MatMul", "Gemm"))
    each = {products[f"step {k + 1}"] for k in range(TINY_STEPS)}
    # embedding, head, and in each of 2 blocks: qkv, two of attention, projection, two of the perceptron
    assert each == {2 + 2 * 6}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_stages_of_a_graph_that_aligns(aligned_graph: Artifact, tmp_path: Path, precision: str) -> None:
    graph = aligned_graph
    if precision == "fp16":
        graph = api.quantize(graph.path, "sample", tmp_path / "g", precision)
    model = onnx.load(graph.file("frame.onnx"))
    found, kinds = stages(model), {node.name: node.op_type for node in model.graph.node}
    parts = (("/aligner/", ALIGNMENT), ("/conditioner/", POSE), ("/join_", DECODER), ("/low/low.", DECODER))
    parts = (*parts, ("/middle/", DECODER), ("/high/", DECODER))
    told = {
        name: stage for name in found for part, stage in parts if part in name and kinds[name] in ("Conv", "GridSample")
    }
    told = {name: ALIGNMENT if "/aligner/" in name else stage for name, stage in told.items()}
    assert {name: found[name] for name in told} == told
    assert set(told.values()) == {ALIGNMENT, POSE, DECODER}
    assert {found[name] for name, kind in kinds.items() if kind == "GridSample"} == {ALIGNMENT}
    products = Counter(stage for name, stage in found.items() if kinds[name] in ("MatMul", "Gemm"))
    assert {products[f"step {k + 1}"] for k in range(TINY_STEPS)} == {2 + 2 * 6}


def test_a_measured_frame_that_aligns(aligned_graph: Artifact, tmp_path: Path) -> None:
    bundle, test = api.build(aligned_graph.path, tmp_path / "bundle", ["openvino"]), open_splits("sample").test
    found = breakdown(bundle, "openvino", test.image(0, TINY_SIZE), test.pose(1, TINY_SIZE), rounds=3)
    times = {stage.stage: stage.seconds for stage in found["stages"]}
    assert list(times)[1:3] == [ALIGNMENT, POSE]
    assert times[ALIGNMENT] > 0


def test_a_state_may_start_around_a_prior() -> None:
    nodes = [
        ("Mul", ["noise", "half"], "scaled"),
        ("Add", ["pose", "scaled"], "start"),
        ("Relu", ["start"], "v"),
        ("Add", ["start", "v"], "next"),
        ("Relu", ["next"], "image"),
    ]
    found = stages(graph(nodes, ["pose", "noise"]))
    assert [found[name] for name in ("scaled", "start", "v", "next", "image")] == ["step 1"] * 4 + [DECODER]


def test_a_quantized_state_is_still_the_state() -> None:
    nodes = [
        ("QuantizeLinear", ["noise", "s", "z"], "q"),
        ("DequantizeLinear", ["q", "s", "z"], "x"),
        ("Relu", ["x"], "v"),
        ("Add", ["v", "x"], "next"),
        ("Add", ["next", "pose"], "other"),  # adds to the state what does not come from it: no update
        ("Relu", ["other"], "image"),
    ]
    found = stages(graph(nodes, ["pose", "noise", "source_kv"]))
    assert [found[n] for n in ("q", "x", "v", "next")] == ["step 1"] * 4
    assert [found[n] for n in ("other", "image")] == [DECODER] * 2


def graph(nodes: list[tuple[str, list[str], str]], inputs: list[str]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in inputs]
    made = [helper.make_node(kind, sources, [out], out) for kind, sources, out in nodes]
    output = helper.make_tensor_value_info(nodes[-1][2], TensorProto.FLOAT, [1])
    return helper.make_model(helper.make_graph(made, "g", values, [output]))


def test_graphs_that_are_no_frame() -> None:
    with pytest.raises(ArtifactError, match=r"inputs \['source'\]: expected pose and noise"):
        stages(graph([("Relu", ["source"], "kv")], ["source"]))
    with pytest.raises(ArtifactError, match="never adds to its noise"):
        stages(graph([("Relu", ["noise"], "image")], ["pose", "noise"]))


def test_kernels_of_several_nodes_and_of_none() -> None:
    where = {"p": POSE, "a": "step 1", "b": "step 1", "c": "step 10", "d": DECODER}
    layers = [
        LayerTime((), "reorder", 0.5),  # before all others: of the first
        LayerTime(("p",), "conv", 1),
        LayerTime((), "reorder", 4),  # between two stages: of none
        LayerTime(("a", "b", "p"), "fused", 2),
        LayerTime((), "norm", 3),  # between two kernels of step 1
        LayerTime(("b",), "gemm", 1),
        LayerTime(("c",), "gemm", 7),
        LayerTime(("d",), "conv", 5),
        LayerTime(("strange",), "convert", 1),
    ]
    found = by_stage(layers, where)
    assert found == {POSE: 1.5, "step 1": 6, "step 10": 7, DECODER: 6, UNKNOWN: 4}
    assert list(found) == [POSE, "step 1", "step 10", DECODER, UNKNOWN]
    assert sum(found.values()) == sum(layer.seconds for layer in layers)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_measured_frame(tiny_bundle: Artifact, backend: str) -> None:
    test = open_splits("sample").test
    found = breakdown(tiny_bundle, backend, test.image(0, TINY_SIZE), test.pose(1, TINY_SIZE), rounds=6)
    times = {stage.stage: stage.seconds for stage in found["stages"]}
    assert {DRAWING, POSE, "step 1", "step 2", DECODER, AROUND} <= set(times)
    assert all(times[stage] > 0 for stage in (DRAWING, POSE, "step 1", "step 2", DECODER))
    assert sum(stage.share for stage in found["stages"]) == pytest.approx(sum(times.values()) / found["frame_s"])
    assert times.get(UNKNOWN, 0) < 0.1 * found["frame_s"]
    assert np.isfinite(found["state"]["after"]["time_s"])
