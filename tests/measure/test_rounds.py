"""Turns on a clock that the test drives; the share of the cores against a text of /proc/stat."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from rpfm_edge.measure import device_state, rounds
from rpfm_edge.measure.rounds import Chunk, busy_s, busy_share, chunks, disturbance, joined, undisturbed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], None]]:
    """Makes calls that take given times in turn, on a clock that stands still otherwise."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(rounds._Cores, "others", lambda self: 0.25)

    def call(*durations_s: float) -> Callable[[], None]:
        queue = list(durations_s)

        def run() -> None:
            queue.append(queue.pop(0))
            now[0] += queue[-1]

        return run

    return call


def test_the_last_two_of_a_turn_count(clock: Callable[..., Callable[[], None]]) -> None:
    calls = {"a": clock(1, 7, 5), "b": clock(2, 3, 9)}
    (found,) = islice(chunks(calls, rounds=4), 1)
    assert found.times_s == {"a": pytest.approx([7, 5] * 4), "b": pytest.approx([3, 9] * 4)}
    assert found.others == 0.25


def test_the_order_in_a_round_is_random_and_fair(clock: Callable[..., Callable[[], None]]) -> None:
    log: list[str] = []
    calls = {name: (lambda name=name: log.append(name)) for name in "ab"}
    tuple(islice(chunks(calls, seed=3, rounds=100), 2))
    turns = log[6::3]  # without the warm-up
    assert len(turns) == 400
    firsts = turns[::2]
    assert all({one, other} == {"a", "b"} for one, other in zip(firsts, turns[1::2], strict=True))
    assert 70 < firsts.count("a") < 130
    again: list[str] = log.copy()
    log.clear()
    tuple(islice(chunks(calls, seed=3, rounds=100), 2))
    assert log == again


def test_throttling_is_noted_in_its_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter(range(10))
    monkeypatch.setattr(device_state, "read", lambda: next(states))
    monkeypatch.setattr(device_state, "throttling", lambda before, after: ["hot"] if (before, after) == (1, 2) else [])
    found = tuple(islice(chunks({"a": lambda: None}, rounds=2), 4))
    assert [chunk.throttling for chunk in found] == [(), ("hot",), (), ()]
    assert undisturbed(found) == found[2:]
    assert undisturbed(found[:2]) == ()
    assert undisturbed(found[:1]) == found[:1]


def test_chunks_together() -> None:
    found = [Chunk({"a": [1.0, 2.0]}, 0.0, ()), Chunk({"a": [3.0]}, 0.3, ()), Chunk({"a": [4.0]}, None, ())]
    assert joined(found, "a") == [1.0, 2.0, 3.0, 4.0]
    assert busy_share(found) == pytest.approx(0.15)
    assert busy_share(found[2:]) is None
    assert disturbance(0.15) == ["other programs used 15% of the cores"]
    assert disturbance(0.1) == disturbance(None) == []


STAT = """cpu  900 0 0 900 0 0 0 0 0 0
cpu0 100 10 20 5000 7 1 2 3 50 0
cpu1 200 0 0 5000 0 0 0 0 0 0
cpu12 400 0 0 0 0 0 0 0 0 0
intr 5
"""


def test_busy_seconds_of_some_cores() -> None:
    assert busy_s(STAT, {0}, 100) == pytest.approx(1.36)  # neither idle, nor waiting, nor guests twice
    assert busy_s(STAT, {0, 12}, 100) == pytest.approx(5.36)
    assert busy_s(STAT, {2}, 100) is None
    assert busy_s("", {0}, 100) is None


def test_own_work_is_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    start, now = rounds._Cores(0.0, 1.0, 10.0, 2), rounds._Cores(2.0, 2.5, 13.0, 2)
    monkeypatch.setattr(rounds._Cores, "now", lambda: now)
    assert start.others() == pytest.approx(1.5 / 4)  # of 3 s of work in 2 s on 2 cores, 1.5 s are one's own
    assert rounds._Cores(0.0, 1.0, 12.0, 2).others() == 0.0  # the counters have ticks of 10 ms
    assert rounds._Cores(0.0, 1.0, None, 2).others() is None


def _spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat")
def test_a_neighbour_is_seen() -> None:
    neighbour = multiprocessing.get_context("fork").Process(target=_spin, args=(10,))
    neighbour.start()
    try:
        start = rounds._Cores.now()
        time.sleep(0.5)
        seen = start.others()
    finally:
        neighbour.terminate()
        neighbour.join()
    assert seen is not None
    assert seen > 0.5 / len(os.sched_getaffinity(0))
