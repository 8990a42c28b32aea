"""The doctor: what it reports about this machine, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import rpfm_edge
import runtimes
from rpfm_edge import doctor
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.backends import BACKENDS
from rpfm_edge.core.errors import BackendError, ConfigError
from runtimes.trt import cuda as trt_cuda

ROOT = Path(rpfm_edge.__file__).parent.parent


def shown(diagnosis: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "1000")
    doctor.render(diagnosis)
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def diagnosis() -> dict[str, Any]:
    return doctor.doctor()


def test_diagnosis_goes_through_json(diagnosis: dict[str, Any]) -> None:
    assert json.loads(json.dumps(diagnosis)) == diagnosis


def test_diagnosis_is_of_this_machine(diagnosis: dict[str, Any]) -> None:
    psutil = pytest.importorskip("psutil")
    assert diagnosis["memory_bytes"] == pytest.approx(psutil.virtual_memory().total, rel=0.01)
    assert diagnosis["cpu"]["cores"] == psutil.cpu_count()
    assert 1 <= diagnosis["cpu"]["cores_usable"] <= diagnosis["cpu"]["cores"]
    assert platform.python_version() in diagnosis["python"]
    assert diagnosis["versions"]["numpy"] == version("numpy")
    assert diagnosis["intruders"] == {}


def test_backends_are_those_that_load(diagnosis: dict[str, Any]) -> None:
    assert set(diagnosis["backends"]) == set(BACKENDS)
    for library in ("openvino", "onnxruntime", "torch"):  # whose backends need nothing but the library
        assert (diagnosis["backends"][library] is None) == (find_spec(library) is not None)
    assert bool(diagnosis["openvino_devices"]) == (diagnosis["backends"]["openvino"] is None)


BROKEN = {  # how a broken library shows itself when it is imported
    "attribute": "import sys\nsys.no_such_name",
    "runtime": "raise RuntimeError('built for another machine')",
    "empty": None,  # what pip leaves where it uninstalled one of two distributions of the same package
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_onnxruntime_does_not_break_the_others(kind: str, tiny_graph: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    stub = tmp_path / "stubs" / "onnxruntime"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(BROKEN[kind] or "")
    script = """
import json, sys
from rpfm_edge import api
api.build(sys.argv[1], sys.argv[2], "openvino")
print(json.dumps(api.doctor()["backends"]))
"""
    command = [sys.executable, "-c", script, str(tiny_graph.path), str(tmp_path / "bundle")]
    paths = os.pathsep.join([str(stub.parent), str(ROOT)])
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert "backend onnxruntime cannot be imported" in found["onnxruntime"]
    assert found["openvino"] is None
    assert (tmp_path / "bundle" / "engines" / "openvino").is_dir()


def test_is_quick(diagnosis: dict[str, Any]) -> None:
    start = time.process_time()
    doctor.doctor()
    assert time.process_time() - start < 2


def test_the_table_has_it_all(
    diagnosis: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(diagnosis, capsys, monkeypatch)
    for name in (
        *diagnosis["backends"],
        *diagnosis["openvino_devices"],
        *diagnosis["versions"],
        *diagnosis["cpu"]["flags"],
    ):
        assert name in text


def test_the_pip_line_of_a_missing_backend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "openvino", replace(BACKENDS["openvino"], libraries=("no_such_library",)))
    found = doctor.doctor()
    assert found["openvino_devices"] == {}
    assert "pip install 'rpfm-edge[openvino]'" in shown(found, capsys, monkeypatch)


@pytest.mark.parametrize(("library", "words"), [("tensorrt-rtx", "builds only"), ("tensorrt", "not usable")])
def test_tensorrt_without_a_gpu(
    library: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    diagnosis: dict[str, Any],
) -> None:
    def none_here() -> None:
        raise BackendError("no NVIDIA GPU can be used", expected="a GPU", fix="run on the device")

    monkeypatch.setattr(trt_cuda, "device", none_here)
    monkeypatch.setattr(runtimes, "available", lambda: {"tensorrt": None, "torch": None})
    found = doctor.doctor() | {"versions": {library: "10.0"}}
    assert found["backends"] == {"tensorrt": None, "torch": None}
    text = shown(found, capsys, monkeypatch)
    assert f"{words}: no NVIDIA GPU can be used: expected a GPU; run on the device." in text
    assert text.count("│ usable") == 1  # torch
    monkeypatch.setattr(trt_cuda, "device", lambda: None)
    assert doctor.doctor()["no_gpu"] is None


def test_an_unknown_precision() -> None:
    with pytest.raises(ConfigError, match=r"unknown precision 'nonsense': expected one of \('fp32', .*'nvfp4'\)"):
        doctor.doctor("nonsense")


def test_cpu_flags() -> None:
    intel = "processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni amx_int8 avx20\n\nprocessor\t: 1\nflags\t\t: fpu avx2\n"
    assert doctor.cpu_flags(intel) == ["avx2", "avx512_vnni", "amx_int8"]
    arm = "processor\t: 0\nBogoMIPS\t: 62.50\nFeatures\t: fp asimd asimdhp asimddp i8mm\nCPU part\t: 0xd42 bf16\n"
    assert doctor.cpu_flags(arm) == ["asimddp", "asimdhp", "i8mm"]
    assert doctor.cpu_flags("") == []


def test_another_distribution_in_the_place_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, diagnosis: dict[str, Any]
) -> None:
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / "__init__.py").touch()
    info = tmp_path / "quantizer_tools-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: quantizer-tools\nVersion: 1.0\n")
    (info / "RECORD").write_text("quantize/__init__.py,,\n")
    for name in [name for name in sys.modules if name.split(".")[0] == "quantize"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = dict(doctor.intruders(ROOT))
    assert list(found) == ["quantize"]
    assert found["quantize"].startswith(f"{tmp_path / 'quantize'} (quantizer-tools): uninstall or move it")
    assert f"{tmp_path / 'quantize'} (quantizer-tools)" in shown(diagnosis | {"intruders": found}, capsys, monkeypatch)


def test_a_stray_module_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stray_sibling.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "SIBLINGS", ("stray_sibling", "absent_sibling", "runtimes"))
    found = dict(doctor.intruders(ROOT))
    assert found.pop("stray_sibling").startswith(
        f"{tmp_path / 'stray_sibling.py'} (no distribution): uninstall or move"
    )
    assert found == {"absent_sibling": "not found: install rpfm-edge again"}


def test_missing_extras(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, diagnosis: dict[str, Any]
) -> None:
    info = tmp_path / "rpfm_edge-9.9.dist-info"
    info.mkdir()
    requirements = (
        "numpy>=1.26",
        "no-such-base-library",
        "numpy; extra == 'whole'",
        "pytest>=7 ; extra == 'whole'",
        'no-such.library[speed]>=2,<3; python_version < "4" and extra == "openvino"',
        "numpy; extra == 'openvino'",
        "no-such-library>=1; extra == 'all'",
        "no-such-library; extra == 'all'",
        "tensorrt>=10; extra == 'tensorrt'",
    )
    lines = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rpfm-edge\nVersion: 9.9\n{lines}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        doctor, "find_spec", lambda name: info if name in ("numpy", "pytest", "tensorrt_lean") else None
    )
    found = doctor.missing_extras()
    assert found.pop("all") == {"missing": ["no-such-library"], "fix": "pip install 'rpfm-edge[all]'"}
    assert found == {"openvino": {"missing": ["no-such.library"], "fix": "pip install 'rpfm-edge[openvino]'"}}
    assert "without no-such.library; pip install 'rpfm-edge[openvino]'" in shown(
        diagnosis | {"extras": found}, capsys, monkeypatch
    )


def test_without_an_installed_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-distribution")
    assert doctor.missing_extras() == {}
