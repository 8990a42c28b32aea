"""FP8 graphs: rounding against torch's E4M3, what is quantized and what is not, and ONNX Runtime's own traps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from quantize import apply, calibrate, fp8
from quantize.execute import Graph
from quantize.layers import constants, plan
from quantize.typed import SMALLEST
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, ConfigError
from rpfm_edge.measure.metrics import psnr_db


@pytest.fixture(scope="module")
def tiny_fp8(tiny_graph: Artifact, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return apply.quantize(tiny_graph, "fp8", tmp_path_factory.mktemp("fp8") / "graph", samples)


def one_layer(kind: str, weight: np.ndarray, shape: tuple[int, ...]) -> onnx.ModelProto:
    """x → y through one Conv (padding 1), Gemm or MatMul, named "layer"."""
    options = {"pads": [1, 1, 1, 1]} if kind == "Conv" else {}
    node = helper.make_node(kind, ["x", "w"], ["y"], "layer", **options)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def rounded(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def half(scale: torch.Tensor) -> torch.Tensor:
    """As FP16 holds it."""
    return scale.half().float()


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul"])
def test_computes_what_torch_does_with_e4m3(kind: str) -> None:
    rng = np.random.default_rng(0)
    shape, kernel = ((1, 3, 6, 5), (4, 3, 3, 3)) if kind == "Conv" else ((7, 12), (12, 5))
    x, w = (rng.standard_normal(one, dtype=np.float32) for one in (shape, kernel))
    w[..., 0] *= 30  # so that channels differ
    found = Graph(fp8.insert(one_layer(kind, w, shape), {"layer"}, {"x": 2.0}))({"x": x})
    others = (1, 2, 3) if kind == "Conv" else (0,)
    scale = half(torch.from_numpy(w).abs().amax(others, keepdim=True) / 448)
    source, weight = rounded(torch.from_numpy(x), half(torch.tensor(2 / 448))), rounded(torch.from_numpy(w), scale)
    expected = torch.nn.functional.conv2d(source, weight, padding=1) if kind == "Conv" else source @ weight
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-4)
    exact = Graph(one_layer(kind, w, shape))({"x": x})
    assert np.abs(found - exact).max() > 0.01  # something was rounded, and what is above 2 was clipped


def test_scales_that_fp16_cannot_hold() -> None:
    weight = np.full((16, 3), 1e-3, np.float32)
    weight[:, 1], weight[:, 2] = 0, 5
    model = fp8.insert(one_layer("Gemm", weight, (1, 16)), {"layer"}, {"x": 1e-9})
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert tensors["w.fp8_scale"][0] == tensors["x.fp8_scale"] == SMALLEST
    for scale in (tensors["w.fp8_scale"], tensors["x.fp8_scale"]):
        assert (scale.astype(np.float16) == scale).all()
    stored = tensors["w.fp8"].astype(np.float32) * tensors["w.fp8_scale"]
    np.testing.assert_allclose(stored, weight, rtol=1 / 16)  # half a step of three bits
    assert (stored[:, 1] == 0).all()


def test_the_planned_layers_are_fp8_and_no_other(tiny_graph: Artifact, tiny_fp8: Artifact) -> None:
    for name in ("prepare", "frame"):
        before, after = (onnx.load(graph.file(f"{name}.onnx")) for graph in (tiny_graph, tiny_fp8))
        wanted = set(plan(before).quantized)
        makers = {output: node for node in after.graph.node for output in node.output}
        found = {
            node.name
            for node in after.graph.node
            if node.op_type in ("Conv", "Gemm", "MatMul")
            and all(tensor in makers and makers[tensor].op_type == "DequantizeLinear" for tensor in node.input[:2])
        }
        assert found == wanted
        counts = Counter(node.op_type for node in before.graph.node if node.name in wanted)
        assert tiny_fp8.config["fp8_layers"][name] == counts
        types = {tensor.name: tensor.data_type for tensor in after.graph.initializer}
        for node in after.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                assert [types[tensor] for tensor in node.input[1:]] == [TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN]


def test_what_the_artifact_holds(tiny_graph: Artifact, tiny_fp8: Artifact) -> None:
    assert set(tiny_fp8.files) == {"prepare.onnx", "frame.onnx", "noise.npy"}
    assert tiny_fp8.config["precision"] == "fp8"
    assert tiny_fp8.signatures == tiny_graph.signatures
    sizes = [graph.file("prepare.onnx").stat().st_size for graph in (tiny_fp8, tiny_graph)]
    assert sizes[0] < 0.6 * sizes[1]
    assert tiny_fp8.lineage[-1].config["psnr_db"] > 30


def test_steps_share_their_weights(tiny_graph: Artifact, tiny_fp8: Artifact) -> None:
    before, after = (onnx.load(graph.file("frame.onnx")) for graph in (tiny_graph, tiny_fp8))
    wanted = set(plan(before).quantized)
    fixed = constants(before)
    shared = {node.input[1] for node in before.graph.node if node.name in wanted and node.input[1] in fixed}
    stored = [
        one for one in after.graph.initializer if one.data_type == TensorProto.FLOAT8E4M3FN and one.name[-4:] == ".fp8"
    ]
    assert len(stored) == len(shared) < len(wanted)


def test_onnx_runtime_keeps_every_relu(tiny_fp8: Artifact, samples: Path) -> None:
    """ONNX Runtime 1.32 drops a ReLU in front of an FP32 quantizer to FP8, as if 0 were the least E4M3; not in FP16."""
    feeds = next(calibrate.load(samples).feeds("frame"))
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    file = tiny_fp8.file("frame.onnx")
    literal = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    assert psnr_db(literal.run(None, dict(feeds))[0][0], Graph(file)(feeds)[0]) > 30


def test_needs_samples(tiny_graph: Artifact, tmp_path: Path) -> None:
    for precision in ("fp8", "nvfp4"):
        with pytest.raises(ConfigError, match=f"{precision} without calibration samples: expected a file of samples"):
            apply.quantize(tiny_graph, precision, tmp_path / "out")  # type: ignore[arg-type]


def test_is_not_quantized_again(tiny_fp8: Artifact, samples: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is in fp8 already: expected an fp32 graph"):
        apply.quantize(artifact.load(tiny_fp8.path, "graph"), "fp8", tmp_path / "out", samples)
