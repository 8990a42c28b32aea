"""OpenVINO: the IR, devices and precision, and memory that is shared with the caller."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.cache import cache_folder
from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError
from rpfm_edge.core.signature import Signature, TensorSpec
from rpfm_edge.measure.joints import cached_file

openvino = pytest.importorskip("openvino")
from runtimes import ov  # noqa: E402

OPTIONS = {"threads": 1}


@pytest.fixture
def built(graph: Artifact, engine: Path) -> Path:
    ov.build(graph, "frame", engine, OPTIONS)
    return engine


def test_weights_keep_their_type_and_value(built: Path, tiny: Any) -> None:
    assert {file.name for file in built.iterdir()} == {"model.xml", "model.bin"}
    constants = [
        op for op in openvino.Core().read_model(built / "model.xml").get_ops() if op.get_type_name() == "Constant"
    ]
    (conv,) = (op.data for op in constants if tuple(op.data.shape) == tiny.weights()["conv"].shape)
    assert conv.dtype == np.float32
    np.testing.assert_array_equal(conv, tiny.weights()["conv"])


def test_float_weights_of_a_quantized_graph_are_stored_in_half(
    make_graph: Callable[..., Artifact], engine: Path, built: Path, tiny: Any
) -> None:
    """Scales, biases and results stay; the file has the weights in half the bytes."""
    ov.build(make_graph(precision="int8"), "frame", engine, OPTIONS)
    constants = [op for op in openvino.Core().read_model(engine / "model.xml").get_ops() if "Const" in str(op)]
    (conv,) = (op.data for op in constants if tuple(op.data.shape) == tiny.weights()["conv"].shape)
    np.testing.assert_array_equal(conv, tiny.weights()["conv"].astype(np.float16))
    assert not any(op.data.dtype == np.float16 and op.data.ndim < 2 for op in constants)
    feeds = tiny.feeds(0)
    with ov.open(engine, tiny.SIGNATURE, OPTIONS) as half:
        tokens = half.run(feeds)["tokens"]
    with ov.open(built, tiny.SIGNATURE, OPTIONS) as whole:
        np.testing.assert_allclose(tokens, whole.run(feeds)["tokens"], atol=5e-3)


def test_weights_beyond_the_range_of_half_stay_whole() -> None:
    """65504 is the largest number in FP16; more would be infinite."""
    x = openvino.opset13.parameter([2, 2], np.float32)
    weights = [np.array([[1, 2], [3, top]], np.float32) for top in (65504, -1e6)]
    first, second = (openvino.opset13.constant(weight) for weight in weights)
    model = openvino.Model([openvino.opset13.matmul(openvino.opset13.add(x, first), second, False, False)], [x])
    ov._halve_weights(model)
    stored = [op.data for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]
    assert [values.dtype for values in stored] == [np.float16, np.float32]
    for values, weight in zip(stored, weights, strict=True):
        np.testing.assert_array_equal(values, weight)


def test_a_device_that_is_not_there(graph: Artifact, engine: Path) -> None:
    with pytest.raises(
        BackendError, match=r"finds no device GPU\.7: expected AUTO or one of \['CPU'.*install its driver"
    ):
        ov.build(graph, "frame", engine, {"device": "GPU.7"})


def test_auto_chooses_a_device(built: Path, tiny: Any) -> None:
    with ov.open(built, tiny.SIGNATURE, {"device": "AUTO"}) as auto, ov.open(built, tiny.SIGNATURE, OPTIONS) as cpu:
        feeds = tiny.feeds(0)
        np.testing.assert_allclose(auto.run(feeds)["tokens"], cpu.run(feeds)["tokens"], atol=1e-5)


def test_threads_belong_to_the_cpu(graph: Artifact, engine: Path) -> None:
    with pytest.raises(ConfigError, match=r"option threads is 2 on AUTO: expected threads for device CPU only"):
        ov.build(graph, "frame", engine, {"device": "AUTO", "threads": 2})


@pytest.mark.parametrize(("name", "value"), [("hint", "FAST"), ("precision_hint", "int8"), ("device", 0)])
def test_refuses_values(graph: Artifact, engine: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"openvino option {name} is {value!r}: expected "):
        ov.build(graph, "frame", engine, {name: value})


def test_options_reach_the_plugin(built: Path) -> None:
    core = openvino.Core()
    options = {"threads": 1, "hint": "THROUGHPUT", "precision_hint": "f32"}
    device, properties = ov.compile_settings(core, options)
    compiled = core.compile_model(built / "model.xml", device, properties)
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("PERFORMANCE_HINT") == "THROUGHPUT"
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


def test_devices_are_named() -> None:
    assert list(ov.devices()) == openvino.Core().available_devices
    assert all(ov.devices().values())


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_damaged_ir(built: Path, tiny: Any, name: str, damage: str) -> None:
    file = built / name
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    with (
        pytest.raises(
            ArtifactError, match=r"model\.xml is missing or damaged \(.+\).* build the engine again"
        ) as caught,
        ov.open(built, tiny.SIGNATURE, OPTIONS),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_an_onnx_file_that_is_none(graph: Artifact, engine: Path) -> None:
    (graph.path / "frame.onnx").write_bytes(b"\x08nothing")
    with pytest.raises(BackendError, match=r"OpenVINO cannot read .*frame\.onnx \(.+\): expected an ONNX graph"):
        ov.build(graph, "frame", engine, OPTIONS)


def test_an_engine_of_another_graph(built: Path, tiny: Any) -> None:
    noise = TensorSpec("noise", (1, tiny.CHANNELS, 16, 16), "float32")
    other = Signature((tiny.SIGNATURE.inputs[0], noise, tiny.SIGNATURE.inputs[2]), tiny.SIGNATURE.outputs)
    message = (
        r"inputs noise float32\[1, 4, 8, 6\], .*: expected noise float32\[1, 4, 16, 16\], .*build the engine again"
    )
    with pytest.raises(ArtifactError, match=message), ov.open(built, other, OPTIONS):
        pass


def test_nothing_is_kept_that_could_be_loaded_damaged(built: Path, tmp_path: Path, tiny: Any) -> None:
    """OpenVINO's cache has no checksums: thousands of altered bytes gave another picture without a word."""
    before = sorted(tmp_path.rglob("*"))
    with ov.open(built, tiny.SIGNATURE, OPTIONS) as session:
        session.run(tiny.feeds(0))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_default_cache_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RPFM_EDGE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("tensorrt") == tmp_path / ".cache" / "rpfm-edge" / "tensorrt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_folder("tensorrt") == tmp_path / "own" / "rpfm-edge" / "tensorrt"
    assert cached_file() == tmp_path / "own" / "rpfm-edge" / "pose" / "pose_landmark_full.tflite"
    (tmp_path / "file").touch()
    monkeypatch.setenv("RPFM_EDGE_CACHE", str(tmp_path / "file"))
    assert cache_folder("tensorrt") is None


def test_feeds_are_kept_no_longer_than_the_session(built: Path, tiny: Any) -> None:
    feeds = tiny.feeds(0)
    alive = {name: weakref.ref(array) for name, array in feeds.items()}
    with ov.open(built, tiny.SIGNATURE, OPTIONS) as session:
        session.run(feeds)
        del feeds
        gc.collect()
        assert alive["noise"]() is not None  # the request still points at its memory
        session.run(tiny.feeds(1))
        gc.collect()
        assert alive["noise"]() is None
