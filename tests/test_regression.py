"""The gate on real bundles and its command line: verdicts, exit codes, and what is kept when something goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpfm_edge import api, artifact, baseline, cli, device_state, regression, rounds
from rpfm_edge.artifact import Artifact
from rpfm_edge.errors import BackendError, ConfigError
from rpfm_edge.pipeline import Pipeline
from rpfm_edge.regression import NEW, OLD, GateConfig, compare, hold_against, settle
from rpfm_edge.rounds import Chunk

ROOT = Path(__file__).parent.parent
QUICK = ("--runs", 20, "--seconds", 0.01, "--limit", 20)


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
    assert len(rounds.joined(found, OLD)) == len(rounds.joined(found, NEW)) >= 50


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
    assert len(rounds.joined(found, NEW)) > len(rounds.joined(regression.newest_half(found, CONFIG), NEW)) >= 50


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
    assert len(rounds.joined(rounds.undisturbed(found), NEW)) >= 50
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
    assert len(rounds.joined(found, NEW)) >= 10


@pytest.mark.parametrize(
    "change", [{"rounds": 9}, {"rounds": 0}, {"limit_s": 0.0}, {"limit_s": float("nan")}, {"max_slowdown": 0.0}]
)
def test_numbers_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GateConfig(**change)


# Real bundles ---------------------------------------------------------------------------------------------------------

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bundles(tiny_student: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``new`` has one step for two backends, ``old`` is another graph of the same student with twelve."""
    folder = tmp_path_factory.mktemp("gate")
    graphs = {
        steps: api.quantize(tiny_student.path, "sample", folder / f"{steps}", "fp32", steps).path for steps in (1, 12)
    }
    new = api.build(graphs[1], folder / "new", ["onnxruntime", "openvino"]).path
    return {"new": new, "old": api.build(graphs[12], folder / "old", "onnxruntime").path}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """``rpfm-edge bench`` in this process, with its baselines below ``tmp_path``."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rpfm-edge", "bench", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capfd.readouterr()

    return run


def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs on the testing machine are not to decide a test."""
    monkeypatch.setattr(rounds, "BUSY_LIMIT", 10.0)
    monkeypatch.setattr("rpfm_edge.gate.is_stable", lambda values: True)


def test_no_baseline_is_exit_3(call: Call, bundles: dict[str, Path]) -> None:
    code, out, err = call(bundles["new"], "--gate", "main", "--backend", "onnxruntime", *QUICK)
    assert (code, err) == (3, "")
    assert ".rpfm-edge/baselines has no baseline main for onnxruntime" in out


def test_a_baseline_of_another_bundle_runs_in_the_same_rounds(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calm(monkeypatch)
    pick = ("--backend", "onnxruntime", *QUICK)
    code, out, _ = call(bundles["new"], "--save", "main", *pick)
    assert (code, "saved" in out) == (0, True)
    code, out, _ = call(bundles["old"], "--gate", "main", *pick, "--max-slowdown", "20%", "--json")  # twelve steps
    found = json.loads(out.splitlines()[-1])
    assert (code, found["exit_code"], found["verdict"]) == (1, 1, "regression")
    (record,) = found["backends"]
    assert record["way"] == "a/b"
    assert record["slowdown"] > 0.2
    assert len(record["old"]["values_s"]) == len(record["new"]["values_s"]) >= 20
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
    assert call(bundles["new"], "--save", "main", *pick)[0] == 0
    code, out, _ = call(bundles["new"], "--gate", "main", *pick)
    (record,) = json.loads(out.splitlines()[-1])["backends"]
    assert record["way"] == "baseline"
    ratio = np.median(record["new"]["values_s"]) / np.median(record["old"]["values_s"]) - 1
    assert record["slowdown"] == pytest.approx(ratio, abs=0.02)
    assert (code, record["verdict"]) == ((1, "regression") if record["slowdown"] > 0.99 else (0, "pass"))


def test_a_frame_of_twelve_steps_is_slower_than_one_of_one(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm(monkeypatch)
    pick = ("--backend", "onnxruntime", *QUICK, "--max-slowdown", "20%")
    code, out, _ = call(bundles["old"], "--against", bundles["new"], *pick)
    assert (code, "regression" in out, "in the same rounds" in out) == (1, True, True)
    assert call(bundles["new"], "--against", bundles["old"], *pick)[0] == 0


def test_unsettled_times_are_exit_4(call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpfm_edge.gate.is_stable", lambda values: False)
    pick = ("--backend", "onnxruntime", "--runs", 10, "--seconds", 0.01, "--limit", 0.5)
    code, out, _ = call(bundles["new"], "--against", bundles["old"], *pick)
    assert (code, "the ratio of the two did not settle" in out) == (4, True)
    code, out, _ = call(bundles["new"], "--save", "main", *pick)
    assert (code, "the times did not settle" in out) == (0, True)
    code, out, _ = call(bundles["new"], "--gate", "main", *pick)
    assert (code, "when the baseline was saved, the times did not settle" in out) == (4, True)


def test_a_damaged_baseline_is_exit_2(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calm(monkeypatch)
    pick = ("--backend", "onnxruntime", *QUICK, "--baselines", tmp_path / "kept", "--max-slowdown", "99%")
    call(bundles["new"], "--save", "main", *pick)
    (file,) = (tmp_path / "kept").glob("*.json")
    file.write_text(file.read_text()[:-100])
    code, out, _ = call(bundles["new"], "--gate", "main", *pick)
    assert (code, f"{file} was altered or cut short" in out) == (2, True)


def test_another_device_is_exit_3(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calm(monkeypatch)
    pick = ("--backend", "onnxruntime", *QUICK, "--max-slowdown", "99%")
    call(bundles["new"], "--save", "main", *pick)
    here = baseline.fingerprint
    monkeypatch.setattr(baseline, "fingerprint", lambda *given: {**here(*given), "power_mode": "15W"})
    code, out, _ = call(bundles["new"], "--gate", "main", *pick)
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
    code, out, _ = call(bundles["new"], "--save", "main", *QUICK, "--max-slowdown", "99%", "--json")
    records = {record["backend"]: record for record in json.loads(out.splitlines()[-1])["backends"]}
    assert (code, records["openvino"]["verdict"], records["onnxruntime"]["verdict"]) == (2, "error", "pass")
    assert "the device is gone" in out
    assert records["openvino"]["new"]["runs"] == 10  # what it had measured by then
    assert len(list((tmp_path / ".rpfm-edge/baselines").glob("main-*.json"))) == 1


def test_plain_bench_keeps_what_was_measured_before_a_failure(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    render = Pipeline.render

    def failing(self: Pipeline, *given: Any) -> Any:
        if self.backend == "openvino":
            raise RuntimeError("the device is gone")
        return render(self, *given)

    monkeypatch.setattr(Pipeline, "render", failing)
    code, out, _ = call(bundles["new"], "--runs", 3, "--seconds", 0.01)
    assert (code, "openvino failed: the device is gone" in out, "onnxruntime" in out) == (2, True, True)
    kept = api.inspect(bundles["new"])["evidence"]["speed"]
    assert [one["backend"] for one in kept["backends"]] == ["onnxruntime"]
    assert kept["failures"] == {"openvino": "the device is gone"}
    with pytest.raises(RuntimeError, match="gone"):
        api.bench(bundles["new"], "openvino", 3, 0.01)


FAULTS: dict[str, tuple[Sequence[Any], str]] = {
    "two at once": (("--gate", "a", "--save", "b"), "--save and --gate at once"),
    "no share": (("--gate", "a", "--max-slowdown", "5"), "a slowdown of 5 as the limit"),
    "no rounds": (("--gate", "a", "--runs", 0), "0 rounds within 120 s"),
    "no time": (("--gate", "a", "--limit", 0), "rounds within 0 s"),
    "no name": (("--save", "a/b"), "baseline name 'a/b'"),
    "no bundle": (("--against", "absent"), "absent is no artifact"),
    "no engine": (("--gate", "a", "--backend", "tensorflow"), "unknown backend 'tensorflow'"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_one_sentence_and_exit_2(call: Call, bundles: dict[str, Path], kind: str) -> None:
    given, words = FAULTS[kind]
    code, out, err = call(bundles["new"], *given)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_an_engine_that_the_other_bundle_lacks(call: Call, bundles: dict[str, Path]) -> None:
    code, _, err = call(bundles["new"], "--against", bundles["old"])
    assert (code, "has no engine for openvino" in err) == (2, True)


def test_bundles_of_another_size_are_not_compared(
    call: Call, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = artifact.load

    def larger(path: Any, *kinds: Any, **given: Any) -> Artifact:
        found = load(path, *kinds, **given)
        return replace(found, config={**found.config, "size": [256, 176]}) if "old" in str(path) else found

    monkeypatch.setattr(artifact, "load", larger)
    code, _, err = call(bundles["new"], "--against", bundles["old"], "--backend", "onnxruntime")
    assert (code, "renders 256 × 176" in err, "64 × 48" in err) == (2, True, True)


def test_the_pytest_option_fails_on_whatever_is_no_pass(bundles: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/test_gate.py", "--bundle", str(bundles["old"])]
    options = ["--gate", "main", "--rounds", "10", "--baselines", str(tmp_path), "-p", "no:cacheprovider"]
    ended = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1, ended
    assert f"no baseline: {tmp_path} has no baseline main for onnxruntime" in ended.stdout
