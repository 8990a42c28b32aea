"""Runs of the gate's calibration: counted only beside others of the same bundle, backend, device and limit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gate_calibration
from rpfm_edge import api
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.judge import baseline


def test_another_bundle_backend_device_or_limit_is_another_experiment(
    tiny_student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = []
    for steps in (1, 2):
        graph = api.quantize(tiny_student.path, "sample", tmp_path / f"{steps}", "fp32", steps).path
        bundles.append(api.build(graph, tmp_path / f"bundle{steps}", ["onnxruntime", "openvino"]).path)

    def run(bundle: Path, backend: str, way: str, share: float, *given: Any) -> dict[str, Any]:
        return {"way": way, "share": share, "verdict": "pass", "slowdown": share, "took_s": 1.0}

    monkeypatch.setattr(gate_calibration, "one_run", run)

    def counted(bundle: Path, backend: str = "openvino", runs: int = 1, limit: float = 60.0) -> set[str]:
        options = {"--backend": backend, "--out": tmp_path / "out", "--runs": runs, "--limit": limit, "--way": "a/b"}
        given = [str(word) for option in options.items() for word in option]
        monkeypatch.setattr(sys, "argv", ["gate_calibration", str(bundle), *given])
        gate_calibration.main()
        lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| a/b")]
        assert len(lines) == len(gate_calibration.SLOWDOWNS)
        return {line[3].strip() for line in lines}

    assert counted(bundles[0], runs=3) == {"3"}
    assert counted(bundles[0]) == {"3"}
    assert counted(bundles[1]) == {"1"}
    assert counted(bundles[0], "onnxruntime") == {"1"}
    assert counted(bundles[0], limit=30.0) == {"1"}
    here = baseline.fingerprint
    monkeypatch.setattr(baseline, "fingerprint", lambda *given: {**here(*given), "cpu": "another"})
    assert counted(bundles[0]) == {"1"}
