"""The canary: what is recorded, that right engines pass, and that wrong ones and damaged files do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtimes
from rpfm_edge.chain import build
from rpfm_edge.chain.build import record
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.backends import BACKENDS
from rpfm_edge.core.errors import ArtifactError, BackendError, ParityError
from rpfm_edge.measure import canary


@pytest.fixture(scope="module")
def built(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build.build(tiny_graph.path, tmp_path_factory.mktemp("canary") / "bundle", ["onnxruntime"])


def test_a_bundle_carries_one(built: Artifact, tiny_graph: Artifact) -> None:
    tensors = canary.read(built)
    assert tensors is not None
    specs = {spec.name: spec for s in tiny_graph.signatures.values() for spec in (*s.inputs, *s.outputs)}
    assert {name: array.shape for name, array in tensors.items()} == {name: s.shape for name, s in specs.items()}
    assert tensors["source"].std() > 10  # a picture of a person
    assert tensors["pose"].max() == 255
    np.testing.assert_array_equal(tensors["noise"], np.load(built.file("noise.npy")).astype(np.float16))


def test_it_stays_when_engines_are_added(built: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, where ONNX Runtime is not installed."""
    monkeypatch.setitem(BACKENDS, "onnxruntime", replace(BACKENDS["onnxruntime"], libraries=("no_such_library",)))
    pytest.importorskip("openvino")
    again = build.build(built.path, tmp_path / "again", ["openvino"])
    assert again.files[canary.FILE] == built.files[canary.FILE]


@pytest.mark.parametrize("name", ["prepare", "frame"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_right_engines_pass(built: Artifact, tiny_graph: Artifact, tmp_path: Path, backend: str, name: str) -> None:
    if reason := runtimes.available()[backend]:
        pytest.skip(reason)
    runtime, tensors = runtimes.load(backend), canary.read(built)
    assert tensors is not None
    runtime.build(tiny_graph, name, tmp_path, {})
    with runtime.open(tmp_path, tiny_graph.signatures[name], {}) as session:
        found = canary.check(built, name, session, tensors, backend)
    assert set(found) == {spec.name for spec in tiny_graph.signatures[name].outputs}
    assert min(found.values()) > 55


class Wrong:
    """A session whose output is spoiled."""

    def __init__(self, session: Any, spoil: Any) -> None:
        self.session, self.spoil = session, spoil

    def run(self, feeds: Any) -> dict[str, np.ndarray]:
        return {name: self.spoil(array) for name, array in self.session.run(feeds).items()}


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("prepare", lambda array: array[:, :, ::-1]),  # heads in another order
        ("prepare", lambda array: array * np.nan),
        ("prepare", lambda array: array * 1.01),
        ("frame", lambda array: array[:, ::-1]),
        ("frame", lambda array: array ^ 4),  # four levels of grey
    ],
)
def test_wrong_engines_do_not(built: Artifact, name: str, spoil: Any) -> None:
    tensors = canary.read(built)
    assert tensors is not None
    engine = built.path / "engines" / "onnxruntime" / name
    with runtimes.load("onnxruntime").open(engine, built.signatures[name], {}) as session:
        message = rf"tensorrt 10\.3\.0 computes \w+ of graph {name} wrongly, \S+ dB from ONNX Runtime: .* 45 dB in fp32"
        with pytest.raises(ParityError, match=message):
            canary.check(built, name, Wrong(session, spoil), tensors, "tensorrt 10.3.0")  # type: ignore[arg-type]


def test_a_graph_without_one_makes_it_or_has_none(tiny_graph: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    made = record(tiny_graph)
    assert made is not None
    assert set(made) == {"source", "source_kv", "pose", "noise", "image"}

    def absent(name: str) -> None:
        raise BackendError("backend onnxruntime is not installed", expected="", fix="")

    monkeypatch.setattr(runtimes, "load", absent)
    assert record(tiny_graph) is None


def test_a_damaged_file(built: Artifact, tmp_path: Path) -> None:
    (tmp_path / canary.FILE).write_bytes(b"nothing")
    artifact.seal(tmp_path, "bundle", built.config, built.signatures, ())
    with pytest.raises(ArtifactError, match=r"canary\.safetensors cannot be read .*: expected a canary; copy"):
        canary.read(artifact.load(tmp_path))


def test_values_beyond_fp16_are_kept_in_fp32() -> None:
    large = np.array([1e6, 1.0], np.float32)
    assert build._compact(large).dtype == np.float32
    assert build._compact(large / 1e6).dtype == np.float16


def test_keypoints_are_those_of_a_person(aligned_graph: Artifact, tmp_path: Path) -> None:
    tensors = record(aligned_graph)
    assert tensors is not None
    assert tensors["pose"].shape == tensors["keypoints"].shape == (1, 18, 2)
    assert (tensors["pose"] != tensors["keypoints"]).any()
    for backend in ("onnxruntime", "openvino"):
        if runtimes.available()[backend]:
            continue
        runtime = runtimes.load(backend)
        for name in ("prepare", "frame"):
            folder = tmp_path / backend / name
            folder.mkdir(parents=True)
            runtime.build(aligned_graph, name, folder, {})
            with runtime.open(folder, aligned_graph.signatures[name], {}) as session:
                found = canary.check(aligned_graph, name, session, tensors, backend)
            assert min(found.values()) > 45
