"""``rpfm-edge bench --stages`` and ``--sustained`` on a real, tiny bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rpfm_edge import api, artifact, sustained
from rpfm_edge.artifact import Artifact
from rpfm_edge.cli import app


@pytest.fixture(scope="module")
def built(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api.build(tiny_graph.path, tmp_path_factory.mktemp("b") / "bundle", ["openvino", "torch"]).path


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def test_stages(bundle: Path) -> None:
    result = CliRunner().invoke(app, ["bench", str(bundle), "--stages", "--runs", "3"])
    assert result.exit_code == 0, result.output
    for text in ("pose drawing", "pose encoder", "step 2", "decoder", "calls and copies", "torch cannot say"):
        assert text in " ".join(result.output.split())
    kept = api.inspect(bundle)["evidence"]["stages"]
    assert [one["backend"] for one in kept["backends"]] == ["openvino"]
    artifact.load(bundle, "bundle")  # still verifies


def test_no_backend_can_tell(bundle: Path) -> None:
    result = CliRunner().invoke(app, ["bench", str(bundle), "--backend", "torch", "--stages"])
    assert result.exit_code != 0
    assert "torch cannot say what each layer costs" in str(result.exception)


def test_sustained(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sustained.sustain, "__defaults__", (0.2, *sustained.sustain.__defaults__[1:]))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["bench", str(bundle), "--sustained", "0.01", "--out", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads((out / "sustained.json").read_text())
    assert (len(found["windows"]), found["backend"]) == (3, "openvino")
    assert all(window["fps"] > 1 for window in found["windows"])
    assert "of the first fifth's frames per second" in result.output
