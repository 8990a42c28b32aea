"""``rpfm-edge profile`` and ``sustain`` on a real, tiny bundle."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import runtimes
from rpfm_edge import api
from rpfm_edge.cli import app
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import BackendError, ConfigError
from rpfm_edge.judge import sustained


@pytest.fixture(scope="module")
def built(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api.build(tiny_graph.path, tmp_path_factory.mktemp("b") / "bundle", ["openvino", "torch"]).path


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def test_stages(bundle: Path) -> None:
    result = CliRunner().invoke(app, ["profile", str(bundle), "--rounds", "3"])
    assert result.exit_code == 0, result.output
    for text in ("pose drawing", "pose encoder", "step 2", "decoder", "calls and copies", "torch cannot say"):
        assert text in " ".join(result.output.split())
    kept = api.inspect(bundle)["evidence"]["stages"]
    assert [one["backend"] for one in kept["backends"]] == ["openvino"]
    artifact.load(bundle, "bundle")  # still verifies


def test_the_stages_of_one_backend_leave_the_evidence_of_all(tiny_graph: Artifact, tmp_path: Path) -> None:
    bundle = api.build(tiny_graph.path, tmp_path / "bundle", ["openvino", "onnxruntime"]).path
    api.profile(bundle, rounds=3)
    before = api.inspect(bundle)["evidence"]["stages"]
    assert [one["backend"] for one in before["backends"]] == ["openvino", "onnxruntime"]
    assert [one["backend"] for one in api.profile(bundle, "onnxruntime", rounds=3)["backends"]] == ["onnxruntime"]
    assert api.inspect(bundle)["evidence"]["stages"] == before


@pytest.mark.parametrize("runs", ["-5", "0"])
def test_no_rounds_are_refused(bundle: Path, runs: str) -> None:
    result = CliRunner().invoke(app, ["profile", str(bundle), "--rounds", runs])
    assert isinstance(result.exception, ConfigError)
    assert f"{runs} rounds: expected at least 1" in str(result.exception)


def test_no_backend_can_tell(bundle: Path) -> None:
    result = CliRunner().invoke(app, ["profile", str(bundle), "--backend", "torch"])
    assert result.exit_code != 0
    assert "torch cannot say what each layer costs" in str(result.exception)


def test_stages_skip_an_engine_whose_library_is_not_here(
    tiny_graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, find = api.build(tiny_graph.path, tmp_path / "b", ["openvino", "onnxruntime"]).path, runtimes.find_spec
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == "openvino" else find(name))
    result = CliRunner().invoke(app, ["profile", str(bundle), "--rounds", "3"])
    assert result.exit_code == 0, result.output
    assert "openvino: backend openvino is not installed" in " ".join(result.output.split())
    assert [one["backend"] for one in api.inspect(bundle)["evidence"]["stages"]["backends"]] == ["onnxruntime"]


def test_the_profile_without_onnx(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is told to install onnx, and nothing heavier."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendError, match=r"onnx is not installed .* run: pip install 'rpfm-edge\[profile\]'"):
        api.profile(bundle, "openvino", rounds=3)
    declared = (Path(api.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^profile = \["onnx[^"]*"\]', declared, re.MULTILINE)


def test_sustained(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sustained.watch, "__defaults__", (0.2, *sustained.watch.__defaults__[1:]))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["sustain", str(bundle), "--minutes", "0.01", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads((out / "sustained.json").read_text())
    assert (len(found["windows"]), found["backend"]) == (3, "openvino")
    assert all(window["fps"] > 1 for window in found["windows"])
    assert "of the first fifth's frames per second" in result.output
    assert (out / "sustained.png").read_bytes().startswith(b"\x89PNG")


def test_sustained_without_matplotlib(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All windows are kept; what is missing is the plot, and no older one is left beside them."""
    monkeypatch.setattr(sustained.watch, "__defaults__", (0.2, *sustained.watch.__defaults__[1:]))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "sustained.png").write_bytes(b"of another day")
    result = CliRunner().invoke(app, ["sustain", str(bundle), "--minutes", "0.01", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert len(json.loads((out / "sustained.json").read_text())["windows"]) == 3
    assert not (out / "sustained.png").exists()
    assert "no plot: matplotlib is not installed" in " ".join(result.output.split())
