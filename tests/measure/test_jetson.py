"""What a Jetson says about itself, and the advice on it; and both in the doctor and beside measurements."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import runtimes
from rpfm_edge import doctor
from rpfm_edge.core import precisions
from rpfm_edge.measure import jetson, machine
from tests.jetson_samples import MEMORY, RELEASE, cores, write, write_orin, write_thor


@pytest.fixture
def orin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", "")  # where this machine may have an nvpmodel
    return write_orin(tmp_path)


@pytest.fixture
def thor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", "")  # where this machine may have an nvpmodel
    return write_thor(tmp_path)


def problems(facts: dict[str, Any], precision: str | None = None) -> list[str]:
    return [hint["problem"] for hint in jetson.advice(facts | {"tensorrt_in_python": True}, precision)]


def test_elsewhere_there_is_nothing(tmp_path: Path) -> None:
    assert jetson.read(tmp_path) is None
    assert (
        jetson.read(write(tmp_path, {"proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0"})) is None
    )


def test_an_orin_nano(orin: Path) -> None:
    facts = jetson.read(orin)
    assert facts is not None
    assert facts.pop("tensorrt_in_python") in (True, False)
    assert json.loads(json.dumps(facts)) == {
        "board": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "module": None,
        "family": "Orin",
        "compute_capability": "8.7",
        "l4t": "36.4.3",
        "jetpack": "6.2",
        "tensorrt": "10.3.0.30-1+cuda12.5",
        "power_mode": "25W",
        "power_modes": {"15W": 0, "25W": 1, "MAXN_SUPER": 2, "7W": 3},
        "clocks_locked": False,
        "gpu_hz": {"min": 306000000, "max": 918000000, "now": 306000000},
        "temperatures_c": {"cpu": 49.468, "gpu": 50.125, "soc0": 50.031, "tj": 50.531},
        "throttled": [],
        "over_current": {"oc1": 0, "oc2": 0, "oc3": 0},
        "memory_bytes": 7802596 * 1024,
        "memory_free_bytes": 3250585 * 1024,
        "read_from": "files",
    }


def test_a_hot_thor(thor: Path) -> None:
    facts = jetson.read(thor)
    assert facts is not None
    known = ("family", "compute_capability", "l4t", "jetpack", "power_mode", "clocks_locked", "throttled")
    assert [facts[name] for name in known] == [
        *("Thor", "11.0", "38.2.2", "7.0", "MAXN", True),
        ["gpu-throttle-alert", "devfreq-gpu-gpc-0"],
    ]
    assert (facts["tensorrt"], facts["over_current"], facts["board"]) == (None, None, None)
    assert problems(facts, "fp8") == ["the board throttles at 109 °C: gpu-throttle-alert, devfreq-gpu-gpc-0"]


def test_a_bare_container_knows_little_and_says_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    facts = jetson.read(write(tmp_path, {"etc/nv_tegra_release": RELEASE}))
    assert facts is not None
    assert {name: value for name, value in facts.items() if value} == {
        **{"l4t": "36.4.3", "jetpack": "6.2", "read_from": "files"},
        **({"tensorrt_in_python": True} if facts["tensorrt_in_python"] else {}),
    }
    assert problems(facts, "fp8") == []


def test_advice_for_an_orin_nano(orin: Path) -> None:
    facts = jetson.read(orin)
    assert facts is not None
    hints = jetson.advice(facts | {"tensorrt_in_python": False, "over_current": {"oc1": 0, "oc3": 37}}, "fp8")
    assert [(hint["problem"], hint["fix"]) for hint in hints] == [
        ("power mode 25W is below MAXN_SUPER", "run: sudo nvpmodel -m 2"),
        ("the clocks follow the load (jetson_clocks is off), so times vary", "run: sudo jetson_clocks"),
        (
            "3.1 of 7.4 GiB are free: TensorRT's builder may run out of memory",
            "before building, stop the desktop (sudo systemctl isolate multi-user.target) and other programs, or give "
            "--option tensorrt.workspace_mib=1024",
        ),
        (
            "over-current events since boot (oc3 37), each of which held the clocks down for a moment",
            "if they go on, use a supply of more current or a lower power mode",
        ),
        (
            "Python does not see JetPack's TensorRT 10.3.0.30-1+cuda12.5",
            "run deploy/jetson/install.sh: the bindings are of apt (python3-libnvinfer), not of pip",
        ),
        ("FP8 was asked for, and Orin (compute capability 8.7) does not compute in it", "use int8 or fp16"),
    ]


def test_a_board_that_is_set_up_gets_no_advice(orin: Path) -> None:
    write(orin, {"var/lib/nvpmodel/status": "pmode:0002", **cores(6, 1728000, 1728000)})
    write(orin, {"sys/class/devfreq/17000000.gpu/min_freq": 918000000})
    write(orin, {"proc/meminfo": MEMORY.replace("3250585", "5250585")})
    facts = jetson.read(orin)
    assert facts is not None
    assert problems(facts, "int8") == []
    assert problems(facts, "fp16") == []


def test_a_power_mode_that_is_below_what_nobody_lists(orin: Path) -> None:
    facts = jetson.read(orin)
    assert facts is not None
    alone = facts | {"clocks_locked": None, "memory_bytes": None, "power_modes": None}
    (hint,) = jetson.advice(alone | {"power_mode": "30W", "tensorrt_in_python": True})
    assert hint["problem"] == "power mode 30W is below MAXN"
    assert "nvpmodel -p --verbose" in hint["fix"]
    assert problems(alone | {"power_mode": "MAXN"}) == problems(alone | {"power_mode": None}) == []


def test_without_tensorrt_at_all(orin: Path) -> None:
    facts = jetson.read(orin)
    assert facts is not None
    hints = jetson.advice(facts | {"tensorrt": None, "tensorrt_in_python": False})
    assert "JetPack's TensorRT is not installed" in [hint["problem"] for hint in hints]


@pytest.mark.parametrize(
    ("capability", "precision", "supported"),
    [("8.7", "fp8", False), ("8.7", "int8", True), ("11.0", "fp8", True), ("7.2", "nvfp4", False), (None, "fp8", None)],
)
def test_precisions_of_a_gpu(capability: str | None, precision: str, supported: bool | None) -> None:
    assert precisions.supports({"compute_capability": capability}, precision) is supported


@pytest.mark.parametrize(
    ("text", "release"),
    [
        (RELEASE, "36.4.3"),
        ("# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic, EABI: aarch64", "39.2.1"),
        ("# R32 (release), REVISION: 7.2, GCID: 30192233, BOARD: t186ref, EABI: aarch64", "32.7.2"),
        ("", None),
        ("# something else", None),
    ],
)
def test_releases(text: str, release: str | None) -> None:
    assert jetson.parse_release(text) == release


@pytest.mark.parametrize(
    ("revision", "package", "jetpack"),
    [
        ("# R39 (release), REVISION: 2.1", "7.2.1-b49", "7.2.1"),
        ("# R36 (release), REVISION: 4.7", None, "6.2.1"),
        ("# R39 (release), REVISION: 9.9", None, "7"),
        ("# R99 (release), REVISION: 1.0", None, None),
    ],
)
def test_jetpack_by_package_or_release(
    revision: str, package: str | None, jetpack: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    stanza = f"Package: nvidia-jetpack\nStatus: install ok installed\nVersion: {package}\n" if package else ""
    facts = jetson.read(write(tmp_path, {"etc/nv_tegra_release": revision, "var/lib/dpkg/status": stanza}))
    assert facts is not None
    assert facts["jetpack"] == jetpack


def test_the_best_power_mode() -> None:
    assert jetson.best_power_mode({"MAXN": 0, "MODE_15W": 1, "MODE_30W": 2, "MODE_50W": 3}) == "MAXN"
    assert jetson.best_power_mode({"10W": 1, "MAXN_SUPER": 0, "40W": 4}) == "MAXN_SUPER"
    assert jetson.best_power_mode({"7W": 1, "15W": 0}) == "15W"
    assert jetson.best_power_mode({}) is None


def test_the_power_mode_by_command(orin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``nvpmodel -q`` printed on an AGX Thor, preceded by a warning that it gives on some boards."""
    (orin / "var/lib/nvpmodel/status").unlink()
    program = write(orin, {"bin/nvpmodel": "#!/bin/sh\necho 'NVPM WARN: fan mode is not set!'\n"}) / "bin/nvpmodel"
    with program.open("a") as file:
        file.write('[ "$1" = -q ] && printf "NV Power Mode: 120W\\n1\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{orin / 'bin'}:/bin:/usr/bin")
    facts = jetson.read(orin)
    assert facts is not None
    assert facts["power_mode"] == "120W"
    program.write_text("#!/bin/sh\nexit 1\n")
    assert (jetson.read(orin) or {})["power_mode"] is None
    program.write_text("no program at all")
    assert (jetson.read(orin) or {})["power_mode"] is None


def test_a_sensor_that_sleeps(orin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is switched off answers EAGAIN, as an empty pipe does, for which Python reads None."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    original = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.match("thermal_zone1/temp"):
            with open(reading, "rb", closefd=False) as pipe:
                return pipe.read()
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    try:
        assert jetson.temperatures(orin / "sys/class/thermal").keys() == {"cpu", "soc0", "tj"}
    finally:
        os.close(reading)
        os.close(writing)


def test_the_clocks_of_cores_that_are_off_do_not_count(thor: Path) -> None:
    gpu, cpus = {"min": 5, "max": 5}, thor / "sys/devices/system/cpu"
    write(thor, {"sys/devices/system/cpu/cpu3/cpufreq/scaling_min_freq": 1})
    assert jetson.clocks_locked(gpu, cpus) is False
    write(thor, {"sys/devices/system/cpu/cpu3/online": "0\n"})
    assert jetson.clocks_locked(gpu, cpus) is True
    assert jetson.clocks_locked({"min": 4, "max": 5}, cpus) is False
    assert jetson.clocks_locked(None, thor / "nowhere") is None


def test_the_machine_of_a_measurement(orin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "jetson" not in machine.where()
    facts = jetson.read(orin)
    monkeypatch.setattr(jetson, "read", lambda: facts)
    assert machine.where()["jetson"] == facts


def test_the_doctor_on_a_board(orin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    facts = jetson.read(orin)
    monkeypatch.setattr(jetson, "read", lambda: facts)
    monkeypatch.setattr(runtimes, "available", dict)  # which would import every library
    monkeypatch.setenv("COLUMNS", "1000")
    diagnosis = doctor.doctor("fp8")
    assert json.loads(json.dumps(diagnosis)) == diagnosis
    doctor.render(diagnosis)
    text = capsys.readouterr().out
    for words in (
        "JetPack 6.2, L4T 36.4.3, TensorRT 10.3.0.30-1+cuda12.5, compute capability 8.7, no FP8",
        "mode 25W, clocks following the load, GPU min 306 MHz, GPU max 918 MHz",
        "cpu 49.5, gpu 50.1",
        "3.1 GiB",
        "power mode 25W is below MAXN_SUPER: run: sudo nvpmodel -m 2",
        "FP8 was asked for",
    ):
        assert words in text


def test_the_doctor_on_a_board_that_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    facts = jetson.read(write(tmp_path, {"etc/nv_tegra_release": RELEASE}))
    monkeypatch.setattr(jetson, "read", lambda: facts)
    monkeypatch.setattr(runtimes, "available", dict)  # which would import every library
    monkeypatch.setenv("COLUMNS", "1000")
    doctor.render(doctor.doctor())
    text = capsys.readouterr().out
    assert "unknown module, JetPack 6.2, L4T 36.4.3" in text
    assert "mode unknown, clocks unknown" in text
