"""The doctor: what it reports about this machine, and what it says when something is wrong."""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import rpfm_edge
import runtimes
from rpfm_edge import doctor

ROOT = Path(rpfm_edge.__file__).parent.parent


def shown(diagnosis: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "1000")
    doctor.render(diagnosis)
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def diagnosis() -> dict[str, Any]:
    return doctor.diagnose()


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
    assert diagnosis["backends"] == runtimes.available()
    assert bool(diagnosis["openvino_devices"]) == (diagnosis["backends"]["openvino"] is None)


def test_is_quick(diagnosis: dict[str, Any]) -> None:
    start = time.process_time()
    doctor.diagnose()
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
    monkeypatch.setitem(runtimes.BACKENDS, "openvino", ("runtimes.ov", "no_such_library", "openvino"))
    found = doctor.diagnose()
    assert found["openvino_devices"] == {}
    assert "pip install 'rpfm-edge[openvino]'" in shown(found, capsys, monkeypatch)


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
    )
    lines = "".join(f"Requires-Dist: {requirement}\n" for requirement in requirements)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: rpfm-edge\nVersion: 9.9\n{lines}")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = doctor.missing_extras()
    assert found == {"openvino": {"missing": ["no-such.library"], "fix": "pip install 'rpfm-edge[openvino]'"}}
    assert "without no-such.library; pip install 'rpfm-edge[openvino]'" in shown(
        diagnosis | {"extras": found}, capsys, monkeypatch
    )


def test_without_an_installed_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-distribution")
    assert doctor.missing_extras() == {}
