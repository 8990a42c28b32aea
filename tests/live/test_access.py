"""TODO."""

from __future__ import annotations

import http.client
import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from rpfm_edge.core.errors import BackendError, ConfigError
from rpfm_edge.live import access
from rpfm_edge.live.access import Access, address, check_certificate, choose_token, is_loopback, qr_code
from tests.live.driver import driver


@pytest.mark.parametrize(
    ("host", "alone"),
    [
        *((host, True) for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1")),
        *((host, False) for host in ("0.0.0.0", "::", "192.168.1.4", "example.org")),
    ],
)
def test_only_loopback_goes_without_a_token(host: str, alone: bool) -> None:
    assert is_loopback(host) == alone
    assert (choose_token(host, None) is None) == alone


def test_tokens_are_new_each_time_and_long() -> None:
    tokens = {choose_token("0.0.0.0", None) for _ in range(20)}
    assert len(tokens) == 20
    assert all(token and len(token) >= 43 for token in tokens)


def test_a_token_file_is_read_even_on_loopback(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    assert choose_token("127.0.0.1", file) == "0123456789abcdef"
    for bad in ("short", "0123456789abcdeé", ""):
        file.write_text(bad)
        with pytest.raises(ConfigError, match="the token in"):
            choose_token("127.0.0.1", file)
    with pytest.raises(ConfigError, match="cannot be read"):
        choose_token("127.0.0.1", tmp_path / "none")


def test_odd_tokens_do_not_fit_and_do_not_fail() -> None:
    rules = Access("0123456789abcdef")
    for odd in (None, 5, "", "é", "\ud800", "0123456789abcde"):
        assert not rules.fits(odd)
    assert rules.fits("0123456789abcdef")
    assert not rules.redeem("é")
    assert not rules.known({}, {}, {})


@pytest.mark.parametrize(
    ("token", "headers", "allowed"),
    [
        (None, {"host": "localhost:1"}, True),
        (None, {"host": "[::1]:1", "origin": "http://[::1]:1"}, True),
        (None, {"host": "["}, False),
        (None, {}, False),
        (None, {"host": "localhost:1", "origin": "null"}, False),
        (None, {"host": "localhost:1", "origin": "http://["}, False),
        (None, {"host": "localhost:1", "origin": "http://localhost:2"}, False),
        ("t" * 16, {"host": "edge.local:1"}, True),
        ("t" * 16, {"origin": ""}, False),
    ],
)
def test_origins(token: str | None, headers: dict[str, str], allowed: bool) -> None:
    assert Access(token).origin_allowed(headers) == allowed


def test_one_of_certificate_and_key_is_not_enough(tmp_path: Path) -> None:
    check_certificate(None, None)
    with pytest.raises(ConfigError, match="--cert and --key"):
        check_certificate(tmp_path / "cert.pem", None)
    with pytest.raises(ConfigError, match="cannot be used"):
        check_certificate(tmp_path / "cert.pem", tmp_path / "key.pem")
    (tmp_path / "cert.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="cannot be used"):
        check_certificate(tmp_path / "cert.pem", tmp_path / "cert.pem")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, to make a certificate")
def test_frames_and_a_cookie_for_tls_alone_come_over_tls(
    start: Callable[..., Any], poses: np.ndarray, tmp_path: Path
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    name = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    made = (
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-out",
        cert,
        "-keyout",
        key,
        *name,
    )
    subprocess.run(made, check=True, capture_output=True)
    check_certificate(cert, key)
    token = "0123456789abcdef"
    _, port = start(access=Access(token), cert=cert, key=key)
    trust = ssl.create_default_context(cafile=str(cert))
    page = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=trust)
    page.request("GET", f"/?token={token}")
    assert "; secure" in (page.getresponse().getheader("set-cookie") or "").lower()
    page.close()
    with driver(port, f"?token={token}", "wss", ssl=trust) as client:
        client.pose(poses[0])
        assert client.frame()[0]["id"] == 0


def test_addresses_that_others_can_use() -> None:
    assert address("127.0.0.1", 80, False) == "http://127.0.0.1:80"
    assert address("::1", 80, True) == "https://[::1]:80"
    assert "0.0.0.0" not in address("0.0.0.0", 80, False)


def test_the_code_on_the_terminal_can_be_read_by_a_camera() -> None:
    text = "http://192.168.1.20:8787/?pair=abc-DEF_123"
    halves = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}
    rows = [line for line in qr_code(text).splitlines() if line]
    width = max(map(len, rows))
    cells = np.array([[halves[c.replace("\xa0", " ")] for c in row.ljust(width)] for row in rows])  # light is set
    light = cells.transpose(0, 2, 1).reshape(-1, width)
    picture = np.kron(np.pad(light, 2, constant_values=1), np.full((8, 8), 255)).astype(np.uint8)
    assert cv2.QRCodeDetector().detectAndDecode(picture)[0] == text


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "qrcode", None)
    with pytest.raises(BackendError, match="rpfm-edge\\[live\\]"):
        access.qr_code("x")
