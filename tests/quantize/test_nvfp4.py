"""NVFP4 graphs: rounding by brute force, both forms of a graph against each other, and which layers it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from quantize import apply, nvfp4
from quantize.execute import Graph
from quantize.layers import plan
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.fixture(scope="module")
def tiny_nvfp4(tiny_graph: Artifact, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return apply.quantize(tiny_graph, "nvfp4", tmp_path_factory.mktemp("nvfp4") / "graph", samples)


def linear(width: int = 48, transposed: bool = False) -> onnx.ModelProto:
    """x (5, width) → y (5, 16), FP16, through the Gemm "layer"."""
    weight = np.random.default_rng(1).standard_normal((width, 16)).astype(np.float16)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer", transB=int(transposed))
    x, y = (helper.make_tensor_value_info(*name, (5, n)) for name, n in ((("x", 10), width), (("y", 10), 16)))
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    tensors = [numpy_helper.from_array(stored, "w"), numpy_helper.from_array(np.ones(16, np.float16), "b")]
    graph = helper.make_graph([node], "g", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


class TRT_FP4DynamicQuantize(OpRun):
    """What NVIDIA documents of it: the scale of a block is its largest magnitude over 6, in E4M3 of the outer scale."""

    op_domain = "trt"

    def _run(self, x: np.ndarray, scale: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        blocks = x.astype(np.float64).reshape(len(x), -1, 16)
        scales = np.minimum(np.abs(blocks).max(-1) / 6 / scale, 448).astype(ml_dtypes.float8_e4m3fn)
        steps = scales.astype(np.float64)[..., None] * scale
        values = nearest(np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0))
        return values.reshape(x.shape).astype(ml_dtypes.float4_e2m1fn), scales


def nearest(values: np.ndarray) -> np.ndarray:
    """The nearest number of the grid; of two as near the one with an even code."""
    distance = np.abs(np.abs(values)[..., None] - GRID) + 1e-9 * (np.arange(8) % 2)
    return np.sign(values) * GRID[distance.argmin(-1)]


def test_blocks_against_brute_force() -> None:
    matrix = np.random.default_rng(0).standard_normal((6, 64), dtype=np.float32) * np.float32(
        [[1], [30], [0.01], [1], [1], [0]]
    )
    found = nvfp4.to_blocks(matrix)
    assert found.scale == np.float32(np.abs(matrix).max() / (6 * 448))
    assert found.scales.shape == (6, 4)
    assert found.scales.astype(np.float32).max() == 448
    steps = np.repeat(found.scales.astype(np.float64) * found.scale, 16, axis=1)
    used = steps > 0
    np.testing.assert_array_equal(found.values.astype(float)[used], nearest(matrix[used] / steps[used]))
    assert not found.dequantized()[5].any()
    error = np.abs(found.dequantized() - matrix)[[0, 1, 3, 4]].reshape(4, 4, 16)
    largest = np.abs(matrix[[0, 1, 3, 4]]).reshape(4, 4, 16).max(-1, keepdims=True)
    assert (error <= largest * (1 / 6 + 1 / 16)).all()  # half the last step, and what E4M3 loses of the scale


def test_zeros_stay_zeros() -> None:
    assert not nvfp4.to_blocks(np.zeros((2, 32), np.float32)).dequantized().any()


@pytest.mark.parametrize("transposed", [False, True])
def test_both_forms_compute_the_same(transposed: bool) -> None:
    """ONNX's reference runs the form for TensorRT, with the operator above; ONNX Runtime the other."""
    half, x = linear(transposed=transposed), np.random.default_rng(2).standard_normal((5, 48)).astype(np.float16)
    x[0, :16], x[1] = 0, x[1] * 20  # a block of zeros, and what saturates the scales
    plain, typed = (form(half, ["layer"], {"x": 3.0}) for form in (nvfp4._plain, nvfp4._typed))
    found = Graph(plain)({"x": x})
    expected = ReferenceEvaluator(typed, new_ops=[TRT_FP4DynamicQuantize]).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, expected, rtol=4e-3, atol=0.02)
    exact = Graph(half)({"x": x})
    assert 0.02 < np.abs(found[2:] - exact[2:]).mean() / np.abs(exact[2:]).mean() < 0.25
    assert np.abs(found[1]).mean() < 0.75 * np.abs(exact[1]).mean()


def test_what_is_fp4_and_what_is_fp8(tiny_graph: Artifact, tiny_nvfp4: Artifact) -> None:
    for name in ("prepare", "frame"):
        before, typed = onnx.load(tiny_graph.file(f"{name}.onnx")), onnx.load(tiny_nvfp4.file(f"typed/{name}.onnx"))
        wanted = set(plan(before).quantized)
        linears = {node.name for node in before.graph.node if node.name in wanted and node.op_type == "Gemm"}
        makers = {output: node for node in typed.graph.node for output in node.output}
        types = {tensor.name: tensor.data_type for tensor in typed.graph.initializer}
        for node in typed.graph.node:
            if node.name in linears:
                for factor in node.input[:2]:
                    source = makers[makers[factor].input[0]].input[0]
                    assert types.get(source) == TensorProto.FLOAT4E2M1 or makers[source].domain == "trt"
        counts = tiny_nvfp4.config["nvfp4_layers"][name], tiny_nvfp4.config["fp8_layers"][name]
        assert counts == ({"Gemm": len(linears)}, {"Conv": len(wanted - linears)})


def test_what_the_artifact_holds(tiny_graph: Artifact, tiny_nvfp4: Artifact) -> None:
    graphs = {"prepare.onnx", "frame.onnx"}
    assert set(tiny_nvfp4.files) == graphs | {f"typed/{name}" for name in graphs} | {"noise.npy"}
    assert tiny_nvfp4.signatures == tiny_graph.signatures
    drift = tiny_nvfp4.lineage[-1].config
    assert 20 < drift["psnr_db"] < 60
    assert "typed_psnr_db" not in drift


def test_widths_that_blocks_do_not_divide() -> None:
    model = linear(24)
    assert nvfp4.fitting(model, ["layer"]) == []
    assert nvfp4.fitting(linear(48), ["layer"]) == nvfp4.fitting(linear(48, transposed=True), ["layer"]) == ["layer"]


def test_no_width_that_fp4_allows(tiny_graph: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvfp4, "BLOCK", 1000)
    with pytest.raises(
        ArtifactError, match="no linear layer has an input width that FP4 allows: expected a multiple of"
    ):
        nvfp4.to_nvfp4(onnx.load(tiny_graph.file("prepare.onnx")), [])
