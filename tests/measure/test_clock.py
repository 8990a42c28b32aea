"""Timing with a clock that the test drives; the machine against what the system says by other means."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rpfm_edge.core.errors import BackendError, ConfigError
from rpfm_edge.measure import clock as timing
from rpfm_edge.measure import machine
from rpfm_edge.measure.clock import Latency, interleaved, is_stable, measure
from rpfm_edge.measure.machine import peak_memory_bytes, where


class Clock:
    """A clock that stands still until a call advances it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)

    def call(self, *durations_s: float):
        """A call that takes these times in turn, then the last one for ever."""
        queue = list(durations_s)

        def run() -> None:
            self.now_s += queue.pop(0) if len(queue) > 1 else queue[0]

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_percentiles_by_hand() -> None:
    latency = Latency(tuple(k / 1000 for k in range(101)))
    assert latency.p50_s == pytest.approx(0.050)
    assert latency.p95_s == pytest.approx(0.095)
    assert latency.p99_s == pytest.approx(0.099)
    assert latency.mean_s == pytest.approx(0.050)
    assert latency.fps == pytest.approx(20)
    assert latency.jitter_s == pytest.approx(0.001)


def test_jitter_depends_on_the_order() -> None:
    assert Latency((1.0, 3.0, 1.0, 3.0)).jitter_s == 2
    assert Latency((1.0, 1.0, 3.0, 3.0)).jitter_s == pytest.approx(2 / 3)
    assert Latency((1.0,)).jitter_s == 0


def test_json_keeps_the_raw_values() -> None:
    data = Latency((0.25, 0.5, 0.75)).to_json()
    assert data["values_s"] == [0.25, 0.5, 0.75]
    assert (data["runs"], data["p50_s"], data["fps"], data["stable"]) == (3, 0.5, 2.0, False)


def test_no_times_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no times were measured"):
        Latency(())


def test_warm_up_does_not_count_and_min_runs_rules_slow_calls(clock: Clock) -> None:
    latency = measure(clock.call(9.0, 9.0, 1.0, 2.0), warmup=2, min_runs=4, min_seconds=3.0)
    assert latency.values_s == pytest.approx((1.0, 2.0, 2.0, 2.0))


def test_min_seconds_rules_fast_calls(clock: Clock) -> None:
    latency = measure(clock.call(0.25), warmup=0, min_runs=4, min_seconds=3.0)
    assert latency.values_s == pytest.approx((0.25,) * 12)


def test_interleaved_alternates_within_each_round(clock: Clock) -> None:
    order: list[str] = []

    def named(name: str, duration_s: float):
        advance = clock.call(duration_s)

        def run() -> None:
            order.append(name)
            advance()

        return run

    found = interleaved({"a": named("a", 1.0), "b": named("b", 2.0)}, rounds=3, warmup=1)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert found["a"].values_s == pytest.approx((1.0,) * 3)
    assert found["b"].values_s == pytest.approx((2.0,) * 3)


def test_interleaved_keeps_the_ratio_where_one_after_the_other_does_not(clock: Clock) -> None:
    """On a machine that slows down steadily, two calls of the same cost come out equal."""

    def work() -> None:
        clock.now_s += 1 + (clock.now_s - 100) * 0.01

    turns = interleaved({"a": work, "b": work}, rounds=20, warmup=0)
    alone = [measure(work, warmup=0, min_runs=20, min_seconds=0) for _ in range(2)]
    assert turns["b"].mean_s / turns["a"].mean_s == pytest.approx(1, abs=0.01)
    assert alone[1].mean_s / alone[0].mean_s > 1.2


@pytest.mark.parametrize(("warmup", "runs"), [(-1, 5), (0, 0)])
def test_counts_that_make_no_sense(warmup: int, runs: int) -> None:
    with pytest.raises(ConfigError, match=f"{warmup} warm-up and {runs} measured runs"):
        measure(lambda: None, warmup, runs, 0)
    with pytest.raises(ConfigError, match=f"{warmup} warm-up and {runs} measured runs"):
        interleaved({"a": lambda: None}, runs, warmup)


def test_real_clock() -> None:
    latency = measure(lambda: time.sleep(0.01), warmup=1, min_runs=5, min_seconds=0)
    assert 0.0099 < min(latency.values_s) < 0.1


def test_stable_series() -> None:
    rng = np.random.default_rng(0)
    assert is_stable(1 + rng.normal(0, 0.01, 200))
    assert is_stable([1.0] * 10)
    assert is_stable([1.0] * 95 + [50.0] * 5)  # outliers are not drift


def test_unstable_series() -> None:
    assert not is_stable(np.linspace(1, 1.2, 100))  # drift
    assert not is_stable([1.0] * 50 + [1.06] * 50)  # a step above 5 %
    assert is_stable([1.0] * 50 + [1.04] * 50)
    assert not is_stable([1.0] * 9)  # too few to tell


def test_the_eighth_block_decides() -> None:
    settled, off = [1.0] * 10, [2.0] * 10
    assert is_stable(off + settled * 8 + off)
    assert not is_stable(off + settled * 3 + off + settled * 4 + off)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_the_high_water_mark_of_linux() -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    high_water = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    assert 0.95 < peak_memory_bytes() / high_water < 50  # getrusage also counts what was there before exec


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_never_falls() -> None:
    block = np.ones(peak_memory_bytes() + 64 * 2**20, np.uint8)
    during = peak_memory_bytes()
    assert during >= block.nbytes
    del block
    assert peak_memory_bytes() >= during


def test_peak_memory_counts_bytes_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    linux = peak_memory_bytes()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert linux / peak_memory_bytes() == pytest.approx(1024, rel=0.05)


def test_peak_memory_where_there_is_no_getrusage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(BackendError, match="peak memory is not known here"):
        peak_memory_bytes()


def test_where_says_what_the_system_says() -> None:
    psutil = pytest.importorskip("psutil")
    facts = where({"numpy": np.__version__})
    assert facts["cores"] == psutil.cpu_count()
    assert facts["memory_bytes"] == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["versions"] == {"numpy": np.__version__}
    assert facts["cpu"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_where_counts_the_cores_that_may_be_used() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert where()["usable_cores"] == 1
    finally:
        os.sched_setaffinity(0, before)


def test_where_on_a_board(monkeypatch: pytest.MonkeyPatch) -> None:
    """ARM kernels name no model in cpuinfo; the board is in the device tree, ended by a zero byte."""
    files = {"/proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 62.50\n", "/proc/device-tree/model": "Some Board\0"}
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(platform, "processor", lambda: "aarch64")
    assert (where()["cpu"], where()["board"]) == ("aarch64", "Some Board")
    files["/proc/cpuinfo"] = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n"
    assert where()["cpu"] == "Some CPU @ 2 GHz"


def test_a_call_follows_one_of_its_own() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        time.sleep((0.9 if order.count(name) % 3 == 0 else 0.6) * timing.SETTLE_S)

    times = timing.steady({name: lambda name=name: call(name) for name in "ab"}, rounds=3)
    assert "".join(order) == "aaabbb" + "bbbaaa" + "aaabbb"
    least = 0.9 * timing.SETTLE_S
    assert all(len(latency.values_s) == 3 and min(latency.values_s) >= least for latency in times.values())
