"""The canary of a bundle: inputs, and what ONNX Runtime makes of them, so that an engine can be compared on a device.

Libraries have shipped kernels that are wrong for transformers (TensorRT 10.3: github.com/NVIDIA/TensorRT/issues/4419),
and nothing but a comparison tells.
"""

from __future__ import annotations

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, ParityError
from rpfm_edge.core.runtime import Known, Session
from rpfm_edge.measure.metrics import psnr_db

FILE = "canary.safetensors"

# Least ratio of signal to error in dB, of images (peak 255) and of keys and values (their own power). Two right
# implementations of the shipped student's graphs differ by 64 dB and more in FP16, and in INT8, where a value between
# two levels may go to either, by 47 dB in images and 39 dB in keys and values; wrong ones by some 20 dB. In FP8 it was
# 43 and 37 dB, in NVFP4 35 and 27 dB, between ONNX Runtime and itself with FP32 in place of FP16.
FLOORS_DB = {
    "fp32": 45.0,
    "fp16": 45.0,
    "bf16": 25.0,
    "int8": 30.0,
    "int8-weights": 30.0,
    "int4-weights": 30.0,
    "fp8": 30.0,
    "nvfp4": 20.0,
}


def read(graph: Artifact) -> Known | None:
    """What ``graph`` carries, if it does.

    Raises:
        ArtifactError: the file that it carries cannot be read.
    """
    if FILE not in graph.files:
        return None
    try:
        found: Known = load_file(graph.file(FILE))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{graph.path / FILE} cannot be read ({error})", expected="a canary", fix="copy the bundle again"
        ) from None
    return found


def content(tensors: Known) -> bytes:
    """The bytes of ``FILE``."""
    data: bytes = save({name: np.ascontiguousarray(array) for name, array in tensors.items()})
    return data


def check(
    graph: Artifact, name: str, session: Session, tensors: Known, engine: str, precision: str | None = None
) -> dict[str, float]:
    """Run ``session``, the ``engine`` ("tensorrt 10.3.0") of graph ``name``, on the canary; returns dB by output.

    ``precision``: that the engine computes in, where it is not the graph's.

    Raises:
        ParityError: an output is further from ONNX Runtime's than ``FLOORS_DB`` allows.
    """
    precision = precision or str(graph.config.get("precision", "fp32"))
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


def _distance_db(expected: np.ndarray, found: np.ndarray) -> float:
    if expected.dtype == np.uint8:
        return min(psnr_db(one, other) for one, other in zip(expected, found, strict=True))
    exact = expected.astype(np.float64)
    error = float(np.mean((found - exact) ** 2))
    return float(10 * np.log10(np.mean(exact**2) / error)) if error else float("inf")
