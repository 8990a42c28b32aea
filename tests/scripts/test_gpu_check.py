"""The check on a GPU, as far as a CPU goes: ONNX Runtime stands where TensorRT would, in one process and in two.

What TensorRT, CUDA graphs and GPU memory do cannot be shown here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rpfm_edge.core.artifact import Artifact
from scripts import gpu_check
from scripts.gpu_parts import cases, engine_side, parts, table, timing
from scripts.gpu_parts.worker import OutOfTimeError, PartError, Worker

ROOT = Path(__file__).resolve().parents[2]
FAKE_PYTHON = """#!{python}
import os, sys, time
sys.path.insert(0, {root!r})
from rpfm_edge.core.errors import InputError
from scripts.gpu_parts.worker import serve

def refuse():
    raise InputError("a cat", expected="a person", fix="send one")

def linger(pids):
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(pids, "w").write(f"{{os.getpid()}} {{child.pid}}")
    time.sleep(60)

def twice(value):
    print("noise")
    return {{"value": 2 * value, "variable": os.environ["GIVEN"]}}

def die():
    print("no such kernel", file=sys.stderr, flush=True)
    os._exit(7)

serve({{"twice": twice, "refuse": refuse, "divide": lambda: 1 / 0, "die": die, "linger": linger}})
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """A process with verbs of its own."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON.format(python=sys.executable, root=str(ROOT)))
    python.chmod(0o755)
    made = Worker(str(python), ("engine",), tmp_path / "log.txt", {"GIVEN": "here"})
    yield made
    made.close()


def test_a_worker_answers_and_what_it_prints_goes_to_the_log(worker: Worker) -> None:
    assert worker.ask("twice", 60, value=21) == {"value": 42, "variable": "here"}
    with pytest.raises(PartError, match=r"^a cat: expected a person; send one\.$"):
        worker.ask("refuse", 60)
    with pytest.raises(PartError, match=r"^ZeroDivisionError: division by zero$"):
        worker.ask("divide", 60)
    assert worker.ask("twice", 60, value=1)["value"] == 2  # an error does not end it
    assert worker.log.read_text().count("noise") == 2
    assert "Traceback" in worker.log.read_text()


def test_a_worker_that_dies(worker: Worker) -> None:
    with pytest.raises(
        PartError, match=r"^die: the process ended with exit code 7 \(no such kernel\); see .*log\.txt$"
    ):
        worker.ask("die", 60)
    assert not worker.alive


def test_a_worker_that_is_late_is_ended_with_its_children(worker: Worker, tmp_path: Path) -> None:
    worker.ask("twice", 60, value=1)
    with pytest.raises(OutOfTimeError):
        worker.ask("linger", 1.5, pids=str(tmp_path / "pids"))
    assert not worker.alive
    child = Path("/proc") / (tmp_path / "pids").read_text().split()[1] / "status"
    for _ in range(50):
        if not child.is_file() or "State:\tZ" in child.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the child lives on")


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PartError, match="nowhere cannot be started"):
        Worker(str(tmp_path / "nowhere"), ("engine",), tmp_path / "log.txt", {})


def test_a_round_times_each_call_and_slow_ones_once() -> None:
    counts = {"fast": 0, "slow": 0}

    def call(name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            counts[name] += 1
            time.sleep(seconds)

        return work

    timing.add("fast", call("fast", 0.001))
    timing.add("slow", call("slow", 0.02), slow=True)
    times = timing.measure_round(4)
    timing.close_all()
    assert {name: len(values) for name, values in times.items()} == {"fast": 4, "slow": 1}
    assert counts == {"fast": 4 + timing.WARMUP, "slow": 1}
    assert min(times["fast"]) >= 0.001
    assert min(times["slow"]) >= 0.02
    assert timing.measure_round(1) == {}  # closed


def test_medians_and_ratios_are_over_rounds() -> None:
    rounds = [{"a": [4.0, 4.0, 9.0], "b": [2.0]}, {"a": [10.0], "b": [1.0]}, {"a": [6.0], "b": [2.0]}]
    times = timing.summary(rounds)
    assert times["a"]["p50_s"] == 6.0  # of 4, 10, 6
    assert times["a"]["rounds"] == [[4.0, 4.0, 9.0], [10.0], [6.0]]
    assert timing.ratio(times, "a", "b") == 3.0  # of 2, 10, 3; the ratio of the medians is 3 by another way
    assert timing.ratio(times, "b", "a") == pytest.approx(1 / 3)


def frame_part(half_ms: float, **others_ms: float) -> dict[str, Any]:
    """What part "frame" finds, each way with one time."""
    names = {"eager": table.EAGER, "best": table.BEST, "teacher": "teacher, guided, 25 Heun steps, torch eager"}
    values = {"tensorrt fp16": half_ms} | {names.get(name, name): value for name, value in others_ms.items()}
    times = timing.summary([{name: [value / 1e3] for name, value in values.items()}])
    return {"times": times, "psnr_db": {"tensorrt fp16": 60.0}, "dtype": "float16", "host": {}}


def met(found: dict[str, Any]) -> dict[str, bool]:
    """Measured text → met."""
    return {verdict.measured: verdict.met for verdict in table.verdicts(found)}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (frame_part(1.0, best=1.4, eager=5.5, teacher=101), {"1.40 ×": True, "5.50 ×": True, "101.00 ×": True}),
        (frame_part(1.0, best=1.2, eager=4.5, teacher=99), {"1.20 ×": False, "4.50 ×": False, "99.00 ×": False}),
        (frame_part(1.0, **{"tensorrt fp16, drawing included": 1.25}), {"800": True}),
        (frame_part(1.0, **{"tensorrt fp16, drawing included": 1.6}), {"625": False}),
        (frame_part(1.0) | {"host": {"fp16": {"host_s": 59e-6}}}, {"59 µs": True}),
        (frame_part(1.0) | {"host": {"int8": {"host_s": 61e-6}}}, {"61 µs": False}),
    ],
)
def test_targets_of_the_frame(part: dict[str, Any], expected: dict[str, bool]) -> None:
    assert met({"frame s": part}) == expected


def memory_part(used: list[int], calls: list[int]) -> dict[str, Any]:
    return {"memory xs": {"host_bytes": used, "gpu_bytes": [], "calls": calls}}


class Asked:
    """A check whose engine's side answers with fewer rounds than it is asked for; ``counts``: what it was asked for."""

    def __init__(self, options: parts.Options, begun: dict[str, Any], answers: int) -> None:
        self.options, self.begun, self.answers, self.left_s = options, begun, answers, 100.0
        self.counts: list[int] = []

    def ask(self, side: str, verb: str, count: int, **arguments: Any) -> dict[str, Any]:
        self.counts.append(count)
        rounds = min(count, self.answers)
        return {"host_bytes": list(range(rounds)), "gpu_bytes": []}

    def close(self) -> None: ...


def test_memory_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = gpu_check.options_of(gpu_check.parser().parse_args(["--out", str(tmp_path), "--memory-rounds", "1000"]))
    monkeypatch.setattr(parts, "_require", lambda path: path)
    monkeypatch.setattr(parts, "_built", lambda *_: ["fp16"])
    case = SimpleNamespace(name="xs", bundle=lambda precision: tmp_path)
    found: dict[str, Any] = {}
    asked = []
    for answers in (600, 30, 5000):  # the second process has no time for what tells growth
        check = Asked(options, found, answers)
        found = parts.memory(check, case)  # type: ignore[arg-type]
        asked += check.counts
    assert asked == [1000, 400, 400]
    assert (found["complete"], found["calls"], len(found["host_bytes"])) == (True, [600, 400], 1000)


def test_targets_of_drift_memory_and_conformance() -> None:
    stages = [
        {"precision": name, "against_student": {"psnr_db": {"median": value}}}
        for name, value in (("fp16", 44.9), ("int8", 35.1))
    ]
    assert met({"drift s": {"stages": stages}}) == {"44.9 dB": False, "35.1 dB": True}
    level, mib = [10**9] * 1000, 2**20
    leak = [10**9 + place * 64 * 1024 for place in range(1000)]
    assert met(memory_part(level, [1000])) == {"0.0 MiB in 1000 rounds": True}
    ((measured, passed),) = met(memory_part(leak, [1000])).items()
    assert not passed
    assert float(measured.split()[0]) == pytest.approx(882 * 64 * 1024 / mib, abs=0.1)  # nine tenths of 980 rounds
    assert met(memory_part(level[:500], [500])) == {"0.0 MiB in 500 rounds": False}
    two = [*level[:500], *(value + 10**8 for value in level[500:])]  # another process, which uses more
    assert met(memory_part(two, [500, 500])) == {"0.0 MiB in 1000 rounds": True}
    ((measured, passed),) = met(memory_part([*leak[:500], *leak[:500]], [500, 500])).items()
    assert not passed
    assert float(measured.split()[0]) == pytest.approx(2 * 432 * 64 * 1024 / mib, abs=0.1)  # the growths add up
    for passing, failed, good in ((3, {}, True), (3, {"test_a": "why"}, False), (0, {}, False)):
        ((text, verdict),) = met({"conformance": {"passed": passing, "failed": failed, "skipped": {}}}).items()
        assert (text.startswith(f"{passing} passed"), verdict) == (True, good)


def test_the_page_says_where_no_gpu_was_used() -> None:
    records = {"frame s": {"found": frame_part(1.0, best=0.1)}, "memory s": {"failed": "no engine of s was built"}}
    page = table.markdown(records, "cpu", "onnxruntime", ["conformance"])
    assert "No GPU was used: onnxruntime stands in for TensorRT, and no target is judged." in page
    assert "missed" not in page
    assert "- Failed: memory s: no engine of s was built\n" in page
    assert "- Not measured yet: conformance\n" in page
    judged = table.markdown(records, "gpu", "tensorrt", [])
    assert "| s: tensorrt fp16 at least 1.3 × as fast as torch.compile + CUDA graph | 0.10 × | **missed** |" in judged
    assert "No GPU was used" not in judged


def test_reads_what_pytest_reports(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.fixture\ndef broken(): raise OSError('no disk')\n"
        "def test_broken(broken): pass\n"
        "def test_later(): pytest.skip('not here')\n"
    )
    report, bare = tmp_path / "report.xml", {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(tmp_path)]
    subprocess.run(command, capture_output=True, cwd=tmp_path, env=bare)
    found = engine_side.read_report(report)
    assert (found["passed"], set(found["failed"]), set(found["skipped"])) == (
        1,
        {"test_bad", "test_broken"},
        {"test_later"},
    )
    assert "assert 1 == 2" in found["failed"]["test_bad"]
    assert found["skipped"]["test_later"] == "not here"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"no folder: expected --out FOLDER"),
        (["--out", "{tmp}"], r"prepared is no prepared case .*run: python scripts/gpu_check\.py prepare"),
        (
            ["--out", "{tmp}", "--device", "cpu", "--torch", "eager+graph"],
            r"on a cpu: 'eager\+graph'",
        ),
        (["--out", "{tmp}", "--only", "speed"], r"--only: 'speed': expected some of \['build'"),
        (["--out", "{tmp}", "--rounds", "0"], r"a count below 1: expected rounds"),
        (
            ["prepare", "--out", "{tmp}", "--cases", "xs=student:xs"],
            r"case 'xs=student:xs': expected NAME=",
        ),
        (["prepare", "--out", "{tmp}", "--cases", "huge"], r"unknown preset 'huge'"),
    ],
)
def test_faults_of_the_user(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = gpu_check.main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    errors = capsys.readouterr().err
    assert (code, errors.count("\n")) == (2, 1)
    assert re.search(message, errors)


def options(out: Path, *more: str) -> parts.Options:
    """Of a command line for the CPU."""
    found: parts.Options = gpu_check.options_of(
        gpu_check.parser().parse_args(["--out", str(out), "--device", "cpu", *more])
    )
    return found


def test_a_part_is_measured_again_only_if_it_failed_or_what_it_depends_on_changed(tmp_path: Path) -> None:
    evidence, calls = parts.Evidence(tmp_path), []
    check = parts.Check(options(tmp_path), time.monotonic() + 60)
    key, answers = {"bundle": "1"}, [PartError("broken"), {"complete": False}, {"a": 1}, {"a": 2}, {"a": 3}]

    def measure(_: parts.Check) -> dict[str, Any]:
        calls.append(1)
        answer = answers[len(calls) - 1]
        if isinstance(answer, PartError):
            raise answer
        return answer

    part = parts.Part("build xs fp16", lambda: dict(key), measure)
    expected: list[tuple[str, str, dict[str, Any], int]] = [
        ("1", "gpu", {"failed": "broken"}, 1),
        ("1", "gpu", {"found": {"complete": False}}, 2),
        ("1", "gpu", {"found": {"a": 1}}, 3),
        ("1", "gpu", {"found": {"a": 1}}, 3),
        ("2", "gpu", {"found": {"a": 2}}, 4),
        ("2", "another gpu", {"found": {"a": 3}}, 5),
    ]
    for bundle, machine, content, count in expected:
        key["bundle"] = bundle
        gpu_check._measure(part, check, evidence, {"engine": machine})
        record = parts.Evidence(tmp_path).read()["build xs fp16"]
        assert {name: record[name] for name in ("failed", "found") if name in record} == content
        assert len(calls) == count
    check.end = time.monotonic()
    gpu_check._measure(part, check, evidence, {"engine": "another gpu"})  # known, whatever time is left
    key["bundle"] = "3"
    with pytest.raises(OutOfTimeError):
        gpu_check._measure(part, check, evidence, {"engine": "another gpu"})


@pytest.mark.parametrize(("kind", "code"), [("memory", 3), ("build", 0)])
def test_what_was_not_asked_for_is_not_waited_for(kind: str, code: int, tmp_path: Path) -> None:
    evidence = parts.Evidence(tmp_path / "parts")
    evidence.put("memory xs fp16", {}, found={"complete": False})
    memory = parts.Part("memory xs fp16", dict, lambda _: {})
    assert gpu_check._conclude(evidence, [memory], options(tmp_path, "--only", kind)) == code


def test_without_a_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = {"name": "xs", "trained": True, "steps": 1}
    (tmp_path / "prepared" / "xs").mkdir(parents=True)
    (tmp_path / "prepared" / "xs" / cases.RECORD).write_text(json.dumps(record))
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU")
    assert gpu_check.main(["--out", str(tmp_path), "--trt-python", sys.executable]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("gpu_check: ")
    assert "; " in errors
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def prepared(tiny_student: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny student and a toy teacher as case xs, by the script."""
    from tests.toy import make_teacher

    out = tmp_path_factory.mktemp("gpu_check")
    spec = f"xs={tiny_student.path},{make_teacher(out / 'teacher')}"
    assert gpu_check.main(["prepare", "--out", str(out), "--cases", spec, "--steps", "2"]) == 0
    return out


SMALL = ("--device", "cpu", "--pairs", "2", "--rounds", "2", "--frames", "3", "--memory-rounds", "45")


@pytest.mark.slow
def test_the_whole_check_on_a_cpu(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One process, torch.compile included; a second run finds everything there."""
    command = ["--out", str(prepared), *SMALL, "--seconds", "3000"]
    assert gpu_check.main(command) == 0
    evidence = json.loads((prepared / "evidence.json").read_text())
    found = {name: record["found"] for name, record in evidence["parts"].items()}
    assert (evidence["device"], evidence["backend"], evidence["verdicts"]) == ("cpu", "onnxruntime", [])
    assert found["conformance"]["passed"] > 20
    assert not found["conformance"]["failed"]
    frame = found["frame xs"]
    ways = {"onnxruntime fp16", "onnxruntime int8", "torch eager", "torch.compile"}
    assert ways < set(frame["times"])
    assert all(frame["psnr_db"][way] > 40 for way in ways)  # all of them do the same work
    assert [len(one) for one in frame["times"]["torch eager"]["rounds"]] == [3, 3]
    drift = {stage["precision"]: stage["against_student"]["psnr_db"]["median"] for stage in found["drift xs"]["stages"]}
    assert drift["fp16"] > 45
    assert drift["int8"] > 35
    assert len(found["memory xs"]["host_bytes"]) == 45
    assert "No GPU was used" in (prepared / "table.md").read_text()
    before = {file: file.stat().st_mtime_ns for file in (prepared / "parts").glob("[!m]*.json")}
    capsys.readouterr()
    assert gpu_check.main(command) == 0
    assert capsys.readouterr().out == f"done: {prepared / 'table.md'}\n"
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.slow
def test_two_interpreters_and_a_time_limit(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine's side in a process of its own; a run that is cut off is continued by the next."""
    command = ["--out", str(tmp_path), "--bundles", str(prepared / "prepared" / "xs"), *SMALL, "--torch", "eager"]
    command += ["--trt-python", sys.executable, "--only", "build", "reference", "frame"]
    assert gpu_check.main([*command, "--seconds", "0.5"]) == 3
    assert "out of time, run it again" in capsys.readouterr().out
    assert gpu_check.main([*command, "--seconds", "3000"]) == 0
    evidence = json.loads((tmp_path / "evidence.json").read_text())
    frame = evidence["parts"]["frame xs"]["found"]
    assert frame["processes"] == 2
    assert {"onnxruntime fp16", "torch eager"} < set(frame["times"])
    for one in frame["times"].values():
        assert [len(values) for values in one["rounds"]] == [3, 3]
        assert np.all(np.array(one["rounds"]) > 0)
    assert "- Not measured yet: drift xs, memory xs, conformance" in (tmp_path / "table.md").read_text()
    assert {file.name for file in (tmp_path / "log").iterdir()} == {"engine.txt", "torch.txt"}
