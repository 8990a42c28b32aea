"""Evidence in a bundle: none is lost to another process, to a build in place or to a disk that takes none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rpfm_edge import api
from rpfm_edge.bundle import evidence
from rpfm_edge.core import artifact, files
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError
from rpfm_edge.core.files import write_bytes
from rpfm_edge.judge.gate import GateConfig, run_against


@pytest.fixture(scope="module")
def shared(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return api.build(tiny_graph.path, tmp_path_factory.mktemp("shared") / "bundle", "onnxruntime")


@pytest.fixture
def built(shared: Artifact, tmp_path: Path) -> Artifact:
    return artifact.load(shutil.copytree(shared.path, tmp_path / "bundle"))


def test_what_is_added_is_read(built: Artifact) -> None:
    evidence.add_evidence(built, "speed", {"first": 1})
    evidence.add_evidence(built, "drift", {"psnr_db": 40})
    evidence.add_evidence(built, "speed", {"second": 2})
    assert api.inspect(built.path)["evidence"] == {"drift": {"psnr_db": 40}, "speed": {"second": 2}}
    assert artifact.load(built.path) == built
    (built.path / "evidence" / "speed.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"speed\.json is no JSON .*: expected evidence; measure it again"):
        api.inspect(built.path)


@pytest.mark.parametrize("name", ["speed", "drift"])
def test_two_processes_add_at_once(built: Artifact, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second in the middle of the first, before and after each of its writes."""
    write = write_bytes

    def interleaved(path: Path, data: bytes) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_bytes", write)
            evidence.add_evidence(built, name, {"second": "longer than the first"})
            write(path, data)
            evidence.add_evidence(built, name, {"second": "longer than the first"})

    monkeypatch.setattr(files, "write_bytes", interleaved)
    evidence.add_evidence(built, "speed", {"first": 1})
    found = api.inspect(built.path)["evidence"]  # which verifies the bundle
    assert found == {"speed": {"first": 1}, name: {"second": "longer than the first"}}


def test_evidence_that_is_cut_off_leaves_the_old(built: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence.add_evidence(built, "speed", {"first": 1})
    write = Path.write_bytes

    def dying(self: Path, data: bytes) -> None:
        write(self, data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", dying)
        with pytest.raises(KeyboardInterrupt):
            evidence.add_evidence(built, "speed", {"second": 2})
    assert api.inspect(built.path)["evidence"] == {"speed": {"first": 1}}


def test_a_backend_added_in_place_leaves_the_evidence(built: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    evidence.add_evidence(built, "speed", {"backends": []})
    made = api.build(built.path, built.path, "openvino")
    assert list(made.config["backends"]) == ["onnxruntime", "openvino"]
    assert evidence.read_evidence(made) == {"speed": {"backends": []}}
    assert capsys.readouterr().err == ""


def test_an_engine_built_again_drops_the_evidence_and_says_so(
    built: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("speed", "drift"):
        evidence.add_evidence(built, name, {})
    assert evidence.read_evidence(api.build(built.path, tmp_path / "other", "onnxruntime")) == {}
    assert capsys.readouterr().err == ""  # nothing is lost: this one keeps it
    assert evidence.read_evidence(api.build(built.path, built.path, "onnxruntime")) == {}
    said = f"onnxruntime built again: the evidence of {built.path} (drift, speed) is dropped; measure it again"
    assert capsys.readouterr().err == f"rpfm-edge: {said}.\n"


def test_a_bundle_that_takes_no_evidence_is_measured_all_the_same(
    built: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where the folder should be stands for a read-only mount, which does not stop root."""
    (built.path / "evidence").touch()
    measured = [api.bench(built.path, runs=5, seconds=0.01), api.profile(built.path, rounds=5)]
    assert [one["backends"][0]["backend"] for one in measured] == ["onnxruntime", "onnxruntime"]
    said = capsys.readouterr().err.splitlines()
    files = [built.path / "evidence" / f"{name}.json" for name in ("speed", "stages")]
    assert said == [f"rpfm-edge: {file} was not written, so this result is not kept: File exists." for file in files]


def test_a_verdict_is_given_where_it_cannot_be_kept(
    built: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").touch()
    config = GateConfig(max_slowdown=0.9, rounds=20, seconds=0.01)
    assert run_against(built, ["onnxruntime"], built, tmp_path, config)["verdict"] in ("pass", "unstable")
    assert "results/against.json was not written, so this result is not kept: " in capsys.readouterr().err


def test_a_baseline_that_cannot_be_kept_is_refused_before_it_is_measured(
    built: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpfm_edge.judge.gate.frame", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        api.save_baseline(built.path, "main", baselines=tmp_path / "file")
