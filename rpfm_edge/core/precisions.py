"""Precisions that only some backends and GPUs compute in, and the refusal of the others before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rpfm_edge.core.backends import BACKENDS, runs_student
from rpfm_edge.core.errors import ConfigError

Precision = Literal["fp32", "fp16", "int8", "int8-weights", "int4-weights", "fp8", "nvfp4"]


@dataclass(frozen=True, slots=True)
class Row:
    """A precision of a graph's inner layers.

    Attributes:
        graph_db: what a graph's image must reach against the float one's. It catches what is broken; the drift budget
            judges what is good. FP16: one grey level of error everywhere is 48 dB, and 2.5 levels are no rounding any
            more. INT8: published few-step transformers keep 22 to 27 dB with 8-bit weights and activations
            (deepcompressor, against their own FP16). The shipped student keeps 37 dB in FP8 and 29 dB in NVFP4, and on
            random pictures, which nobody trained on, 45 dB with INT8 weights and 30 dB with INT4 weights; without its
            ReLUs it is at 7 dB.
        engine_db: what an engine must reach against ONNX Runtime's run of the same graph: images by their peak, keys
            and values by their own power. Two right implementations of the shipped student's graphs differ by 64 dB and
            more in FP16, and in INT8, where a value between two levels may go to either, by 47 dB in images and 39 dB
            in keys and values; wrong ones by some 20 dB. In FP8 it was 43 and 37 dB, in NVFP4 35 and 27 dB, between
            ONNX Runtime and itself with FP32 in place of FP16.
        calibrated: on samples.
        weight_bits: where only weights are rounded.
        capability: the least compute capability of NVIDIA's GPUs that compute in it, and ``gpus``, who has it.
        data_type: TensorRT's, by strongly typed networks, and ``tensorrt``, which one has it.
    """

    graph_db: float
    engine_db: float
    calibrated: bool = False
    weight_bits: Literal[8, 4] | None = None
    capability: str = "0.0"
    gpus: str = "all"
    data_type: str = "FLOAT"
    tensorrt: str = ""


ROWS: dict[str, Row] = {
    "fp32": Row(45.0, 45.0),
    "fp16": Row(40.0, 45.0),
    "int8": Row(20.0, 30.0, calibrated=True),
    "int8-weights": Row(30.0, 30.0, weight_bits=8, data_type="INT8", tensorrt="TensorRT 10 or later"),
    "int4-weights": Row(20.0, 30.0, weight_bits=4, data_type="INT4", tensorrt="TensorRT 10 or later"),
    "fp8": Row(
        20.0,
        30.0,
        calibrated=True,
        capability="8.9",
        gpus="Ada, Hopper, Blackwell, Jetson Thor",
        data_type="FP8",
        tensorrt="TensorRT 10 or later",
    ),
    "nvfp4": Row(
        20.0,
        20.0,
        calibrated=True,
        capability="10.0",
        gpus="Blackwell, Jetson Thor",
        data_type="FP4",
        tensorrt="TensorRT 10.8 or later",
    ),
}
PRECISIONS = tuple(ROWS)
CALIBRATED = tuple(name for name, row in ROWS.items() if row.calibrated)
LEAST_SAMPLES = 8  # fewer show too little of the range of an activation


def supports(facts: Mapping[str, Any], precision: str) -> bool | None:
    """Whether the GPU computes in ``precision``; None if the GPU is not known."""
    capability = facts.get("compute_capability")
    least = ROWS[precision].capability if precision in ROWS else "0.0"
    found, wanted = (tuple(map(int, (one or "0").split("."))) for one in (capability, least))
    return found >= wanted if capability else None


def require_samples(what: str, samples: int, precisions: Iterable[str]) -> None:
    """Raise ``ConfigError``, of ``what``, if ``samples`` are too few for one of ``precisions`` that is calibrated."""
    calibrated = next((one for one in precisions if one in (*CALIBRATED, "auto")), None)
    if calibrated and samples < LEAST_SAMPLES:
        raise ConfigError(
            f"{what} for {calibrated}", expected=f"at least {LEAST_SAMPLES}", fix="ask for more, such as 64"
        )


def computes(backend: str, precision: str) -> bool:
    """Whether there is an engine of a student in ``precision`` for ``backend``."""
    return _fits(backend, precision) and (precision == "fp32" or not runs_student(backend))


def _fits(backend: str, precision: str) -> bool:
    """Whether ``backend`` computes in ``precision``, which all do but for those that only some rows name."""
    named = [name for name, row in BACKENDS.items() if precision in row.narrow]
    return not named or backend in named


def require_backends(precision: str, backends: Iterable[str]) -> None:
    """Raise ``ConfigError`` for the first of ``backends`` that does not compute in ``precision``."""
    for backend in backends:
        if not _fits(backend, precision):
            able = [name for name in BACKENDS if _fits(name, precision)]
            raise ConfigError(
                f"{backend} does not compute in {precision}",
                expected=f"the backend {' or '.join(able)}",
                fix=f"quantize to int8 or fp16 for {backend}",
            )


def require_gpus(precision: str, capabilities: Iterable[str]) -> None:
    """Raise ``ConfigError`` for the first of ``capabilities``, such as "8.6", whose GPUs lack ``precision``."""
    for capability in capabilities:
        if supports({"compute_capability": capability}, precision) is False:
            row = ROWS[precision]
            raise ConfigError(
                f"GPUs of compute capability {capability} do not compute in {precision}",
                expected=f"{row.capability} or later: {row.gpus}",
                fix="quantize to int8 or fp16 for them",
            )


Method = Literal["ptq", "sweep", "accuracy-control"]
METHODS = get_args(Method)


def check_method(method: str, least_psnr_db: float | None, precision: str) -> None:
    """Raise ``ConfigError`` for a method of INT8 that is unknown or does not fit the rest."""
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}", expected=f"one of {METHODS}", fix="check the spelling")
    if method != "ptq" and precision != "int8":
        raise ConfigError(f"method {method} for {precision}", expected="int8", fix="leave the method out")
    if least_psnr_db is not None and method != "accuracy-control":
        raise ConfigError(
            f"a least PSNR for method {method}", expected="method accuracy-control", fix="choose it, or leave it out"
        )
