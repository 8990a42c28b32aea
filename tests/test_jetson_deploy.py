"""deploy/jetson: what install.sh does and refuses, with programs in place of the system's that note their calls; and
what the images copy. That the packages and images exist is not shown here, nor that they run on a board.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy" / "jetson"
JETPACK_6 = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
JETPACK_7 = "# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic, EABI: aarch64\n"
NOTE = 'printf "%s\\n" "${0##*/} $*" >> "$CALLS"\n'
PROGRAMS = {
    "id": "echo 1000",
    "sudo": NOTE + '"$@"',
    "dpkg-query": 'grep -qx "${!#}" "$INSTALLED" 2>/dev/null && printf installed',
    "apt-get": NOTE
    + '[ "$1" != "${APT_FAILS:-}" ] || exit 100\n'
    + '[ "$1" != install ] || printf "%s\\n" "${@:4}" >> "$INSTALLED"',
    "python3": NOTE
    + '[ "$2" = venv ] || exit 0\n'
    + 'mkdir -p "$4/bin" && cp "$BIN/inside" "$4/bin/python" && cp "$BIN/inside" "$4/bin/rpfm-edge"\n'
    + 'echo "include-system-site-packages = true" > "$4/pyvenv.cfg"',
    "inside": NOTE + '[[ "$*" != *"${INSIDE_FAILS:-nothing}"* ]]',
}


@dataclass
class Device:
    """A folder that stands for a board: its release file, its programs and what was called."""

    folder: Path

    def release(self, text: str) -> Device:
        (self.folder / "release").write_text(text)
        return self

    def install(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        names = {
            "INSTALLED": "installed",
            "CALLS": "calls",
            "NV_TEGRA_RELEASE": "release",
            "HOME": "home",
            "BIN": "bin",
        }
        own = {name: str(self.folder / value) for name, value in names.items()}
        path = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        command = ["bash", str(DEPLOY / "install.sh"), *options]
        return subprocess.run(command, env=own | path | environment, capture_output=True, text=True, cwd=self.folder)

    def calls(self) -> list[str]:
        notes = self.folder / "calls"
        lines = notes.read_text().splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return lines


@pytest.fixture
def device(tmp_path: Path) -> Device:
    for folder in ("bin", "home"):
        (tmp_path / folder).mkdir()
    for name, code in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/usr/bin/env bash\n{code}\n")
        program.chmod(0o755)
    return Device(tmp_path)


def refused(ended: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a run that was refused."""
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("install.sh: ")
    assert line.endswith(".")
    return line


@pytest.mark.parametrize(
    ("release", "bindings"), [(JETPACK_6, "cuda-bindings>=12,<13"), (JETPACK_7, "cuda-bindings>=13,<14")]
)
def test_installs_and_installs_again(device: Device, release: str, bindings: str) -> None:
    venv = device.folder / "home/rpfm-edge-venv"
    ended = device.release(release).install()
    assert ended.returncode == 0, ended.stderr
    packages = "apt-get install --yes --no-install-recommends python3-libnvinfer python3-venv"
    again = [
        f"python -m pip install --upgrade {ROOT}[tensorrt] {bindings}",
        "python -c import tensorrt",
        "python -c import sys, tensorrt; sys.exit(tensorrt.__file__.startswith(sys.prefix))",
        "rpfm-edge doctor",
    ]
    first = ["sudo apt-get update", "apt-get update", f"sudo {packages}", packages]
    assert device.calls() == [*first, f"python3 -m venv --system-site-packages {venv}", *again]
    assert device.install().returncode == 0
    assert device.calls() == again


def test_options(device: Device) -> None:
    ended = device.release(JETPACK_7).install("--venv", "elsewhere", "--from", "some.whl", "--jtop")
    assert ended.returncode == 0, ended.stderr
    calls = device.calls()
    assert "python -m pip install --upgrade some.whl[tensorrt] cuda-bindings>=13,<14" in calls
    assert "sudo python3 -m pip install --upgrade --break-system-packages jetson-stats" in calls
    assert (device.folder / "elsewhere/pyvenv.cfg").exists()
    assert device.release(JETPACK_6).install("--venv", "elsewhere", "--jtop").returncode == 0
    assert "sudo python3 -m pip install --upgrade jetson-stats" in device.calls()


def test_help_asks_for_no_board(device: Device) -> None:
    ended = device.install("--help")
    assert ended.returncode == 0
    assert ended.stdout.startswith("usage: install.sh [--venv DIR] [--from WHAT] [--jtop] [--help]\n")
    assert device.calls() == []


@pytest.mark.parametrize(
    ("release", "options", "message"),
    [
        (None, (), "this is no Jetson"),
        ("# R35 (release), REVISION: 4.1, GCID: 33958178\n", (), "L4T 35.4.1 is not supported"),
        (JETPACK_6, ("--fast",), "unknown option '--fast'"),
        (JETPACK_6, ("--venv",), "--venv has no value"),
    ],
)
def test_refuses_before_it_touches_anything(
    device: Device, release: str | None, options: tuple[str, ...], message: str
) -> None:
    if release:
        device.release(release)
    assert message in refused(device.install(*options))
    assert device.calls() == []


@pytest.mark.parametrize(
    ("variable", "step", "message"),
    [
        ("APT_FAILS", "update", "apt-get update failed"),
        ("APT_FAILS", "install", "apt-get could not install python3-libnvinfer python3-venv"),
        ("INSIDE_FAILS", "pip install", f"pip could not install {ROOT}[tensorrt]"),
        ("INSIDE_FAILS", "import tensorrt", "Python cannot import TensorRT"),
        ("INSIDE_FAILS", "sys.prefix", "pip brought a TensorRT of its own into"),
        ("INSIDE_FAILS", "doctor", "rpfm-edge doctor failed"),
    ],
)
def test_a_step_that_fails(device: Device, variable: str, step: str, message: str) -> None:
    assert message in refused(device.release(JETPACK_6).install(**{variable: step}))


def test_an_environment_of_another_kind_is_left_alone(device: Device) -> None:
    other = device.folder / "mine"
    other.mkdir()
    (other / "pyvenv.cfg").write_text("include-system-site-packages = false\n")
    assert "is no environment that sees the system's packages" in refused(
        device.release(JETPACK_6).install("--venv", str(other))
    )
    assert not [call for call in device.calls() if "pip" in call]


@pytest.mark.parametrize("jetpack", [6, 7])
def test_an_image_gets_what_the_package_is_made_of(jetpack: int) -> None:
    text = (DEPLOY / f"Dockerfile.jetpack{jetpack}").read_text()
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()}
    packaged = re.search(r"^packages = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert packaged
    assert copied == {*re.findall(r'"(\w+)"', packaged.group(1)), "pyproject.toml", "README.md", "LICENSE", "NOTICE"}
    ignored = (DEPLOY / f"Dockerfile.jetpack{jetpack}.dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == copied
