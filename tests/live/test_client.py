"""clients/python_client.py, as a program of its own, against the real service and a real bundle."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from rpfm_edge import api
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.live.access import Access
from rpfm_edge.live.clients import Limits
from rpfm_edge.live.messages import pack
from rpfm_edge.live.server import Place, serving
from rpfm_edge.live.service import Service
from rpfm_edge.live.session import Options
from rpfm_edge.measure.metrics import psnr_db
from rpfm_edge.people.formats import write_pose
from rpfm_edge.people.image import load_image

CLIENT = Path(api.__file__).parents[1] / "clients" / "python_client.py"
SOURCE = Path(api.__file__).parent / "assets" / "people" / "test_highres" / "p00900_0.jpg"
TOKEN = "0123456789abcdef"
# fmt: off
STAND = np.array([
    [24, 8], [24, 14], [18, 14], [14, 22], [14, 30], [30, 14], [34, 22], [34, 30], [20, 32],
    [19, 44], [18, 56], [28, 32], [29, 44], [30, 56], [23, 7], [25, 7], [21, 8], [np.nan, np.nan],
], np.float32)  # of 64 × 48
# fmt: on


@pytest.fixture(scope="module")
def pipeline(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    bundle = api.build(tiny_graph.path, tmp_path_factory.mktemp("client") / "bundle", "openvino")
    with Pipeline.open(bundle.path) as opened:
        yield opened


@pytest.fixture(scope="module")
def served(pipeline: Pipeline) -> Iterator[tuple[str, Service]]:
    service = Service([pipeline], load_image(SOURCE), Options(), Limits(quality=100), {})
    with serving(service, Place(port=0, access=Access(TOKEN))) as running:
        yield f"ws://127.0.0.1:{running.port}/ws", service


def client(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CLIENT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def found(ended: subprocess.CompletedProcess[str]) -> tuple[float, float, int]:
    """Frames per second, ms from pose to image, and how often the last image came again."""
    first = r"([\d.]+) frames per second; from pose to image ([\d.]+) ms .*\n"
    match = re.fullmatch(first + r"(?:(\d+) times the last image again, .*\n)?", ended.stdout)
    assert match, (ended.stdout, ended.stderr)
    return float(match[1]), float(match[2]), int(match[3] or 0)


def test_drives_the_service(served: tuple[str, Service], pipeline: Pipeline, tmp_path: Path) -> None:
    address, service = served
    poses, out, before = tmp_path / "pose.json", tmp_path / "frame.png", service.state()["counters"]
    write_pose(poses, STAND, (64, 48))
    ended = client(f"{address}?token={TOKEN}", poses, "--seconds", 2, "--out", out)
    assert ended.returncode == 0, ended.stderr
    rate, age_ms, again = found(ended)
    assert age_ms > 0
    counted = {name: service.state()["counters"][name] - before[name] for name in ("rendered", "reused")}
    assert 0 < 2 * rate <= counted["rendered"] < counted["reused"]  # one pose: most frames are the last image again
    assert 0 < again <= counted["reused"]
    expected = pipeline.render(pipeline.prepare(SOURCE), STAND)
    data = cv2.imencode(".jpg", expected[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 100])[1]
    decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])
    assert psnr_db(load_image(out), decoded) > 50
    assert service.state()["split_ms"]["pose_to_photon"]["p50"] > 0  # the client answered


def test_says_what_the_server_refuses(served: tuple[str, Service], tmp_path: Path) -> None:
    poses = tmp_path / "poses.json"
    poses.write_text(json.dumps([{"keypoints": STAND[:17, :].tolist(), "size": [64, 48]}]))
    ended = client(f"{served[0]}?token={TOKEN}", poses, "--seconds", 0.5)
    assert ended.stdout.count("17 keypoints") == 1
    assert ended.stderr == "no frame came\n"
    assert ended.returncode == 1


def test_takes_over_from_a_recorded_motion(pipeline: Pipeline, tmp_path: Path) -> None:
    motion = ((index / 30, STAND) for index in itertools.count())
    service = Service([pipeline], load_image(SOURCE), Options(), Limits(), {"motion": motion})
    poses = tmp_path / "poses.json"
    moving = [
        {"keypoints": [*(STAND[:17] + np.array([shift, 0])).tolist(), None], "size": [64, 48]} for shift in (-3, 3)
    ]
    poses.write_text(json.dumps(moving))
    with serving(service, Place(port=0)) as running:
        ended = client(f"ws://127.0.0.1:{running.port}/ws", poses, "--seconds", 1)
    assert ended.returncode == 0, ended.stderr
    rate, _, again = found(ended)
    assert rate > 0
    assert again == 0  # it moves with every pose


@pytest.mark.parametrize("token", ["", "?token=wrong"])
def test_a_wrong_token_is_one_sentence(served: tuple[str, Service], tmp_path: Path, token: str) -> None:
    write_pose(tmp_path / "pose.json", STAND, (64, 48))
    ended = client(f"{served[0]}{token}", tmp_path / "pose.json")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"no connection: .*4401.*no token, or a wrong one.*\n", ended.stderr)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, to make a certificate")
def test_a_certificate_of_ones_own(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key, poses = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "pose.json"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", "/CN=rpfm-edge"]
    named = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(["openssl", "req", "-x509", *curve, *named], check=True, capture_output=True)
    write_pose(poses, STAND, (64, 48))
    service = Service([pipeline], load_image(SOURCE), Options(), Limits(), {})
    with serving(service, Place(port=0, cert=cert, key=key)) as running:
        address = f"wss://127.0.0.1:{running.port}/ws"
        ended = client(address, poses)
        assert re.fullmatch(r"self-signed certificate: .*SSL_CERT_FILE=cert\.pem\n", ended.stderr), ended.stderr
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        assert client(address, poses, "--seconds", 1).returncode == 0


def test_unpacks_what_the_server_packs() -> None:
    sys.path.insert(0, str(CLIENT.parent))
    try:
        from python_client import unpack  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(CLIENT.parent))
    image = np.full((16, 8, 3), (10, 200, 90), np.uint8)
    header, found = unpack(pack({"id": 3, "person": 1}, cv2.imencode(".jpg", image)[1].tobytes()))
    assert header == {"id": 3, "person": 1}
    assert found.shape == (16, 8, 3)
    assert np.abs(found.astype(int) - image).max() < 4


def test_stays_small_and_alone() -> None:
    text = CLIENT.read_text()
    assert "import rpfm_edge" not in text
    assert "from rpfm_edge" not in text
    assert len(text.splitlines()) < 120
