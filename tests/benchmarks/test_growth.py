"""Graphs of the growth curves against torch, and exponents in closed form."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from benchmarks import growth
from benchmarks.growth import Case, abscissa, axes, exponent, make_graph
from distill.rpfm import PRESETS, RPFMConfig


def test_only_one_thing_changes_along_an_axis() -> None:
    found = axes(Case(), cores=6)
    assert [case.threads for case in found["threads"]] == [1, 2, 4, 6]
    for axis, cases in found.items():
        varied = [{name for name in vars(Case()) if getattr(case, name) != getattr(Case(), name)} for case in cases]
        assert set().union(*varied) <= {axis}
        assert len({abscissa(axis, case) for case in cases}) == len(cases)


def test_a_batch_is_as_its_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", RPFMConfig(dim=32, depth=1, heads=2))
    size, rng = (64, 48), np.random.default_rng(0)
    for batch in (1, 2):
        make_graph("tiny", Case(size, batch=batch), tmp_path / f"{batch}.onnx")
    one, two = (onnxruntime.InferenceSession(tmp_path / f"{batch}.onnx") for batch in (1, 2))
    shapes = {value.name: value.shape for value in two.get_inputs()}
    feeds = {
        "pose": rng.integers(0, 256, shapes["pose"], dtype=np.uint8),
        "noise": rng.standard_normal(shapes["noise"], dtype=np.float32),
        "source_kv": rng.standard_normal(shapes["source_kv"], dtype=np.float32),
    }
    (both,) = two.run(None, feeds)
    for k in range(2):
        (single,) = one.run(None, {**feeds, "pose": feeds["pose"][k : k + 1], "noise": feeds["noise"][k : k + 1]})
        assert np.abs(both[k].astype(int) - single[0]).max() <= 1
    assert both.std() > 1


def test_exponents() -> None:
    points = [{"x": x, "frame_s": 3 * x**1.5} for x in (1, 2, 4, 8)]
    assert exponent(points) == pytest.approx(1.5)
    assert exponent(points[:1]) is None


def test_curves_of_another_machine_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, machine = (
        [],
        {"cpu": "A", "usable_cores": 2, "versions": {"openvino": "1"}, "jetson": {"temperatures": 4}},
    )

    def curve(preset: str, axis: str, cases: Sequence[Case], rounds: int, out: Path) -> dict[str, Any]:
        measured.append(axis)
        points = [{"x": abscissa(axis, c), "flops": 1e9, "call": {"p50_s": 0.1}, "frame_s": 0.1} for c in cases]
        return {"points": points, "exponent": None}

    monkeypatch.setattr(growth, "measure_axis", curve)
    monkeypatch.setattr(growth, "where", lambda versions: machine)
    monkeypatch.setattr(sys, "argv", ["growth", "--out", str(tmp_path)])
    growth.main()
    assert measured == ["size", "steps", "batch", "threads"]
    machine["jetson"] = {"temperatures": 5}
    growth.main()
    assert len(measured) == 4
    for change in ({"cpu": "B"}, {"versions": {"openvino": "2"}}, {"jetson": {"power_mode": "15W"}}):
        machine |= change
        measured.clear()
        growth.main()
        assert len(measured) == 4, change
        assert json.loads((tmp_path / "growth.json").read_text())["machine"] == machine
