"""The canary of a bundle: inputs, and what ONNX Runtime makes of them, so that an engine can be compared on a device.

Libraries have shipped kernels that are wrong for transformers (TensorRT 10.3: github.com/NVIDIA/TensorRT/issues/4419),
and nothing but a comparison tells.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

import runtimes
from rpfm_edge.artifact import Artifact
from rpfm_edge.errors import ArtifactError, BackendError, ParityError
from rpfm_edge.metrics import psnr_db
from rpfm_edge.pipeline import GIVEN_JOINTS
from rpfm_edge.pose import pose_input, pose_kind, to_graph
from rpfm_edge.runtime import Session
from rpfm_edge.signature import TensorSpec
from rpfm_edge.splits import open_splits

FILE = "canary.safetensors"

# Least ratio of signal to error in dB, of images (peak 255) and of keys and values (their own power). Two right
# implementations of the shipped student's graphs differ by 64 dB and more in FP16, and in INT8, where a value between
# two levels may go to either, by 47 dB in images and 39 dB in keys and values; wrong ones by some 20 dB. In FP8 it was
# 43 and 37 dB, in NVFP4 35 and 27 dB, between ONNX Runtime and itself with FP32 in place of FP16.
FLOORS_DB = {
    "fp32": 45.0,
    "fp16": 45.0,
    "int8": 30.0,
    "int8-weights": 30.0,
    "int4-weights": 30.0,
    "fp8": 30.0,
    "nvfp4": 20.0,
}

Tensors = Mapping[str, np.ndarray]
_last: dict[tuple[Path, str], dict[str, np.ndarray]] = {}  # the graphs of a build are compared one after the other


def record(graph: Artifact) -> dict[str, np.ndarray] | None:
    """Tensor name → array, of every input and output of the graphs of ``graph``: the first pair of the packaged sample,
    its keypoints where they are asked for, the artifact's noise, and the tensors that ``prepare`` makes. None without
    ONNX Runtime, or if it refuses a graph. Floats are FP16, and the inputs that were used are those rounded.
    """
    try:
        made = _record(graph)
    except BackendError:
        return None
    _last.clear()
    _last[graph.path, graph.digest] = made
    return made


def _record(graph: Artifact) -> dict[str, np.ndarray]:
    runtime = runtimes.load("onnxruntime")
    known: dict[str, np.ndarray] = {}
    for name, signature in graph.signatures.items():
        for spec in signature.inputs:
            if spec.name not in known:
                known[spec.name] = _compact(_input(graph, spec))
        with tempfile.TemporaryDirectory() as scratch:
            runtime.build(graph, name, Path(scratch), {})
            with runtime.open(Path(scratch), signature, {}) as session:
                outputs = session.run({spec.name: known[spec.name].astype(spec.dtype) for spec in signature.inputs})
        known |= {tensor: _compact(array) for tensor, array in outputs.items()}
    return known


def of(graph: Artifact) -> Tensors | None:
    """What ``graph`` carries, or else what ``record`` makes of it, or has just made of it.

    Raises:
        ArtifactError: the file that it carries cannot be read.
    """
    if FILE not in graph.files:
        return _last.get((graph.path, graph.digest)) or record(graph)
    try:
        found: Tensors = load_file(graph.file(FILE))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{graph.path / FILE} cannot be read ({error})", expected="a canary", fix="copy the bundle again"
        ) from None
    return found


def content(tensors: Tensors) -> bytes:
    """The bytes of ``FILE``."""
    data: bytes = save({name: np.ascontiguousarray(array) for name, array in tensors.items()})
    return data


def check(graph: Artifact, name: str, session: Session, tensors: Tensors, engine: str) -> dict[str, float]:
    """Run ``session``, the ``engine`` ("tensorrt 10.3.0") of graph ``name``, on the canary; returns dB by output.

    Raises:
        ParityError: an output is further from ONNX Runtime's than ``FLOORS_DB`` allows.
    """
    precision = str(graph.config.get("precision", "fp32"))
    floor, boundary = FLOORS_DB[precision], graph.signatures[name]
    outputs = session.run({spec.name: tensors[spec.name].astype(spec.dtype) for spec in boundary.inputs})
    found = {tensor: _distance_db(tensors[tensor], array) for tensor, array in outputs.items()}
    for tensor, distance_db in found.items():
        if not distance_db >= floor:  # nan must not pass
            raise ParityError(
                f"{engine} computes {tensor} of graph {name} wrongly, {distance_db:.1f} dB from ONNX Runtime",
                expected=f"at least {floor:g} dB in {precision}",
                fix="build with another version of the library, or another precision",
            )
    return {tensor: round(distance_db, 1) for tensor, distance_db in found.items()}


def _input(graph: Artifact, spec: TensorSpec) -> np.ndarray:
    if spec.dtype == "uint8" or spec.name in ("pose", GIVEN_JOINTS):
        return _sample(spec, spec.shape[1:3] if spec.dtype == "uint8" else graph.config["size"])
    if spec.name == "noise" and "noise.npy" in graph.files:
        return np.asarray(np.load(graph.file("noise.npy"), allow_pickle=False))
    return np.random.default_rng(0).standard_normal(spec.shape, dtype=np.float32)


def _sample(spec: TensorSpec, shape: Sequence[int]) -> np.ndarray:
    """Photo, keypoints or pose, for pictures of ``shape``."""
    sample, size = open_splits("sample").test, (int(shape[0]), int(shape[1]))
    source, target = (int(index) for index in sample.pairs[0])
    if spec.name == "source":
        return np.asarray(sample.image(source, size)[None])
    if spec.name == GIVEN_JOINTS:
        return to_graph(sample.pose(source, size))[None]
    return pose_input(sample.pose(target, size), pose_kind(spec), size)


def _compact(array: np.ndarray) -> np.ndarray:
    """FP16 where it holds the values."""
    if array.dtype != np.float32:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.isfinite(half).all() else array


def _distance_db(expected: np.ndarray, found: np.ndarray) -> float:
    if expected.dtype == np.uint8:
        return min(psnr_db(one, other) for one, other in zip(expected, found, strict=True))
    exact = expected.astype(np.float64)
    error = float(np.mean((found - exact) ** 2))
    return float(10 * np.log10(np.mean(exact**2) / error)) if error else float("inf")
