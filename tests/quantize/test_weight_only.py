"""Weights alone in INT8 and INT4: rounded to nearest, stored once, and the same picture from two runtimes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import openvino
import pytest
from onnx import TensorProto, helper, numpy_helper

import runtimes
from quantize import apply, calibrate, weight_only
from quantize.execute import Graph
from quantize.weight_only import GROUP, Rounded, in_groups, per_channel, to_weight_only
from rpfm_edge.chain.build import build
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import BackendError
from rpfm_edge.core.signature import Feeds
from rpfm_edge.measure.metrics import psnr_db, sqnr_db
from runtimes.trt import api
from runtimes.trt.build import require_precision

NAMES = ("prepare", "frame")


@pytest.fixture(scope="module", params=["int8-weights", "int4-weights"])
def compressed(
    request: pytest.FixtureRequest, tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    return apply.quantize(tiny_graph, request.param, tmp_path_factory.mktemp(request.param) / "graph")


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def stored_weights(
    exact: onnx.ModelProto, model: onnx.ModelProto
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, bool]]:
    """Layer → its float weight, the integers, the scale of each one of them, and whether they are INT4."""
    floats, values, found = initializers(exact), initializers(model), {}
    originals = {node.name: node for node in exact.graph.node}
    makers = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        maker = makers.get(node.input[1]) if node.op_type in ("Conv", "Gemm", "MatMul") else None
        if maker:
            integers, scale, given = values[maker.input[0]].astype(int), values[maker.input[1]], attributes(maker)
            axis = given["axis"] % integers.ndim
            if given.get("block_size"):
                scale = np.repeat(scale, given["block_size"], axis)
            else:
                scale = scale.reshape([-1 if place == axis else 1 for place in range(integers.ndim)])
            weight = floats[originals[node.name].input[1]]
            grouped = values[maker.input[0]].dtype != np.int8
            found[node.name] = (weight, integers, np.broadcast_to(scale, weight.shape), grouped)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_rounded_to_nearest(tiny_graph: Artifact, compressed: Artifact, name: str) -> None:
    """INT8 without clipping; INT4 as near as its scale allows, and clipped only at its two ends."""
    exact, model = (onnx.load(graph.file(f"{name}.onnx")) for graph in (tiny_graph, compressed))
    fixed = set(initializers(exact))
    layers = {n.name for n in exact.graph.node if n.op_type in ("Conv", "Gemm", "MatMul") and n.input[1] in fixed}
    found = stored_weights(exact, model)
    assert set(found) == layers
    groups = 0
    for weight, integers, scale, grouped in found.values():
        assert (scale > 0).all()
        error = np.abs(weight / scale - integers)
        inside = error <= 0.5 + 1e-3
        if grouped:
            groups += 1
            assert np.isin(integers[~inside], (-8, 7)).all()
            assert inside.mean() > 0.9
        else:
            assert inside.all()
            assert np.abs(integers).max() == 127
    assert (groups > 0) == (compressed.config["precision"] == "int4-weights")


@pytest.mark.parametrize("name", NAMES)
def test_counts_and_shared_weights(tiny_graph: Artifact, compressed: Artifact, name: str) -> None:
    """The two steps of the frame share their weights: one tensor of integers for each float one."""
    exact, model = (onnx.load(graph.file(f"{name}.onnx")) for graph in (tiny_graph, compressed))
    kinds = [tensor.data_type for tensor in model.graph.initializer]
    counts = {"int4": kinds.count(TensorProto.INT4), "int8": kinds.count(TensorProto.INT8)}
    assert compressed.config["weight_layers"][name] == {kind: count for kind, count in counts.items() if count}
    layers = [
        node for node in exact.graph.node if node.op_type in ("Conv", "Gemm") and node.input[1] in initializers(exact)
    ]
    assert sum(counts.values()) == len({node.input[1] for node in layers})
    assert len(layers) > sum(counts.values()) or name == "prepare"
    assert "QuantizeLinear" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_run_along_the_sum_and_are_no_worse_than_plain_rounding(transposed: bool) -> None:
    """Against rounding with the largest magnitude at 7, and dequantized by ONNX Runtime, not by this code."""
    weight = np.random.default_rng(0).standard_normal((2 * GROUP, 5)).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=int(transposed))
    stored, scale, given = in_groups(node, 1, weight.T if transposed else weight)
    assert given == {"axis": int(transposed), "block_size": GROUP}
    assert scale.shape == ((5, 2) if transposed else (2, 5))
    back = dequantized(stored, scale, given)
    back = back.T if transposed else back
    plain = np.repeat(np.abs(weight.reshape(2, GROUP, 5)).max(axis=1) / 7, GROUP, axis=0)
    errors = [np.square(approximate - weight).sum() for approximate in (back, np.round(weight / plain) * plain)]
    assert errors[0] < 0.95 * errors[1]


def dequantized(stored: np.ndarray, scale: np.ndarray, given: dict[str, int]) -> np.ndarray:
    integers = stored.astype(helper.tensor_dtype_to_np_dtype(TensorProto.INT4))
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["d"], **given),
            helper.make_node("Add", ["d", "x"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, stored.shape)],
        [numpy_helper.from_array(array, name) for array, name in ((integers, "w"), (scale, "s"))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Graph(model)({"x": np.zeros(1, np.float32)})


def test_a_group_of_zeros_stays_one() -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"])
    stored, scale, _ = in_groups(node, 1, np.zeros((GROUP, 3), np.float32))
    assert not stored.any()
    assert (scale > 0).all()


@pytest.mark.parametrize("rounded", [per_channel, in_groups])
@pytest.mark.parametrize("magnitude", [0.0, 1e-9])
def test_scales_are_numbers_in_half(rounded: Callable[..., Rounded], magnitude: float) -> None:
    """FP16 forms of the graph have them: a channel of next to nothing has no scale that would be 0 there."""
    weight = np.random.default_rng(0).standard_normal((GROUP, 3)).astype(np.float32)
    weight[:, 1] *= magnitude
    stored, scale, _ = rounded(helper.make_node("Gemm", ["x", "w"], ["y"]), 1, weight)
    assert (np.abs(scale) >= np.finfo(np.float16).tiny).all()
    assert not stored[:, 1].any()
    assert stored[:, [0, 2]].any()


def run_on(backend: str, graph: Artifact, name: str, feeds: list[Feeds], folder: Path) -> np.ndarray:
    runtime, engine = runtimes.load(backend), folder / f"{backend}-{name}"
    engine.mkdir()
    runtime.build(graph, name, engine, {})
    with runtime.open(engine, graph.signatures[name], {}) as session:
        return np.stack([next(iter(session.run(feed).values()))[0] for feed in feeds])


def test_openvino_and_onnxruntime_agree(compressed: Artifact, samples: Path, tmp_path: Path) -> None:
    """OpenVINO rounds the activations of such layers on some CPUs, so not as near as in float."""
    feeds = {name: list(islice(calibrate.load(samples).feeds(name), 4)) for name in NAMES}
    images, source_kv = (
        [run_on(backend, compressed, name, feeds[name], tmp_path) for backend in ("openvino", "onnxruntime")]
        for name in ("frame", "prepare")
    )
    assert min(psnr_db(ours, theirs) for ours, theirs in zip(*images, strict=True)) >= 45
    assert np.linalg.norm(source_kv[0] - source_kv[1]) <= 0.01 * np.linalg.norm(source_kv[1])


def test_the_artifact(tiny_graph: Artifact, compressed: Artifact) -> None:
    """Smaller, with the same boundary, and with an FP16 form for strongly typed libraries that shows the same."""
    assert compressed.signatures == tiny_graph.signatures
    typed = {f"typed/{name}.onnx" for name in NAMES}
    assert set(compressed.files) == {f"{name}.onnx" for name in NAMES} | typed | {"noise.npy"}
    for name in NAMES:
        sizes = [graph.file(f"{name}.onnx").stat().st_size for graph in (compressed, tiny_graph)]
        assert sizes[0] < sizes[1]
    stage = compressed.lineage[-1]
    assert stage.config["precision"] == compressed.config["precision"]
    assert stage.config["typed_psnr_db"] == pytest.approx(stage.config["psnr_db"], abs=1.5)
    half = initializers(onnx.load(compressed.file("typed/frame.onnx")))
    assert {array.dtype for name, array in half.items() if name.endswith(".scale")} == {np.dtype(np.float16)}


def test_eight_bits_are_nearer_than_four(tiny_graph: Artifact, samples: Path) -> None:
    """In keys and values: the picture of a network that was not trained hardly depends on its inner layers."""
    model = onnx.load(tiny_graph.file("prepare.onnx"))
    feed = next(calibrate.load(samples).feeds("prepare"))
    exact = Graph(model)(feed)
    ratio_db = {bits: sqnr_db(exact, Graph(to_weight_only(model, bits)[0])(feed)) for bits in (8, 4)}
    assert ratio_db[8] > ratio_db[4] + 6
    assert ratio_db[4] > 15


def test_engines_hold_the_integers(compressed: Artifact, tmp_path: Path) -> None:
    """OpenVINO's IR has as many weights in INT4 and INT8 as the ONNX graph."""
    bundle = build(compressed.path, tmp_path / "bundle", ["openvino", "onnxruntime"])
    model = openvino.Core().read_model(bundle.file("engines/openvino/frame/model.xml"))
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant" and len(op.get_output_shape(0)) > 1]
    kinds = Counter(constant.get_element_type().get_type_name() for constant in constants)
    stored = compressed.config["weight_layers"]["frame"]
    assert {"int4": kinds["i4"], "int8": kinds["i8"]} == {"int4": 0, **stored}


@pytest.mark.parametrize("precision", ["int8-weights", "int4-weights"])
def test_tensorrt_that_is_too_old(precision: str) -> None:
    library = api.Library(
        SimpleNamespace(DataType=SimpleNamespace(INT8=0)),
        "tensorrt",
        "8.6.1",
        True,
        (),
        ("FP16",),
        False,
        True,
        {},
        (),
        False,
    )
    message = rf"^tensorrt 8\.6\.1 does not build {precision}: expected TensorRT 10 or later; update it, or quantize to"
    with pytest.raises(BackendError, match=message):
        require_precision(library, precision)


def test_nothing_is_printed(tiny_graph: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    to_weight_only(onnx.load(tiny_graph.file("prepare.onnx")), 4)
    assert capsys.readouterr() == ("", "")


def test_a_sum_that_no_group_divides_is_int8(tiny_graph: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only, "GROUP", 100)
    assert set(to_weight_only(onnx.load(tiny_graph.file("prepare.onnx")), 4)[1]) == {"int8"}
