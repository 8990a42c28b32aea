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
from rpfm_edge.core.precisions import ROWS
from rpfm_edge.core.runtime import Known, Session
from rpfm_edge.measure.metrics import psnr_db

FILE = "canary.safetensors"

BF16_DB = 25.0  # as ``Row.engine_db``, for an engine whose float layers were asked to be BF16


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
    graph: Artifact, name: str, session: Session, tensors: Known, engine: str, floor_db: float | None = None
) -> dict[str, float]:
    """Run ``session``, the ``engine`` ("tensorrt 10.3.0") of graph ``name``, on the canary; returns dB by output.

    ``floor_db``: what it must reach, where that is not its precision's ``engine_db``.

    Raises:
        ParityError: an output is further from ONNX Runtime's than that.
    """
    precision = str(graph.config.get("precision", "fp32"))
    floor, boundary = floor_db or ROWS[precision].engine_db, graph.signatures[name]
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
