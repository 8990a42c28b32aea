"""Is it slower? The verdict on two series of times, and how sure it is. It knows nothing of bundles.

A verdict needs a settled window and an interval that can tell: no wider than ``max_slowdown``, or wholly on one side of
it. Then the estimate decides, and what is exactly as slow as allowed is a coin toss. To take an unchanged frame for a
regression, or to miss twice the allowed slowdown, the estimate has to be off by two half-widths of the interval, which
is four standard deviations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rpfm_edge.core.errors import ConfigError
from rpfm_edge.measure.clock import is_stable

EXIT_CODES = {"pass": 0, "regression": 1, "error": 2, "no baseline": 3, "unstable": 4}
GRAVITY = ("error", "regression", "no baseline", "unstable", "pass")  # of several verdicts the first one counts
RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict with what it rests on. ``slowdown`` is a share of the old time: 0.1 is 10 % slower, below 0 faster.

    ``low`` and ``high`` are the ends of its 95 % interval. ``reasons`` say why it is unstable.
    """

    verdict: str
    slowdown: float
    low: float
    high: float
    reasons: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The fields, the ends of the interval as one."""
        interval, reasons = [self.low, self.high], list(self.reasons)
        return {"verdict": self.verdict, "slowdown": self.slowdown, "interval": interval, "reasons": reasons}


def worst(verdicts: Iterable[str]) -> str:
    """The gravest of several verdicts, by ``GRAVITY``."""
    return min(verdicts, key=GRAVITY.index)


def parse_share(text: str) -> float:
    """A share as a person writes it: ``5%`` and ``0.05`` are the same."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = float("nan")
    check_limit(share, text)
    return share


def check_limit(max_slowdown: float, text: str = "") -> None:
    """Refuse what is no share; ``text`` is how it was written."""
    if not 0 < max_slowdown < 1:
        raise ConfigError(
            f"a slowdown of {text or format(max_slowdown, '.3g')} as the limit",
            expected="a share above 0 and below 1, such as 5% or 0.05",
            fix="correct --max-slowdown",
        )


def judge_pairs(
    old: Sequence[float], new: Sequence[float], max_slowdown: float, reasons: Iterable[str] = ()
) -> Judgement:
    """Both were timed in the same rounds: the median of the paired ratios, in which the machine's drift cancels.

    Args:
        old, new: seconds, paired by their place.
        reasons: why the window is not settled, whatever the times are.
    """
    ratios = np.log(np.asarray(new, np.float64) / np.asarray(old, np.float64))
    resampled, found = resampled_medians(ratios, 0), list(reasons)
    if not is_stable(tuple(np.exp(ratios))):
        found.append("the ratio of the two did not settle")
    return _judge(float(np.median(ratios)), resampled, max_slowdown, found)


def judge_baseline(
    old: Sequence[float], new: Sequence[float], max_slowdown: float, reasons: Iterable[str] = ()
) -> Judgement:
    """``old`` was timed some other day: the ratio of the medians, each series resampled by itself.

    The interval covers what varied within the two windows, not what changed in the machine between them.
    """
    first, second = (np.log(np.asarray(series, np.float64)) for series in (old, new))
    resampled, found = resampled_medians(second, 1) - resampled_medians(first, 0), list(reasons)
    if not is_stable(new):
        found.append("the times did not settle")
    return _judge(float(np.median(second) - np.median(first)), resampled, max_slowdown, found)


def _judge(estimate: float, resampled: np.ndarray, max_slowdown: float, reasons: list[str]) -> Judgement:
    """The verdict on a logarithm of a ratio."""
    check_limit(max_slowdown)
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(np.expm1(end)) for end in np.quantile(resampled, [tail, 1 - tail]))
    slowdown = float(np.expm1(estimate))
    if high - low > max_slowdown and low <= max_slowdown <= high:
        reasons.append(f"{low:+.1%} … {high:+.1%} is too wide to tell {max_slowdown:.1%}")
    verdict = "unstable" if reasons else "regression" if slowdown > max_slowdown else "pass"
    return Judgement(verdict, slowdown, low, high, tuple(reasons))


def resampled_medians(series: np.ndarray, seed: int) -> np.ndarray:
    """Medians of 1000 resamples of a series, in circular blocks of √n successive values (Politis and Romano 1992).

    Successive frames resemble each other. Resampled one by one, they would make the interval too narrow.
    """
    count = series.size
    if not count:
        raise ConfigError("no times were measured", expected="at least one round", fix="measure with more rounds")
    block = round(count**0.5)
    starts = np.random.default_rng(seed).integers(0, count, (RESAMPLES, -(-count // block)))
    places = (starts[..., None] + np.arange(block)) % count
    medians: np.ndarray = np.median(series[places.reshape(RESAMPLES, -1)[:, :count]], axis=1)
    return medians
