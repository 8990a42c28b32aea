"""Graphs that align the source with keypoints: places are computed in FP32 whatever happens to the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import runtimes
from quantize import apply, calibrate, mixed
from quantize.execute import Graph
from quantize.float16 import to_float16
from quantize.layers import PRODUCTS, fixed_products, load, map_products, neighbours, plan
from quantize.mixed import Assignment
from quantize.order import default_units
from quantize.ranges import observe
from quantize.study import StudyConfig, allowed
from quantize.typed import to_typed
from quantize.units import units
from quantize.weight_only import to_weight_only
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.precisions import ROWS
from rpfm_edge.core.signature import Feeds
from rpfm_edge.core.source_map import exact_nodes, map_nodes, place_nodes
from rpfm_edge.measure.metrics import psnr_db
from rpfm_edge.people.data import Split
from tests.conftest import TINY_SIZE, TINY_STEPS
from tests.quantize.test_layers import modules

NAMES = ("prepare", "frame")
LEAST_DB = 40.0  # between two libraries that run one INT8 graph: a value between two levels may go to either


@pytest.fixture(scope="module")
def samples(aligned_graph: Artifact, people: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate.record(aligned_graph, people, tmp_path_factory.mktemp("calibration") / "a.safetensors", 16)


@pytest.fixture(scope="module")
def int8(aligned_graph: Artifact, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return apply.quantize(aligned_graph, "int8", tmp_path_factory.mktemp("int8") / "graph", samples)


@pytest.fixture(scope="module")
def frame(aligned_graph: Artifact) -> onnx.ModelProto:
    return load(aligned_graph.file("frame.onnx"))


@pytest.fixture(scope="module")
def feeds(samples: Path) -> list[Feeds]:
    return list(calibrate.load(samples).feeds("frame"))


def places(model: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    """What every GridSample gets as places, the finest first."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    grids = [node.input[1] for node in model.graph.node if node.op_type == "GridSample"]
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in grids)
    return sorted(Graph(copy).all(feeds)[1:], key=lambda grid: -grid.size)


def shift_px(model: onnx.ModelProto, exact: onnx.ModelProto, feeds: Feeds) -> float:
    """By how many pixels the places of two graphs differ, at most."""
    pairs = zip(places(model, feeds), places(exact, feeds), strict=True)
    return max(float(np.abs((a - b) * [TINY_SIZE[1] / 2, TINY_SIZE[0] / 2]).max()) for a, b in pairs)


def test_only_what_corrects_the_map_is_quantized(aligned_graph: Artifact) -> None:
    """By the plan against the student's modules; what the aligner's functions compute has no module."""
    quantized, kept = modules(aligned_graph, "frame")
    linears = [f"network.blocks.{block}.{name}" for block in (0, 1) for name in ("qkv", "proj", "mlp.0", "mlp.2")]
    assert {name: times for name, times in quantized.items() if "blocks" in name} == dict.fromkeys(linears, TINY_STEPS)
    stacks = {"first": 1, "low": 3, "second": 1, "third": 1, "fourth": 2}
    blocks = [f"{stack}.{block}.conv{k}" for stack, count in stacks.items() for block in range(count) for k in (1, 2)]
    aligner = {f"network.alignment.aligner.{name}" for name in (*blocks, "fall.1", "rise.0", "rise_again.0")}
    assert {name for name in quantized if "aligner" in name} == aligner
    assert "network.alignment.aligner.look" in kept
    conditioner = [f"conditioner.layers.{block}.conv{k}" for block in (1, 2) for k in (1, 2)]
    decoder = ["low.1.conv1", "low.1.conv2", "low.2.0", "middle.0.conv1", "middle.0.conv2", "middle.1.0"]
    decoder += ["high.0.conv1", "high.0.conv2"]
    inner = {*(f"network.{name}" for name in conditioner), *(f"autoencoder.{name}" for name in decoder)}
    assert {name for name in quantized if name.startswith(("network.cond", "autoencoder"))} == inner
    first = ["conditioner.layers.0", "conditioner.layers.3", "conditioner.patches", "conditioner.correction"]
    assert all(kept[f"network.{name}"] == 1 for name in first)
    assert all(kept[f"autoencoder.{name}"] == 1 for name in ("low.0", "join_fine"))


def test_places_are_computed_between_the_outermost_convolutions(frame: onnx.ModelProto) -> None:
    """Of the aligner's convolutions the places' own nodes are the first ones and those that make corrections."""
    exact = place_nodes(frame)
    convolutions = {node.name for node in frame.graph.node if node.op_type == "Conv" and node.name in exact}
    assert exact < map_nodes(frame)
    assert len(convolutions) == 2 + 1 + 2  # on limbs at 1/8 and at 1/4, on what is felt; two corrections
    assert {node.op_type for node in frame.graph.node if node.name in exact} >= {"MatMul", "Exp", "Div"}


def test_the_source_encoder_stays_float(aligned_graph: Artifact) -> None:
    quantized, kept = modules(aligned_graph, "prepare")
    assert not [name for name in quantized if "alignment" in name]
    assert kept["network.alignment.encoder.heat"] == kept["network.alignment.encoder.coarse"] == 1
    assert quantized["network.blocks.1.qkv"] == quantized["autoencoder.encoder.10"] == 1


@pytest.mark.parametrize("make", [to_float16, lambda model: to_weight_only(model, 8)[0]])
def test_half_precision_moves_no_place(frame: onnx.ModelProto, feeds: list[Feeds], make) -> None:  # type: ignore[no-untyped-def]
    made = make(frame)
    assert max(shift_px(made, frame, sample) for sample in feeds[:3]) < 0.01


def test_fp16_leaves_map_and_joints_in_single_precision(aligned_graph: Artifact) -> None:
    for name in NAMES:
        model = onnx.load(aligned_graph.file(f"{name}.onnx"))
        half = to_float16(model)
        inferred = onnx.shape_inference.infer_shapes(half, strict_mode=True).graph
        types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
        exact = exact_nodes(model)
        made = {types[output] for node in half.graph.node if node.name in exact for output in node.output}
        assert exact
        assert TensorProto.FLOAT16 not in made
        photo = [node for node in half.graph.node if node.op_type == "GridSample" and node.input[0] == "photo"]
        assert len(photo) == (name == "frame")
        kinds = {types[n.output[0]] for n in half.graph.node if n.op_type in PRODUCTS and n.name not in exact}
        assert kinds == {TensorProto.FLOAT16}


def test_no_place_is_cast(frame: onnx.ModelProto) -> None:
    half = to_float16(frame)
    own = {node.name for node in frame.graph.node}
    added = {node.output[0] for node in half.graph.node if node.op_type == "Cast" and node.name not in own}
    for node in half.graph.node:
        if node.name in place_nodes(frame) and node.op_type != "Conv":
            assert not added.intersection(node.input), node.name


def test_int8_rounds_features_but_no_place(aligned_graph: Artifact, int8: Artifact, feeds: list[Feeds]) -> None:
    exact = onnx.load(aligned_graph.file("frame.onnx"))
    for path in ("frame.onnx", "typed/frame.onnx"):
        model = onnx.load(int8.file(path))
        kinds = [{n.op_type for n in model.graph.node if n.name in part(model)} for part in (place_nodes, map_nodes)]
        assert not {"QuantizeLinear", "DequantizeLinear"} & kinds[0]
        assert {"QuantizeLinear", "DequantizeLinear"} < kinds[1]
        assert 0 < shift_px(model, exact, feeds[0]) < 1


def test_int8_keeps_the_joints(aligned_graph: Artifact, int8: Artifact, samples: Path) -> None:
    sample = next(calibrate.load(samples).feeds("prepare"))
    exact, rounded, typed = (
        Graph(path).named(sample)
        for path in (aligned_graph.file("prepare.onnx"), int8.file("prepare.onnx"), int8.file("typed/prepare.onnx"))
    )
    np.testing.assert_allclose(rounded["joints"], exact["joints"], atol=1e-3)
    np.testing.assert_allclose(typed["joints"], exact["joints"], atol=0.1)  # its encoder is in FP16
    assert np.abs(rounded["source_kv"] - exact["source_kv"]).max() > 1e-3  # it is quantized at all


def images(graph: Artifact, backend: str, feeds: list[Feeds], folder: Path) -> list[np.ndarray]:
    folder.mkdir()
    runtime, boundary = runtimes.load(backend), graph.signatures["frame"]
    runtime.build(graph, "frame", folder, {})
    with runtime.open(folder, boundary, {}) as session:
        return [session.run(sample)["image"][0] for sample in feeds]


def test_openvino_and_onnx_runtime_agree(int8: Artifact, feeds: list[Feeds], tmp_path: Path) -> None:
    """In a frame features and masks are joined before convolutions, where OpenVINO has been wrong."""
    ours, theirs = (images(int8, name, feeds[:4], tmp_path / name) for name in ("onnxruntime", "openvino"))
    assert min(psnr_db(a, b) for a, b in zip(ours, theirs, strict=True)) > LEAST_DB


def test_units_of_the_map_cannot_be_chosen(aligned_graph: Artifact, frame: onnx.ModelProto, tmp_path: Path) -> None:
    found = units(frame)
    fixed = {unit.name for unit in found if not unit.quantizable}
    assert {"align.conv0", "align.linear0"} <= fixed
    assert {name.split(".")[0] for name in fixed} == {"align"}
    assert {unit.name for unit in found} >= {"encoder.conv1", "decoder.conv0", "block1.qkv", *fixed}
    free, whole = allowed(frame, StudyConfig())
    assert whole
    assert not fixed & {unit.name for unit in free}
    assert not fixed & set(default_units(frame))
    products = {product for unit in found if unit.name in fixed for product in unit.products}
    assert products == fixed_products(frame, neighbours(frame)) < map_products(frame)
    assert products <= set(plan(frame, corrections=True).kept)
    assert "align.conv3" in {unit.name for unit in free}
    wrong, ranges = Assignment({"frame": ("align.conv0",)}), {name: dict[str, float]() for name in NAMES}
    with pytest.raises(ConfigError, match=r"align\.conv0 of graph frame in int8: expected the map in fp32"):
        mixed.write(aligned_graph, wrong, ranges, tmp_path / "out", {})


def test_a_mix_says_that_the_map_is_fp32(aligned_graph: Artifact, samples: Path, tmp_path: Path) -> None:
    recorded, ranges = calibrate.load(samples), {}
    for name in NAMES:
        model, given = load(aligned_graph.file(f"{name}.onnx")), list(recorded.feeds(name))[:2]
        ranges[name] = {tensor: seen.range("mse") for tensor, seen in observe(model, given, len(given)).items()}
    made = mixed.write(
        aligned_graph, Assignment({"frame": ("decoder.conv5",)}, rest="fp16"), ranges, tmp_path / "graph", {}
    )
    found = made.config["plan"]["frame"]
    assert found["align.conv0"] == "fp32"
    assert found["decoder.conv5"] == "int8"
    assert found["encoder.conv1"] == "fp16"
    assert onnx.load(made.file("typed/frame.onnx"))


def test_weights_of_the_map_stay_float(frame: onnx.ModelProto) -> None:
    for bits in (8, 4):
        model, _ = to_weight_only(frame, bits)  # type: ignore[arg-type]
        mapped = map_nodes(model)
        assert "DequantizeLinear" not in {node.op_type for node in model.graph.node if node.name in mapped}
        assert map_nodes(to_typed(model)) >= mapped


@pytest.mark.parametrize("precision", ["fp16", "int8-weights"])
def test_checks_without_samples_see_people(aligned_graph: Artifact, precision: str, tmp_path: Path) -> None:
    made = apply.quantize(aligned_graph, precision, tmp_path / "graph")  # type: ignore[arg-type]
    assert made.lineage[-1].config["psnr_db"] > ROWS[precision].graph_db


@pytest.mark.parametrize("precision", ["fp8", "nvfp4"])
def test_precisions_of_gpus(aligned_graph: Artifact, samples: Path, precision: str, tmp_path: Path) -> None:
    made = apply.quantize(aligned_graph, precision, tmp_path / "graph", samples)  # type: ignore[arg-type]
    given = next(calibrate.load(samples).feeds("frame"))
    exact, rounded = (onnx.load(graph.file("frame.onnx")) for graph in (aligned_graph, made))
    assert shift_px(rounded, exact, given) < 0.01
