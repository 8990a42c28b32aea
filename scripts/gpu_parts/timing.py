"""The frames that are timed: opened one by one, then measured in turns, in rounds.

One process holds all of them where one interpreter has TensorRT and torch; otherwise each process times its own, and
the rounds of the two take turns.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np

from rpfm_edge.measure.clock import Call, interleaved
from scripts.gpu_parts.worker import Verb

WARMUP = 3  # of every round: the other process has had the GPU in between
CALLS: dict[str, Call] = {}
SLOW: set[str] = set()  # timed once a round
RESOURCES = ExitStack()


def add(label: str, call: Call, slow: bool = False) -> None:
    """Time ``call`` from now on, under ``label``."""
    CALLS[label] = call
    if slow:
        SLOW.add(label)


def measure_round(frames: int) -> dict[str, Any]:
    """Every call ``frames`` times in turns, slow ones once: label → seconds."""
    fast = {label: call for label, call in CALLS.items() if label not in SLOW}
    slow = {label: call for label, call in CALLS.items() if label in SLOW}
    times = interleaved(fast, frames, WARMUP) | interleaved(slow, 1, 0)
    return {label: list(latency.values_s) for label, latency in times.items()}


def close_all() -> dict[str, Any]:
    """Forget all calls and free what they hold."""
    CALLS.clear()
    SLOW.clear()
    RESOURCES.pop_all().close()
    return {}


def summary(rounds: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Label → median over rounds of each round's median, tails over all values, and the raw values by round."""
    labels = dict.fromkeys(label for one in rounds for label in one)
    found = {}
    for label in labels:
        values = [one[label] for one in rounds]
        flat = [value for part in values for value in part]
        found[label] = {
            "p50_s": float(np.median([np.median(part) for part in values])),
            "p95_s": float(np.percentile(flat, 95)),
            "rounds": values,
        }
    return found


def ratio(times: dict[str, Any], slow: str, fast: str) -> float:
    """How often ``fast`` runs while ``slow`` runs once: the median over rounds of the ratio of their medians."""
    pairs = zip(times[slow]["rounds"], times[fast]["rounds"], strict=True)
    return float(np.median([np.median(a) / np.median(b) for a, b in pairs]))


VERBS: dict[str, Verb] = {"round": measure_round, "close": close_all}
