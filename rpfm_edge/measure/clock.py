"""Latency, memory and the machine. It knows nothing of graphs: it times a call that returns once its work is done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rpfm_edge.core.errors import ConfigError

Call = Callable[[], object]
STABLE_TOLERANCE = 0.05
STABLE_BLOCKS = 10
SETTLE_S = 0.05  # the threads of ONNX Runtime spin on for so long after a call


@dataclass(frozen=True)
class Latency:
    """The times of a call in seconds, in the order in which they were measured; never empty, without the warm-up."""

    values_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values_s:
            raise ConfigError("no times were measured", expected="at least one run", fix="measure with more runs")

    @cached_property
    def _percentiles(self) -> tuple[float, float, float]:
        p50, p95, p99 = np.percentile(self.values_s, [50, 95, 99])
        return float(p50), float(p95), float(p99)

    @property
    def p50_s(self) -> float:
        """The median."""
        return self._percentiles[0]

    @property
    def p95_s(self) -> float:
        """The 95th percentile, linearly interpolated."""
        return self._percentiles[1]

    @property
    def p99_s(self) -> float:
        """The 99th percentile, linearly interpolated."""
        return self._percentiles[2]

    @property
    def mean_s(self) -> float:
        """The mean."""
        return float(np.mean(self.values_s))

    @property
    def fps(self) -> float:
        """Calls per second at the median, ``1 / p50_s``."""
        return 1 / self.p50_s if self.p50_s else float("inf")

    @property
    def jitter_s(self) -> float:
        """The mean absolute difference of successive times; 0 for a single run."""
        return float(np.mean(np.abs(np.diff(self.values_s)))) if len(self.values_s) > 1 else 0.0

    @property
    def stable(self) -> bool:
        """Whether the times had settled: ``is_stable``."""
        return is_stable(self.values_s)

    def to_json(self) -> dict[str, Any]:
        """The figures and the raw values."""
        names = ("p50_s", "p95_s", "p99_s", "mean_s", "fps", "jitter_s", "stable")
        return {"runs": len(self.values_s), **{n: getattr(self, n) for n in names}, "values_s": list(self.values_s)}


def measure(call: Call, warmup: int = 5, min_runs: int = 50, min_seconds: float = 3.0) -> Latency:
    """Time ``call`` until both ``min_runs`` and ``min_seconds`` are reached, after ``warmup`` uncounted calls."""
    _check_counts(warmup, min_runs)
    check_seconds(min_seconds)
    for _ in range(warmup):
        call()
    values: list[float] = []
    start = time.perf_counter()
    while len(values) < min_runs or time.perf_counter() - start < min_seconds:
        values.append(_timed(call))
    return Latency(tuple(values))


def interleaved(calls: Mapping[str, Call], rounds: int, warmup: int = 5, settle_s: float = 0.0) -> dict[str, Latency]:
    """Time several calls in turns, so that their ratios hold on a machine whose speed drifts.

    Every round times each call once; odd rounds go backwards, so that none always follows the same one.

    Args:
        settle_s: above 0, a call is repeated for so long before it is timed, once at least: then it follows itself.
    """
    _check_counts(warmup, rounds)
    for call in calls.values():
        for _ in range(warmup):
            call()
    values: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            _settle(calls[name], settle_s)
            values[name].append(_timed(calls[name]))
    return {name: Latency(tuple(times)) for name, times in values.items()}


def steady(calls: Mapping[str, Call], rounds: int, warmup: int = 0) -> dict[str, Latency]:
    """``interleaved``, where each call that is timed follows others of its own for ``SETTLE_S``.

    So it does not follow another library's, whose threads still spin for a while and whose weights fill the cache; that
    is how frames follow each other in a stream.
    """
    return interleaved(calls, rounds, warmup, SETTLE_S)


def _settle(call: Call, seconds: float) -> None:
    left = seconds
    while left > 0:
        left -= _timed(call)


def _check_counts(warmup: int, runs: int) -> None:
    if warmup < 0 or runs < 1:
        raise ConfigError(
            f"{warmup} warm-up and {runs} measured runs", expected="at least 0 and at least 1", fix="ask for more runs"
        )


def check_seconds(seconds: float) -> None:
    """Raise ``ConfigError`` unless a run of so many seconds can be."""
    if not 0 <= seconds < math.inf:
        raise ConfigError(
            f"{seconds:g} seconds of measuring", expected="finite and at least 0", fix="correct the seconds"
        )


def _timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def is_stable(values: Sequence[float]) -> bool:
    """Whether a series has settled: the median of its second half is within 5 % of the first half's, and of ten blocks
    in order at least eight have their median within 5 % of the whole's. Fewer than ten values cannot tell: False.
    """
    series = np.asarray(values, np.float64)
    if series.size < STABLE_BLOCKS:
        return False
    first, second = (float(np.median(half)) for half in np.array_split(series, 2))
    medians = np.array([np.median(block) for block in np.array_split(series, STABLE_BLOCKS)])
    center = float(np.median(series))
    near = np.abs(medians - center) <= STABLE_TOLERANCE * center
    return abs(second - first) <= STABLE_TOLERANCE * first and int(near.sum()) >= 8
