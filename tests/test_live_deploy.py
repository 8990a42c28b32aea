"""deploy/jetson's unit and compose file for the live service: their commands parse, and what they name fits together.

That they run on a board is not shown here.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import typer

from rpfm_edge import api
from rpfm_edge.cli import app
from rpfm_edge.core.artifact import Artifact

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy" / "jetson"
SOURCE = Path(api.__file__).parent / "assets" / "people" / "test_highres" / "p00900_0.jpg"
UNIT = DEPLOY / "rpfm-edge-live.service"
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}|\$(\w+)")


def unit() -> list[tuple[str, str]]:
    """The settings of the unit, in order; continued lines joined."""
    lines = UNIT.read_text().replace("\\\n", "").splitlines()
    return [(name, value) for name, _, value in (line.partition("=") for line in lines if line[:1] not in "#[")]


def settings(name: str) -> list[str]:
    return [value for key, value in unit() if key == name]


def filled(text: str, values: dict[str, str]) -> str:
    """``text`` with its variables replaced, as systemd and compose do: a value, or a default after ``:-``."""

    def value(match: re.Match[str]) -> str:
        name, kind, default = match[1] or match[4], match[2], match[3]
        assert name in values or kind == "-", f"{name} has no value"
        return values.get(name, default)

    return VARIABLE.sub(value, text)


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The options that ``rpfm-edge`` reads from a command line; fails if it cannot be parsed."""
    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]
    context = command.make_context(arguments[0], arguments[1:])
    return dict(context.params)


def environment() -> dict[str, str]:
    pairs = [pair.partition("=") for line in settings("Environment") for pair in line.split()]
    return {name: value for name, _, value in pairs}


def test_the_units_command_parses() -> None:
    values = {**environment(), "CREDENTIALS_DIRECTORY": "/run/credentials", "OPTIONS": "--deadline-ms 40 --smooth 2"}
    (line,) = settings("ExecStart")
    program, *arguments = shlex.split(filled(line, values))
    assert program == "/opt/rpfm-edge/bin/rpfm-edge"
    found = parsed(arguments)
    assert list(found["bundle"]) == ["/srv/rpfm-edge/bundle"]
    assert (found["host"], found["port"], found["backend"]) == ("0.0.0.0", 8787, "tensorrt")
    assert (found["deadline_ms"], found["smooth"]) == (40, 2)
    assert parsed(shlex.split(filled(line, values | {"OPTIONS": ""}))[1:])["deadline_ms"] is None


def test_the_unit_hands_over_what_its_command_reads() -> None:
    (line,) = settings("ExecStart")
    given = {value.partition(":")[0] for value in settings("LoadCredential")}
    assert given == set(re.findall(r"\$\{CREDENTIALS_DIRECTORY\}/(\S+)", line)) == {"token", "cert.pem", "key.pem"}
    assert f"--report /var/lib/{settings('StateDirectory')[0]} " in line
    assert environment()["RPFM_EDGE_CACHE"] == f"/var/cache/{settings('CacheDirectory')[0]}"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/rpfm-edge/bin/rpfm-edge", "/usr/bin/env"))
    ended = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert UNIT.name not in ended.stderr


@pytest.mark.slow
def test_the_units_command_serves(tiny_graph: Artifact, tmp_path: Path) -> None:
    """With OpenVINO on a free port of this machine; by TLS, ended by the unit's signal."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make a certificate")
    bundle = api.build(tiny_graph.path, tmp_path / "bundle", "openvino").path
    pem = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", "/CN=test"]
    subprocess.run(["openssl", "req", "-x509", *curve, *pem], check=True, capture_output=True)
    (tmp_path / "token").write_text("0123456789abcdef\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    values = {"BUNDLE": str(bundle), "SOURCE": str(SOURCE), "PORT": port, "OPTIONS": "--smooth 2"}
    line = filled(settings("ExecStart")[0], values | {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    moved = {"tensorrt": "openvino", "0.0.0.0": "127.0.0.1", "/var/lib/rpfm-edge": str(tmp_path / "report")}
    command = [sys.executable, "-c", "from rpfm_edge.__main__ import main; main()"]
    command += [moved.get(word, word) for word in shlex.split(line)[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            state = asked(f"https://127.0.0.1:{port}/api/state", process)
            process.send_signal(getattr(signal, settings("KillSignal")[0]))
            output = process.communicate(timeout=15)[0]
        finally:
            process.kill()
    assert (state["backend"], state["size"]) == ("openvino", [64, 48])
    assert process.returncode == 0, output
    assert "0123456789abcdef" not in output
    assert json.loads((tmp_path / "report" / "live.json").read_text())["backend"] == "openvino"


def asked(address: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """The answer to a request with the token, as soon as there is one."""
    request = Request(address, headers={"Authorization": "Bearer 0123456789abcdef"})
    trusting = ssl._create_unverified_context()  # the certificate is signed by nobody
    end = time.monotonic() + 60
    while True:
        try:
            answer: dict[str, Any] = json.load(urlopen(request, context=trusting))
            return answer
        except URLError:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.1)


def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


def test_the_containers_command_parses_and_finds_its_files() -> None:
    project = compose()
    service = project["services"]["live"]
    found = parsed([filled(word, {}) for word in service["command"]])
    assert (found["host"], found["port"], found["backend"]) == ("0.0.0.0", 8787, "tensorrt")
    targets = [filled(volume, {"BUNDLE": "b", "SOURCE": "s"}).split(":")[1] for volume in service["volumes"]]
    targets += [f"/run/secrets/{name}" for name in service["secrets"]]
    used = [*found["bundle"], *(str(found[name]) for name in ("source", "token_file", "cert", "key", "report"))]
    assert sorted([*used, service["environment"]["RPFM_EDGE_CACHE"]]) == sorted(targets)
    assert set(service["secrets"]) == set(project["secrets"])
    named = [volume.split(":")[0] for volume in service["volumes"] if not volume.startswith("$")]
    assert set(named) == set(project["volumes"])


@pytest.mark.parametrize("jetpack", ["6", "7"])
def test_the_image_is_made_with_the_live_extra(jetpack: str) -> None:
    build = compose()["services"]["live"]["build"]
    dockerfile = DEPLOY / build["context"] / filled(build["dockerfile"], {"JETPACK": jetpack})
    text = dockerfile.read_text()
    assert "ARG EXTRAS=tensorrt\n" in text
    assert '"/src[${EXTRAS}]"' in text
    pyproject = (ROOT / "pyproject.toml").read_text()
    for extra in build["args"]["EXTRAS"].split(","):
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), f"no extra {extra}"
