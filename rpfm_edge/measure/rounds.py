"""Rounds in which calls take turns, in chunks, with what disturbed each chunk beside it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.measure import device_state
from rpfm_edge.measure.clock import Call

REPEATS = 3  # of a call in its turn; the first follows another engine and is not counted
CHUNK_ROUNDS = 10
BUSY_LIMIT = 0.10
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)  # of /proc/stat: user, nice, system, irq, softirq, steal


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rounds. ``times_s``: call → two times a round, in order; ``others``: the share of this process's cores that
    other programs used (None where that is not known); ``throttling``: what held the clocks down, in words.
    """

    times_s: Mapping[str, Sequence[float]]
    others: float | None
    throttling: tuple[str, ...]


def chunks(calls: Mapping[str, Call], seed: int = 0, rounds: int = CHUNK_ROUNDS) -> Iterator[Chunk]:
    """Time the calls for ever, after a warm-up; stop taking when it is enough.

    In every round each call has a turn, in random order. A turn is three calls in a row, of which the last two count:
    both follow one of their own, as in a stream. The quicker one of them alone would hide a call that is slow now and
    then: slow in 60 of 100 calls, both are slow in 36 of 100 turns.
    """
    order, names = np.random.default_rng(seed), list(calls)
    for call in calls.values():
        for _ in range(REPEATS):
            call()
    before = device_state.read()
    while True:
        times: dict[str, list[float]] = {name: [] for name in names}
        start = _Cores.now()
        for _ in range(rounds):
            for index in order.permutation(len(names)):
                times[names[index]] += _turn(calls[names[index]])
        others, after = start.others(), device_state.read()
        yield Chunk(times, others, tuple(device_state.throttling(before, after)))
        before = after


def joined(found: Sequence[Chunk], name: str) -> list[float]:
    """The times of a call over several chunks, in seconds and in order."""
    return [value for chunk in found for value in chunk.times_s[name]]


def undisturbed(found: Sequence[Chunk]) -> Sequence[Chunk]:
    """The chunks after the last one in which the clocks were held down."""
    bad = [index for index, chunk in enumerate(found) if chunk.throttling]
    return found[bad[-1] + 1 :] if bad else found


def busy_share(found: Sequence[Chunk]) -> float | None:
    """The mean share of the cores that other programs used; None where that is not known."""
    known = [chunk.others for chunk in found if chunk.others is not None]
    return float(np.mean(known)) if known else None


def disturbance(share: float | None) -> list[str]:
    """Why times are not to be compared with those of another day: others used more than 10 % of the cores."""
    return [f"other programs used {share:.0%} of the cores"] if share is not None and share > BUSY_LIMIT else []


def _turn(call: Call) -> list[float]:
    values = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        values.append(time.perf_counter() - start)
    return values[1:]


def busy_s(stat: str, cores: set[int], ticks: int) -> float | None:
    """Seconds that ``cores`` have been busy since boot, by the text of ``/proc/stat``; None if it lists none."""
    rows = [line.split() for line in stat.splitlines() if line.startswith("cpu") and line[3:4].isdigit()]
    fields = [[int(row[1 + k]) for k in BUSY_FIELDS] for row in rows if int(row[0][3:]) in cores]
    return sum(map(sum, fields)) / ticks if fields else None


@dataclass(frozen=True, slots=True)
class _Cores:
    """How long this process's cores, and the process itself, have been busy at a moment."""

    time_s: float
    own_s: float
    busy_s: float | None
    count: int

    @classmethod
    def now(cls) -> _Cores:
        cores: Any = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        try:
            stat = Path("/proc/stat").read_text(encoding="utf-8") if cores else ""
        except OSError:
            stat = ""
        busy = busy_s(stat, cores, os.sysconf("SC_CLK_TCK")) if stat else None
        return cls(time.perf_counter(), time.process_time(), busy, len(cores))

    def others(self) -> float | None:
        """The share of the cores' time since then that was somebody else's."""
        now = _Cores.now()
        if now.busy_s is None or self.busy_s is None:
            return None
        foreign = now.busy_s - self.busy_s - (now.own_s - self.own_s)
        return max(0.0, foreign / ((now.time_s - self.time_s) * self.count))
