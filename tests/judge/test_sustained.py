"""A sustained run with a clock that the test drives."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from rpfm_edge.core.errors import ConfigError
from rpfm_edge.judge.sustained import draw, panels, watch, write
from rpfm_edge.report import plots


class Device:
    """Frames take 0.1 s until ``slow_at_s``, then 0.2 s; 20 W throughout; it says so when it throttles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow_at_s: float) -> None:
        self.now_s, self.slow_at_s = 0.0, slow_at_s
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)

    @property
    def slow(self) -> bool:
        return self.now_s >= self.slow_at_s

    def frame(self) -> None:
        self.now_s += 0.2 if self.slow else 0.1

    def read(self) -> dict[str, Any]:
        cpu = {"load_average": 1.0, "frequency_hz": 1e9, "temperatures_c": {}, "throttle_events": 3 * self.slow}
        known = {"gpus": [], "jetson": None, "power_w": {"board": 20.0}, "energy_j": {}}
        return {"time_s": self.now_s, "cpu": cpu, **known}


def test_a_device_that_slows_down(monkeypatch: pytest.MonkeyPatch) -> None:
    device, kept = Device(monkeypatch, slow_at_s=30.05), []
    result = watch(device.frame, 1.0, keep=kept.append, read=device.read)
    rates = [window["fps"] for window in result["windows"]]
    assert rates == pytest.approx([10, 10, 10, 5, 5, 5], rel=0.03)
    assert result["held"] == pytest.approx(0.5, rel=0.03)
    assert result["throttling"] == ["CPU: 3 throttle events"]
    frames = sum(window["frames"] for window in result["windows"])
    assert result["frames_per_joule"]["board"] == pytest.approx(frames / (20 * (device.now_s - 0.1)))
    assert [len(one["windows"]) for one in kept] == [1, 2, 3, 4, 5, 6]  # what was measured outlives a failure
    labels = [panel.ylabel for panel in panels(result["windows"])]
    assert labels == ["frames per second", "clock (GHz)", "power (W)", "load average"]  # no sensor: no panel


def test_a_failure_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = Device(monkeypatch, slow_at_s=1e9)

    def frame() -> None:
        device.frame()
        if device.now_s > 25:
            raise RuntimeError("the backend is gone")

    with pytest.raises(RuntimeError):
        watch(frame, 1.0, keep=lambda result: write(result, tmp_path), read=device.read)
    kept = json.loads((tmp_path / "sustained.json").read_text())
    assert len(kept["windows"]) == 2
    draw(kept, tmp_path)
    picture = cv2.imread(str(tmp_path / "sustained.png"))
    assert picture is not None
    assert picture.std() > 5


@pytest.mark.parametrize("minutes", [0.1, -1, float("nan"), float("inf")])
def test_a_time_that_cannot_be(minutes: float) -> None:
    with pytest.raises(ConfigError, match=rf"of {minutes:g} minutes: expected at least 20 s, two windows, and finite"):
        watch(lambda: None, minutes)


def test_longer_bars_for_greater_values() -> None:
    picture = cv2.imdecode(np.frombuffer(plots.bars_png({"a": 100, "b": 1, "c": 10}, "x", ["a"]), np.uint8), 1)
    grey = np.all(picture == (0xB2, 0xA4, 0x9A), axis=-1).sum(axis=1)  # BGR of the bars that are not marked
    blue = np.all(picture == (0xEB, 0x6F, 0x1F), axis=-1).sum(axis=1)
    assert blue.max() > grey.max() > 0
    assert np.argmax(blue) < np.argmax(grey)  # the first name is on top
