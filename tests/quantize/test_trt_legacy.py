"""Graphs for TensorRT 8.6 (``runtimes.trt.legacy``): what they compute does not change.

That 8.6 takes them needs a GPU, and is not shown. The tests are in this folder for its INT8 graphs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import BackendError
from runtimes.trt import legacy

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
NAMES = ("prepare", "frame")


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], optimised: bool = True) -> np.ndarray:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    if not optimised:  # fusions would hide the difference of two orders of the same sums
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, feeds)[0]
    return output


def feeds(graph: Artifact, name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        spec.name: rng.integers(0, 256, spec.shape, np.uint8)
        if spec.dtype == "uint8"
        else rng.standard_normal(spec.shape, np.float32)
        for spec in graph.signatures[name].inputs
    }


@pytest.mark.parametrize("name", NAMES)
def test_float_weights_compute_the_same_bits(tiny_int8: Artifact, name: str) -> None:
    before = onnx.load(tiny_int8.file(f"{name}.onnx"))
    after = onnx.load(tiny_int8.file(f"{name}.onnx"))
    stored = [t for t in before.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    assert legacy.float_weights(after) == len(stored) > 0
    onnx.checker.check_model(after, full_check=True)
    assert not [t for t in after.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    given = feeds(tiny_int8, name)
    np.testing.assert_array_equal(run(after, given, optimised=False), run(before, given, optimised=False))


@pytest.mark.parametrize("name", NAMES)
def test_gelu_spelled_out(tiny_graph: Artifact, name: str) -> None:
    before, after = (onnx.load(tiny_graph.file(f"{name}.onnx")) for _ in range(2))
    count = sum(node.op_type == "Gelu" for node in before.graph.node)
    assert legacy.spell_out_gelu(after) == count > 0
    onnx.checker.check_model(after, full_check=True)
    assert not [node for node in after.graph.node if node.op_type == "Gelu"]
    given = feeds(tiny_graph, name)
    difference = run(after, given).astype(float) - run(before, given)
    assert np.abs(difference).max() <= (1 if name == "frame" else 1e-5)  # levels of grey, keys and values


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_both_kinds_of_gelu(approximate: str, kind: type) -> None:
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    x, y = (onnx.helper.make_tensor_value_info(name, element, (1001,)) for name in "xy")
    nodes = [
        onnx.helper.make_node("Identity", ["x"], ["z"]),
        onnx.helper.make_node("Gelu", ["z"], ["g"], approximate=approximate),
        onnx.helper.make_node("Identity", ["g"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    given = {"x": np.linspace(-5, 5, 1001).astype(kind)}
    expected = run(model, given)
    legacy.spell_out_gelu(model)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model, given), expected, atol=1e-6 if kind == np.float32 else 4e-3)


def test_a_file_is_rewritten_as_a_whole(tiny_int8: Artifact) -> None:
    model = onnx.load_from_string(legacy.legacy_bytes(tiny_int8.file("frame.onnx")))
    assert "Gelu" not in {node.op_type for node in model.graph.node}
    assert onnx.TensorProto.INT8 not in {t.data_type for t in model.graph.initializer if len(t.dims) > 1}


def test_without_onnx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendError, match=r"onnx is not installed .* run: pip install 'rpfm-edge\[tensorrt-8\]'"):
        legacy.legacy_bytes(tmp_path / "frame.onnx")
