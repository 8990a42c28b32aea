"""Precisions that only some backends and GPUs compute in, and the refusal of the others before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from rpfm_edge.core.backends import BACKENDS, runs_student
from rpfm_edge.core.errors import ConfigError

GPUS = {  # precision → the least compute capability whose tensor cores compute in it, and who has it; the rest: all
    "fp8": ("8.9", "Ada, Hopper, Blackwell, Jetson Thor"),
    "nvfp4": ("10.0", "Blackwell, Jetson Thor"),
}


def supports(facts: Mapping[str, Any], precision: str) -> bool | None:
    """Whether the GPU computes in ``precision``; None if the GPU is not known."""
    capability = facts.get("compute_capability")
    least, _ = GPUS.get(precision, ("0.0", ""))
    found, wanted = (tuple(map(int, (one or "0").split("."))) for one in (capability, least))
    return found >= wanted if capability else None


Precision = Literal["fp32", "fp16", "int8", "int8-weights", "int4-weights", "fp8", "nvfp4"]
CALIBRATED = ("int8", "fp8", "nvfp4")  # on samples
LEAST_SAMPLES = 8  # fewer show too little of the range of an activation


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
            least, gpus = GPUS[precision]
            raise ConfigError(
                f"GPUs of compute capability {capability} do not compute in {precision}",
                expected=f"{least} or later: {gpus}",
                fix="quantize to int8 or fp16 for them",
            )


PRECISIONS = get_args(Precision)
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
