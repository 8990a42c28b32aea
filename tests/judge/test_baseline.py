"""Baselines on disk: kept for one device only, verified when read, with the bundle that they were measured on."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rpfm_edge import api
from rpfm_edge.bundle.evidence import add_evidence
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact, load
from rpfm_edge.core.errors import ArtifactError, ConfigError
from rpfm_edge.core.files import json_digest, write_text
from rpfm_edge.judge import baseline
from rpfm_edge.judge.baseline import Baseline, find, fingerprint, kept_bundle, save
from rpfm_edge.measure import machine

DEVICE = {"cpu": "A", "usable_cores": 2, "libraries": {"openvino": "1"}}


@pytest.fixture(scope="module")
def bundle(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return api.build(tiny_graph.path, tmp_path_factory.mktemp("baseline") / "bundle", "onnxruntime")


@pytest.fixture
def kept(bundle: Artifact) -> Baseline:
    config = {"size": [64, 48], "steps": 2, "precision": "fp32"}
    return Baseline("main", "onnxruntime", DEVICE, config, bundle.digest, (0.01, 0.02), ("busy",))


def test_what_is_saved_is_found(tmp_path: Path, bundle: Artifact, kept: Baseline) -> None:
    path = save(tmp_path, kept, bundle)
    assert find(tmp_path, "main", "onnxruntime", DEVICE) == kept
    assert json.loads(path.read_text())["times_s"] == [0.01, 0.02]
    copy = kept_bundle(tmp_path, kept)
    assert copy is not None
    assert copy.digest == bundle.digest
    assert copy.path.is_relative_to(tmp_path)
    assert not [file for file in tmp_path.rglob(".*")]


def test_another_name_backend_or_device_is_no_baseline(tmp_path: Path, bundle: Artifact, kept: Baseline) -> None:
    save(tmp_path, kept, bundle)
    assert find(tmp_path, "other", "onnxruntime", DEVICE) == f"{tmp_path} has no baseline other for onnxruntime"
    assert "no baseline main for openvino" in str(find(tmp_path, "main", "openvino", DEVICE))
    assert "no baseline main" in str(find(tmp_path / "absent", "main", "onnxruntime", DEVICE))
    other = {**DEVICE, "usable_cores": 4, "libraries": {"openvino": "2"}}
    said = find(tmp_path, "main", "onnxruntime", other)
    assert said == "baseline main is of another device: openvino was 1 and is 2; usable_cores was 2 and is 4"
    assert isinstance(find(tmp_path, "main", "onnxruntime", {**DEVICE, "power_mode": "15W"}), str)


def test_each_device_keeps_its_own(tmp_path: Path, bundle: Artifact, kept: Baseline) -> None:
    other = replace(kept, device={**DEVICE, "cpu": "B"}, times_s=(0.5,))
    save(tmp_path, kept, bundle)
    save(tmp_path, other, bundle)
    assert find(tmp_path, "main", "onnxruntime", DEVICE) == kept
    assert find(tmp_path, "main", "onnxruntime", other.device) == other


def test_copies_that_no_baseline_names_are_removed(tmp_path: Path, bundle: Artifact, kept: Baseline) -> None:
    again = replace(kept, digest="f" * 64, name="old")
    save(tmp_path, again, bundle)
    save(tmp_path, kept, bundle)
    assert len(list((tmp_path / "bundles").iterdir())) == 2
    save(tmp_path, replace(kept, name="old"), bundle)
    assert [copy.name for copy in (tmp_path / "bundles").iterdir()] == [bundle.digest[:16]]


def test_two_saves_at_once_keep_both_copies(
    tmp_path: Path, bundle: Artifact, kept: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(bundle.path, tmp_path / "other")
    artifact.seal(path, "bundle", {**bundle.config, "precision": "fp16"}, bundle.signatures, bundle.lineage)
    other = load(path, "bundle")
    folder, second, write = tmp_path / "kept", replace(kept, name="second", digest=other.digest), write_text

    def interrupted(path: Path, text: str) -> None:
        monkeypatch.setattr(baseline, "write_text", write)
        save(folder, second, other)  # the other process, in the middle of the first one's
        write(path, text)

    monkeypatch.setattr(baseline, "write_text", interrupted)
    save(folder, kept, bundle)
    assert second.digest != kept.digest
    for baseline_of in (kept, second):
        copy = kept_bundle(folder, baseline_of)
        assert copy is not None
        assert copy.digest == baseline_of.digest


def test_a_copy_that_was_altered_is_not_used(tmp_path: Path, bundle: Artifact, kept: Baseline) -> None:
    save(tmp_path, kept, bundle)
    copy = kept_bundle(tmp_path, kept)
    assert copy is not None
    (copy.path / "frame.onnx").write_bytes(b"x")
    assert kept_bundle(tmp_path, kept) is None
    save(tmp_path, kept, bundle)  # and is replaced
    assert kept_bundle(tmp_path, kept) is not None
    shutil.rmtree(copy.path)
    assert kept_bundle(tmp_path, kept) is None


def test_evidence_does_not_make_another_bundle(tmp_path: Path, bundle: Artifact, kept: Baseline) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(bundle.path, mine)
    add_evidence(load(mine), "speed", {"backends": []})
    save(tmp_path / "kept", kept, load(mine, "bundle"))
    copy = kept_bundle(tmp_path / "kept", kept)
    assert copy is not None
    assert copy.digest == bundle.digest


def signed(content: dict[str, object]) -> str:
    return json.dumps({**content, "sha256": json_digest(content)})


def test_a_damaged_file_is_refused(tmp_path: Path, bundle: Artifact, kept: Baseline) -> None:
    path = save(tmp_path, kept, bundle)
    whole, content = path.read_text(), {"format": 2, **json.loads(json.dumps(asdict(kept)))}
    assert signed(content) == json.dumps(json.loads(whole))
    damages = {
        "cut short": whole[: len(whole) // 2],
        "empty": "",
        "another value": whole.replace("0.01", "0.09"),
        "no object": "[]",
        "no digest": "{}",
        "another format": signed({**content, "format": 1}),
        "no times": signed({**content, "times_s": []}),
        "times below zero": signed({**content, "times_s": [0.1, -1]}),
        "times of text": signed({**content, "times_s": "fast"}),
        "unknown field": signed({**content, "more": 1}),
        "missing field": signed({name: value for name, value in content.items() if name != "backend"}),
    }
    for damage, text in damages.items():
        path.write_text(text)
        with pytest.raises(ArtifactError, match="was altered or cut short") as error:
            find(tmp_path, "main", "onnxruntime", DEVICE)
        assert str(path) in str(error.value), damage
        assert "save the baseline again" in str(error.value)
    path.write_text(whole)
    assert find(tmp_path, "main", "onnxruntime", DEVICE) == kept


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b"])
def test_names_that_are_no_file_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="baseline name"):
        find(tmp_path, name, "onnxruntime", DEVICE)


def test_a_fingerprint_is_the_device_and_not_the_moment(bundle: Artifact) -> None:
    found = fingerprint(bundle, "onnxruntime")
    assert found == fingerprint(bundle, "onnxruntime")
    assert json.loads(json.dumps(found)) == found
    where = machine.where()
    assert (found["cpu"], found["usable_cores"]) == (where["cpu"], where["usable_cores"])
    assert set(found["libraries"]) == {"onnxruntime", "numpy", "opencv-python-headless"}


def test_gpus_and_driver_are_read_from_the_drivers_files(bundle: Artifact, tmp_path: Path) -> None:
    files = {
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA RTX A2000\nIRQ:   12\n",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu\nGCC: 12\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = fingerprint(bundle, "onnxruntime", tmp_path)
    assert found["gpus"][:1] == ["NVIDIA RTX A2000"]
    assert (found["driver"], found["governor"]) == ("550.54.14", "powersave")
    bare = fingerprint(bundle, "onnxruntime", tmp_path / "bare")
    assert (bare["gpus"], bare["driver"], bare["governor"]) == ([], None, None)


def test_open_kernel_modules_have_their_version_too(tmp_path: Path) -> None:
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n"
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(text)
    assert baseline._driver(tmp_path) == "540.4.0"
