"""A tiny graph artifact, with its student, for every test of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPFM_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RPFM_EDGE_FACTORIES", "tiny_student")


@pytest.fixture(scope="session")
def tiny() -> Iterator[Any]:
    """The module ``tiny_student``, importable by that name as a factory's module must be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        import tiny_student

        yield tiny_student


@pytest.fixture
def make_graph(tmp_path: Path, tiny: Any) -> Callable[..., Artifact]:
    """Write the graph artifact; ``config`` adds to its config, ``external`` keeps the weights outside."""
    pytest.importorskip("onnx")

    def make(external: bool = False, student: bool = True, **config: Any) -> Artifact:
        import onnx
        from safetensors.numpy import save_file

        out = tmp_path / "graph"
        with artifact.replacing_folder(out, "graph") as folder:
            onnx.save(
                model(tiny),
                folder / "frame.onnx",
                save_as_external_data=external,
                location="frame.onnx.data",
                size_threshold=100,  # the convolution: shapes must stay in the graph
            )
            if student:
                (folder / "student").mkdir()
                save_file(tiny.weights(), folder / "student" / "model.safetensors")
                artifact.seal(folder / "student", "student", {}, {}, ())
            settings = {"factory": "tiny_student:factory"} | config
            artifact.seal(folder, "graph", settings, {"frame": tiny.SIGNATURE}, ())
        return artifact.load(out, "graph")

    return make


@pytest.fixture
def graph(make_graph: Callable[..., Artifact]) -> Artifact:
    return make_graph()


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An empty folder to build into."""
    folder = tmp_path / "engine"
    folder.mkdir()
    return folder


def nodes() -> list[Any]:
    """The operations of ``tiny_student``, from its inputs to its outputs."""
    import onnx

    def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
        return onnx.helper.make_node(kind, inputs.split(), [output], **attributes)

    return [
        node("Cast", "pose", "pose_float", to=onnx.TensorProto.FLOAT),
        node("Transpose", "pose_float", "pose_nchw", perm=[0, 3, 1, 2]),
        node("Div", "pose_nchw half_range", "pose_scaled"),
        node("Sub", "pose_scaled one", "pose_input"),
        node("Conv", "pose_input conv", "features", pads=[1, 1, 1, 1]),
        node("Add", "features noise", "latent"),
        node("Reshape", "latent flat", "latent_flat"),
        node("Transpose", "latent_flat", "x", perm=[0, 2, 1]),
        node("LayerNormalization", "x scale shift", "query", axis=-1, epsilon=1e-5),
        node("Gather", "source_kv zero", "key", axis=0),
        node("Gather", "source_kv first", "value", axis=0),
        node("Transpose", "key", "key_t", perm=[1, 0]),
        node("MatMul", "query key_t", "scores"),
        node("Div", "scores root", "scores_scaled"),
        node("Softmax", "scores_scaled", "attention", axis=-1),
        node("MatMul", "attention value", "attended"),
        node("Add", "x attended", "tokens"),
        node("MatMul", "tokens linear", "rgb"),
        node("Add", "rgb bias", "rgb_biased"),
        node("Add", "rgb_biased one", "rgb_shifted"),
        node("Mul", "rgb_shifted half_range", "rgb_levels"),
        node("Round", "rgb_levels", "rgb_rounded"),
        node("Clip", "rgb_rounded lowest highest", "rgb_clipped"),
        node("Reshape", "rgb_clipped image_shape", "rgb_image"),
        node("Cast", "rgb_image", "image", to=onnx.TensorProto.UINT8),
    ]


def model(tiny: Any) -> Any:
    """The ONNX model of ``tiny_student``."""
    import onnx
    from onnx import helper, numpy_helper

    floats = {"half_range": 127.5, "one": 1.0, "root": tiny.CHANNELS**0.5, "lowest": 0.0, "highest": 255.0}
    integers = {"zero": 0, "first": 1, "flat": (1, tiny.CHANNELS, -1), "image_shape": tiny.IMAGE}
    constants = (
        tiny.weights()
        | {name: np.array(value, np.float32) for name, value in floats.items()}
        | {name: np.array(value, np.int64) for name, value in integers.items()}
    )
    inputs, outputs = (
        [
            helper.make_tensor_value_info(s.name, helper.np_dtype_to_tensor_dtype(np.dtype(s.dtype)), s.shape)
            for s in side
        ]
        for side in (tiny.SIGNATURE.inputs, tiny.SIGNATURE.outputs)
    )
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes(), "frame", inputs, outputs, initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made
