"""The gate on real bundles and its command line: verdicts, exit codes, and what is kept when something goes wrong."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtimes
from rpfm_edge import api
from rpfm_edge.__main__ import main
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import BackendError, ConfigError
from rpfm_edge.judge import baseline, gate
from rpfm_edge.judge.gate import NEW, OLD, GateConfig, compare, hold_against, settle
from rpfm_edge.measure import device_state, rounds
from rpfm_edge.measure.rounds import Chunk
from rpfm_edge.report import gate as report

ROOT = Path(__file__).parents[2]
QUICK = ("--rounds", 20, "--seconds", 0.01, "--limit", 20)


class Machine:
    """Stands in for a clock: calls take what they are told to, with a little noise, on a machine that drifts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: float = 0.0) -> None:
        self.now_s, self.speed, self.noise = 0.0, 1.0, np.random.default_rng(0)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(device_state, "read", dict)
        monkeypatch.setattr(device_state, "throttling", lambda before, after: [])
        monkeypatch.setattr(rounds._Cores, "others", lambda start: others)

    def call(self, seconds: float, drift: float = 0.0) -> Callable[[], None]:
        def run() -> None:
            self.speed *= 1 + drift
            self.now_s += seconds * self.speed * np.exp(0.01 * self.noise.standard_normal())

        return run


CONFIG = GateConfig(rounds=50, seconds=1.0, limit_s=60.0)


@pytest.mark.parametrize(("slower", "verdict"), [(1.0, "pass"), (1.1, "regression"), (0.8, "pass")])
def test_turns_cancel_the_drift_of_the_machine(monkeypatch: pytest.MonkeyPatch, slower: float, verdict: str) -> None:
    machine, found = Machine(monkeypatch, others=0.9), list[Chunk]()
    calls = {OLD: machine.call(0.01, 1e-3), NEW: machine.call(0.01 * slower, 1e-3)}  # by a third within the run
    judged = compare(calls, CONFIG, found)
    assert judged.verdict == verdict
    assert judged.slowdown == pytest.approx(slower - 1, abs=0.01)
    assert len(rounds.joined(found, OLD)) == len(rounds.joined(found, NEW)) >= 2 * 50


def at_times_twice(machine: Machine, slow: Callable[[int], bool]) -> Callable[[], None]:
    """A frame of 10 ms, of which the k-th takes 20 where ``slow(k)``."""
    frames, quick, double = itertools.count(), machine.call(0.01), machine.call(0.02)
    return lambda: (double if slow(next(frames)) else quick)()


CHANCE = np.random.default_rng(1).random(10_000)
SLOW_FRAMES: dict[str, Callable[[int], bool]] = {
    "every second": lambda k: k % 2 == 0,
    "3 of 5": lambda k: k % 5 < 3,
    "6 of 10 by chance": lambda k: bool(CHANCE[k % CHANCE.size] < 0.6),
}


@pytest.mark.parametrize("kind", SLOW_FRAMES)
def test_half_of_the_frames_twice_as_slow_is_no_pass(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    machine = Machine(monkeypatch)
    new, stored = at_times_twice(machine, SLOW_FRAMES[kind]), [0.01 * (1 + 0.01 * np.sin(k)) for k in range(100)]
    for judged in (
        compare({OLD: machine.call(0.01), NEW: new}, replace(CONFIG, limit_s=20.0), []),
        hold_against(new, stored, replace(CONFIG, limit_s=20.0), []),
    ):
        assert judged.slowdown > 0.3
        assert judged.verdict == "regression" or (kind == "every second" and judged.verdict == "unstable")


def test_three_of_ten_frames_twice_as_slow_leave_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    judged = compare({OLD: machine.call(0.01), NEW: at_times_twice(machine, lambda k: k % 10 < 3)}, CONFIG, [])
    assert (judged.verdict, judged.slowdown) == ("pass", pytest.approx(0.0, abs=0.03))


def test_against_stored_times_drift_is_unstable_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    judged = hold_against(machine.call(0.01, 1e-3), [0.01] * 50, replace(CONFIG, limit_s=6.0), [])
    assert judged.verdict == "unstable"
    assert 6 <= machine.now_s < 8
    assert "did not settle" in judged.reasons[0]


def test_a_machine_may_take_a_while_to_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, found = Machine(monkeypatch), list[Chunk]()

    def call() -> None:
        machine.call(0.01 * (1 + max(0.0, 1 - machine.now_s / 5)))()  # twice as slow at first

    judged = hold_against(call, [0.01 * (1 + 0.01 * np.sin(k)) for k in range(50)], CONFIG, found)
    assert judged.verdict == "pass"
    assert 5 < machine.now_s < 30
    assert len(rounds.joined(found, NEW)) > len(rounds.joined(gate.newest_half(found, CONFIG), NEW)) >= 2 * 50


def test_a_busy_machine_is_not_compared_with_another_day(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, others=0.4)
    config = replace(CONFIG, limit_s=3.0)
    assert hold_against(machine.call(0.01), [0.01] * 50, config, []).reasons == (
        "other programs used 40% of the cores",
    )
    assert settle(machine.call(0.01), config, []).verdict == "unstable"


def test_throttling_fails_the_window_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, found = Machine(monkeypatch), list[Chunk]()
    monkeypatch.setattr(device_state, "throttling", lambda a, b: ["GPU: hot"] if machine.now_s < 4 else [])
    judged = compare({OLD: machine.call(0.01), NEW: machine.call(0.01)}, CONFIG, found)
    assert judged.verdict == "pass"
    assert found[0].throttling == ("GPU: hot",)
    assert len(rounds.joined(rounds.undisturbed(found), NEW)) >= 2 * 50
    monkeypatch.setattr(device_state, "throttling", lambda a, b: ["GPU: hot"])
    judged = compare({OLD: machine.call(0.01), NEW: machine.call(0.01)}, replace(CONFIG, limit_s=5.0), [])
    assert judged.verdict == "unstable"
    assert judged.reasons[0] == "the clocks were held down (GPU: hot)"


def test_too_few_rounds_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    judged = compare({OLD: machine.call(1.0), NEW: machine.call(1.0)}, replace(CONFIG, limit_s=100.0), [])
    assert judged.verdict == "unstable"
    assert judged.reasons == ("only 20 rounds within 100 s",)


def test_rounds_before_a_failure_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, found = Machine(monkeypatch), list[Chunk]()
    work = machine.call(0.01)

    def call() -> None:
        if machine.now_s > 1:
            raise RuntimeError("the device is gone")
        work()

    with pytest.raises(RuntimeError, match="gone"):
        settle(call, CONFIG, found)
    assert len(rounds.joined(found, NEW)) >= 2 * 10


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 9},
        {"rounds": 0},
        {"limit_s": 0.0},
        {"limit_s": 2.0},  # below the 3 s that are measured at least
        {"limit_s": float("nan")},
        {"seconds": float("nan")},
        {"max_slowdown": 0.0},
    ],
)
def test_numbers_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GateConfig(**change)


# Real bundles ---------------------------------------------------------------------------------------------------------

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bundles(tiny_student: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``new`` has one step for two backends, ``old`` is another graph of the same student with eight."""
    folder = tmp_path_factory.mktemp("gate")
    graphs = {
        steps: api.quantize(tiny_student.path, "sample", folder / f"{steps}", "fp32", steps).path for steps in (1, 8)
    }
    new = api.build(graphs[1], folder / "new", ["onnxruntime", "openvino"]).path
    return {"new": new, "old": api.build(graphs[8], folder / "old", "onnxruntime").path}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """A command of ``rpfm-edge`` in this process, with its baselines below ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rpfm-edge", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), *capfd.readouterr()

    return run


def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs on the testing machine are not to decide a test."""
    monkeypatch.setattr(rounds, "BUSY_LIMIT", 10.0)
    monkeypatch.setattr("rpfm_edge.measure.verdict.is_stable", lambda values: True)


def test_no_baseline_is_exit_3(call: Call, bundles: dict[str, Path]) -> None:
    code, out, err = call("gate", bundles["new"], "--baseline", "main", "--backend", "onnxruntime", *QUICK)
    assert (code, err) == (3, "")
    assert ".rpfm-edge/baselines has no baseline main for onnxruntime" in out


def test_a_baseline_of_another_bundle_runs_in_the_same_rounds(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calm(monkeypatch)
    pick, eight_steps = ("--backend", "onnxruntime", *QUICK), ("--max-slowdown", "20%", "--json")
    code, out, _ = call("save-baseline", bundles["new"], "--baseline", "main", *pick)
    assert (code, "saved" in out) == (0, True)
    code, out, _ = call("gate", bundles["old"], "--baseline", "main", *pick, *eight_steps)
    found = json.loads(out.splitlines()[-1])
    assert (code, found["exit_code"], found["verdict"]) == (1, 1, "regression")
    (record,) = found["backends"]
    assert record["way"] == "a/b"
    assert record["slowdown"] > 0.2
    assert len(record["old"]["values_s"]) == len(record["new"]["values_s"]) == 2 * record["rounds"] >= 2 * 20
    old, new = (np.asarray(record[side]["values_s"]) for side in ("old", "new"))
    assert record["slowdown"] == pytest.approx(np.median(new / old) - 1, rel=0.01)
    assert (
        json.loads((tmp_path / ".rpfm-edge/baselines/results/main.json").read_text())["backends"] == found["backends"]
    )


def test_the_same_bundle_is_held_against_the_stored_times(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm(monkeypatch)
    pick = ("--backend", "onnxruntime", *QUICK, "--max-slowdown", "99%", "--json")
    assert call("save-baseline", bundles["new"], "--baseline", "main", *pick)[0] == 0
    code, out, _ = call("gate", bundles["new"], "--baseline", "main", *pick)
    (record,) = json.loads(out.splitlines()[-1])["backends"]
    assert record["way"] == "baseline"
    ratio = np.median(record["new"]["values_s"]) / np.median(record["old"]["values_s"]) - 1
    assert record["slowdown"] == pytest.approx(ratio, abs=0.02)
    assert (code, record["verdict"]) == ((1, "regression") if record["slowdown"] > 0.99 else (0, "pass"))


def test_what_slows_both_bundles_is_said(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = Machine(monkeypatch)
    monkeypatch.setattr(gate, "frame", lambda stack, bundle, backend: machine.call(0.01))
    old, new = (artifact.load(bundles[name], "bundle") for name in ("old", "new"))

    def judged() -> dict[str, Any]:
        (record,) = gate.run_gate(new, ["onnxruntime"], "main", tmp_path, CONFIG)["backends"]
        assert record["way"] == "a/b"
        assert record["slowdown"] == pytest.approx(0, abs=0.01)
        return dict(record)

    gate.run_save(old, ["onnxruntime"], "main", tmp_path, CONFIG)
    record = judged()
    assert (record["verdict"], record["reasons"]) == ("pass", [])
    machine.speed = 1.1
    record = judged()
    assert record["verdict"] == "pass"  # the bundle is as fast as the old one
    assert record["reasons"][0].endswith("than when it was saved: rpfm-edge or the machine is slower")
    assert record["old_against_stored"]["slowdown"] == pytest.approx(0.1, abs=0.01)
    monkeypatch.setattr(rounds._Cores, "others", lambda start: 0.4)
    record = judged()
    assert record["verdict"] == "pass"
    assert record["reasons"] == [
        "not told whether rpfm-edge itself became slower: other programs used 40% of the cores"
    ]
    gate.run_save(old, ["onnxruntime"], "main", tmp_path, replace(CONFIG, limit_s=2.0))
    monkeypatch.setattr(rounds._Cores, "others", lambda start: 0.0)
    assert "when the baseline was saved, other programs used 40%" in judged()["reasons"][0]


def test_the_times_beside_a_verdict_are_the_judged_ones(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine(monkeypatch)
    quick, slow, until = machine.call(0.01), machine.call(0.015), [0.0]
    call = lambda: (slow if machine.now_s < until[0] else quick)()  # noqa: E731
    monkeypatch.setattr(gate, "frame", lambda stack, bundle, backend: call)
    given = (artifact.load(bundles["new"], "bundle"), ["onnxruntime"], "main", tmp_path, replace(CONFIG, seconds=7.0))
    gate.run_save(*given)
    until[0] = machine.now_s + 4
    result = gate.run_gate(*given)
    (record,) = result["backends"]
    assert record["verdict"] == "pass"
    assert record["new"]["p50_s"] / record["old"]["p50_s"] - 1 == pytest.approx(record["slowdown"], abs=1e-3)
    assert max(record["new"]["values_s"]) < 0.012 < max(record["before_s"]["new"])
    assert len(record["new"]["values_s"]) == 2 * record["rounds"] < len(record["before_s"]["new"]) + 20
    report.render(result)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("onnxruntime"))
    assert row.split()[1:3] == [f"{1e3 * record[side]['p50_s']:.2f}" for side in ("old", "new")]
    assert row.split()[-2] == str(record["rounds"])


def test_a_frame_of_eight_steps_is_slower_than_one_of_one(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm(monkeypatch)
    pick = ("--backend", "onnxruntime", *QUICK, "--max-slowdown", "20%")
    code, out, _ = call("gate", bundles["old"], "--against", bundles["new"], *pick)
    assert (code, "regression" in out, "in the same rounds" in out) == (1, True, True)
    assert call("gate", bundles["new"], "--against", bundles["old"], *pick)[0] == 0


def test_unsettled_times_are_exit_4(call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpfm_edge.measure.verdict.is_stable", lambda values: False)
    pick = ("--backend", "onnxruntime", "--rounds", 10, "--seconds", 0.01, "--limit", 0.5)
    code, out, _ = call("gate", bundles["new"], "--against", bundles["old"], *pick)
    assert (code, "the ratio of the two did not settle" in out) == (4, True)
    code, out, _ = call("save-baseline", bundles["new"], "--baseline", "main", *pick)
    assert (code, "the times did not settle" in out) == (0, True)
    assert "warning: the gate cannot hold the same bundle against these times; save again" in out
    code, out, _ = call("gate", bundles["new"], "--baseline", "main", *pick)
    assert (code, "when the baseline was saved, the times did not settle" in out) == (4, True)


def test_a_damaged_baseline_is_exit_2(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calm(monkeypatch)
    pick = ("--backend", "onnxruntime", *QUICK, "--baselines", tmp_path / "kept", "--max-slowdown", "99%")
    call("save-baseline", bundles["new"], "--baseline", "main", *pick)
    (file,) = (tmp_path / "kept").glob("*.json")
    file.write_text(file.read_text()[:-100])
    code, out, _ = call("gate", bundles["new"], "--baseline", "main", *pick)
    assert (code, f"{file} was altered or cut short" in out) == (2, True)


def test_another_device_is_exit_3(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calm(monkeypatch)
    pick = ("--backend", "onnxruntime", *QUICK, "--max-slowdown", "99%")
    call("save-baseline", bundles["new"], "--baseline", "main", *pick)
    here = baseline.fingerprint
    monkeypatch.setattr(baseline, "fingerprint", lambda *given: {**here(*given), "power_mode": "15W"})
    code, out, _ = call("gate", bundles["new"], "--baseline", "main", *pick)
    assert (code, "of another device: power_mode was None and is 15W" in out) == (3, True)


def test_one_backend_that_fails_does_not_lose_the_other(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calm(monkeypatch)
    left, render = [40], Pipeline.render

    def failing(self: Pipeline, *given: Any) -> Any:
        left[0] -= self.backend == "openvino"
        if left[0] < 0:
            raise BackendError("the device is gone", expected="a device", fix="plug it in")
        return render(self, *given)

    monkeypatch.setattr(Pipeline, "render", failing)
    lenient = (*QUICK, "--max-slowdown", "99%", "--json")
    code, out, _ = call("save-baseline", bundles["new"], "--baseline", "main", *lenient)
    records = {record["backend"]: record for record in json.loads(out.splitlines()[-1])["backends"]}
    assert (code, records["openvino"]["verdict"], records["onnxruntime"]["verdict"]) == (2, "error", "pass")
    assert "the device is gone" in out
    assert (records["openvino"]["rounds"], records["openvino"]["new"]["runs"]) == (10, 20)  # measured by then
    assert len(list((tmp_path / ".rpfm-edge/baselines").glob("main-*.json"))) == 1


def test_an_engine_whose_library_is_not_here_is_skipped(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is said, and does not decide; a gate with nothing left to judge is an error."""
    calm(monkeypatch)
    find, missing = runtimes.find_spec, {"openvino"}
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name in missing else find(name))
    quick = (*QUICK, "--max-slowdown", "99%", "--json")
    for command, *way in (
        ("save-baseline", "--baseline", "main"),
        ("gate", "--baseline", "main"),
        ("gate", "--against", bundles["new"]),
    ):
        code, out, _ = call(command, bundles["new"], *way, *quick)
        result = json.loads(out.splitlines()[-1])
        assert (code, [record["backend"] for record in result["backends"]]) == (0, ["onnxruntime"]), way
        assert list(result["skipped"]) == ["openvino"]
        assert "openvino skipped: backend openvino is not installed" in out
    assert call("gate", bundles["new"], "--baseline", "main", "--backend", "openvino", *quick)[0] == 2
    missing.add("onnxruntime")
    code, _, err = call("gate", bundles["new"], "--baseline", "main", *quick)
    assert (code, "onnxruntime is not installed" in err) == (2, True)


def test_plain_bench_keeps_what_was_measured_before_a_failure(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    render = Pipeline.render

    def failing(self: Pipeline, *given: Any) -> Any:
        if self.backend == "openvino":
            raise RuntimeError("the device is gone")
        return render(self, *given)

    monkeypatch.setattr(Pipeline, "render", failing)
    code, out, _ = call("bench", bundles["new"], "--runs", 3, "--seconds", 0.01)
    assert (code, "openvino failed: the device is gone" in out, "onnxruntime" in out) == (2, True, True)
    kept = api.inspect(bundles["new"])["evidence"]["speed"]
    assert [one["backend"] for one in kept["backends"]] == ["onnxruntime"]
    assert kept["failures"] == {"openvino": "the device is gone"}
    with pytest.raises(RuntimeError, match="gone"):
        api.bench(bundles["new"], "openvino", 3, 0.01)


FAULTS: dict[str, tuple[str, Sequence[Any], str]] = {
    "two at once": (
        "gate",
        ("--baseline", "a", "--against", "b"),
        "nothing, or two things, to hold the bundle against",
    ),
    "nothing": ("gate", (), "nothing, or two things, to hold the bundle against"),
    "no share": ("gate", ("--baseline", "a", "--max-slowdown", "5"), "a slowdown of 5 as the limit"),
    "no rounds": ("gate", ("--baseline", "a", "--rounds", 0), "0 rounds and 3 s within 120 s"),
    "no time": (
        "gate",
        ("--baseline", "a", "--limit", 2),
        "50 rounds and 3 s within 2 s: expected at least 10 rounds, and seconds from 0",
    ),
    "no name": ("save-baseline", ("--baseline", "a/b"), "baseline name 'a/b'"),
    "no bundle": ("gate", ("--against", "absent"), "absent is no artifact"),
    "no engine": ("gate", ("--baseline", "a", "--backend", "tensorflow"), "unknown backend 'tensorflow'"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_one_sentence_and_exit_2(call: Call, bundles: dict[str, Path], kind: str) -> None:
    command, given, words = FAULTS[kind]
    code, out, err = call(command, bundles["new"], *given)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_an_engine_that_the_other_bundle_lacks(call: Call, bundles: dict[str, Path]) -> None:
    code, _, err = call("gate", bundles["new"], "--against", bundles["old"])
    assert (code, "has no engine for openvino" in err) == (2, True)


def test_bundles_of_another_size_are_not_compared(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = artifact.load

    def larger(path: Any, *kinds: Any, **given: Any) -> Artifact:
        found = load(path, *kinds, **given)
        return replace(found, config={**found.config, "size": [256, 176]}) if "old" in str(path) else found

    monkeypatch.setattr(artifact, "load", larger)
    code, _, err = call("gate", bundles["new"], "--against", bundles["old"], "--backend", "onnxruntime")
    assert (code, "renders 256 × 176" in err, "64 × 48" in err) == (2, True, True)


def test_the_pytest_option_fails_on_whatever_is_no_pass(bundles: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/test_gate.py", "--bundle", str(bundles["old"])]
    options = ["--gate", "main", "--rounds", "10", "--baselines", str(tmp_path), "-p", "no:cacheprovider"]
    ended = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1, ended
    assert f"no baseline: {tmp_path} has no baseline main for onnxruntime" in ended.stdout


def test_the_pytest_option_fails_on_an_engine_of_the_bundle_that_cannot_run(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "openvino.py").write_text("raise ImportError('not installed')\n")
    command = [sys.executable, "-m", "pytest", "benchmarks/test_gate.py", "--bundle", str(bundles["new"])]
    options = ["--gate", "main", "-k", "openvino", "--baselines", str(tmp_path / "kept"), "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    ended = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert ended.returncode == 1, ended
    assert "1 failed" in ended.stdout
    assert "openvino" in ended.stdout
