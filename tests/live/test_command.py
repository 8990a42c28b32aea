"""TODO."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from rpfm_edge.cli import app
from rpfm_edge.core.errors import ConfigError, RpfmError
from rpfm_edge.live import command as live_command
from rpfm_edge.live.latency import TITLES
from rpfm_edge.live.messages import Pose
from rpfm_edge.live.session import Frame
from rpfm_edge.people.image import save_png
from tests.live.driver import driver


@pytest.fixture
def picture(tmp_path: Path, sources: list[np.ndarray]) -> Path:
    save_png(tmp_path / "person.png", sources[0])
    return tmp_path / "person.png"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_a_signal_and_writes_what_it_measured(
    live_bundle: Path, picture: Path, tmp_path: Path, poses: np.ndarray, number: int
) -> None:
    out = tmp_path / "report"
    options = ("--source", str(picture), "--port", "0", "--report", str(out))
    command = (sys.executable, "-m", "rpfm_edge", "live", str(live_bundle), *options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("live at http://127.0.0.1:")
        with driver(int(first.rsplit(":", 1)[1])) as client:
            for points in poses[:5]:
                client.pose(points, t_ms=1.0)
                client.say(type="shown", id=client.frame()[0]["id"], t_ms=21.0)
            client.say(type="ping", t_ms=0)
            client.text("pong")
        process.send_signal(number)
        said, complaint = process.communicate(timeout=20)
    assert (process.returncode, complaint) == (0, "")
    assert f"wrote {out / 'live.json'} and live.html" in said
    found = json.loads((out / "live.json").read_text())
    assert found["counters"]["frames"] == found["split_ms"]["pose_to_photon"]["count"] == 5
    assert found["split_ms"]["pose_to_photon"]["p99"] == 20
    assert TITLES["pose_to_photon"] in (out / "live.html").read_text()


def test_any_other_address_needs_the_token_and_says_so(live_bundle: Path, picture: Path, tmp_path: Path) -> None:
    options = ("--source", str(picture), "--host", "0.0.0.0", "--port", "0", "--report", str(tmp_path / "report"))
    command = (sys.executable, "-m", "rpfm_edge", "live", str(live_bundle), *options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = ""
        while "unencrypted" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        port = int(said.split("\n", 1)[0].rsplit(":", 1)[1])
        token = next(line for line in said.splitlines() if line.startswith("token ")).removeprefix("token ")
        with driver(port, f"?token={token}") as client:
            assert client.hello["size"] == [64, 48]
        process.send_signal(signal.SIGTERM)
    assert "/?pair=" in said
    assert json.loads((tmp_path / "report" / "live.json").read_text())["counters"]["connected"] == 1
    assert not (tmp_path / "report" / "live.html").exists()  # no frame was sent


def test_a_session_is_recorded(live_bundle: Path, picture: Path, tmp_path: Path, poses: np.ndarray) -> None:
    pytest.importorskip("av")
    options = ("--source", str(picture), "--port", "0", "--report", str(tmp_path / "report"))
    command = (sys.executable, "-m", "rpfm_edge", "live", str(live_bundle), *options)
    with subprocess.Popen((*command, "--record", str(tmp_path / "live.mp4")), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.readline().decode()
        with driver(int(first.rsplit(":", 1)[1])) as client:
            for points in poses[:5]:
                client.pose(points)
                client.frame()
        process.send_signal(signal.SIGTERM)
        said = process.stdout.read().decode()
    assert "live.mp4: 5 frames, 0 dropped" in said
    assert cv2.VideoCapture(str(tmp_path / "live.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 5


def test_a_recording_hides_no_other_fault(live_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    options = ["--source", str(tmp_path / "missing.png"), "--port", "0", "--record", str(tmp_path / "live.mp4")]
    ended = CliRunner().invoke(app, ["live", str(live_bundle), *options, "--report", str(tmp_path / "report")])
    assert isinstance(ended.exception, RpfmError)
    assert "missing.png" in str(ended.exception)
    assert not list(tmp_path.glob("*live*"))


def test_a_recording_that_fails_leaves_the_report(
    live_bundle: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av")
    monkeypatch.setattr(live_command, "_wait", lambda *_: None)  # it ends before a frame came
    options = ["--source", str(picture), "--port", "0", "--record", str(tmp_path / "live.mp4")]
    ended = CliRunner().invoke(app, ["live", str(live_bundle), *options, "--report", str(tmp_path / "report")])
    assert isinstance(ended.exception, RpfmError)
    assert "live.mp4 was not written" in str(ended.exception)
    assert json.loads((tmp_path / "report" / "live.json").read_text())["counters"]["frames"] == 0


def test_what_came_before_a_fault_is_recorded(tmp_path: Path, sources: list[np.ndarray]) -> None:
    pytest.importorskip("av")
    frame = Frame(1, Pose(1, np.zeros((18, 2)), 0.0), 1, 1, sources[0], False, {"rendered": 0.0})

    def serve() -> None:
        with live_command.recording(tmp_path / "live.mp4", (64, 48)) as tap:
            assert tap is not None
            tap(frame)
            raise ValueError("the service ended")

    with pytest.raises(ValueError, match="the service ended"):
        serve()
    assert cv2.VideoCapture(str(tmp_path / "live.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 1


def test_the_token_of_a_file_is_not_told_to_a_log(live_bundle: Path, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef")
    options = ("--source", str(picture), "--host", "0.0.0.0", "--port", "0", "--report", str(tmp_path / "report"))
    command = (sys.executable, "-m", "rpfm_edge", "live", str(live_bundle), *options)
    with subprocess.Popen((*command, "--token-file", str(tmp_path / "token")), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        said = (first + process.stdout.read()).decode()
    assert "unencrypted" in said
    assert "0123456789abcdef" not in said
    assert "pair=" not in said


def test_the_command_line_loads_nothing_of_the_extra_until_it_serves() -> None:
    names = ("starlette", "uvicorn", "websockets", "prometheus_client", "qrcode", "OneEuroFilter", "openvino")
    code = f"import sys, rpfm_edge.cli; print(*(name for name in {names} if name in sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []


def test_options_that_make_no_sense_are_refused(live_bundle: Path, picture: Path) -> None:
    start = ["live", str(live_bundle), "--source", str(picture), "--port", "0"]
    for options, words in [
        (["--deadline-ms", "0"], "--deadline-ms is 0"),
        (["--cert", "cert.pem"], "--cert and --key"),
        (["--fps", "0"], "--fps is 0"),
    ]:
        ended = CliRunner().invoke(app, [*start, *options])
        assert isinstance(ended.exception, ConfigError)
        assert words in str(ended.exception)


def test_a_report_that_cannot_be_written_is_refused_at_the_start(
    live_bundle: Path, picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "report").touch()
    options = ("--source", str(picture), "--port", "0", "--report", str(tmp_path / "report"))
    command = (sys.executable, "-m", "rpfm_edge", "live", str(live_bundle), *options)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"{tmp_path / 'report'}: File exists" in ended.stderr
