"""jetson-stats: its attributes as boards and versions have them or lack them, and its service beside the files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rpfm_edge.measure import jetson
from tests.jetson_samples import FULL, RELEASE, Board, write, write_orin


@pytest.fixture
def orin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", "")  # where this machine may have an nvpmodel
    return write_orin(tmp_path)


def test_jetson_stats() -> None:
    facts = jetson.from_jtop(Board(**FULL))
    assert facts == {
        "board": "NVIDIA Jetson Orin Nano Developer Kit",
        "module": "NVIDIA Jetson Orin Nano (8GB ram)",
        "compute_capability": "8.7",
        "l4t": "36.4.0",
        "jetpack": "6.1",
        "power_mode": "MAXN_SUPER",
        "clocks_locked": True,
        "temperatures_c": {"cpu": 51.5, "nvme Composite": 40.85},
    }
    assert "1421234567890" not in json.dumps(facts)


@pytest.mark.parametrize("absent", sorted(FULL))
def test_jetson_stats_where_something_is_absent(absent: str) -> None:
    whole = jetson.from_jtop(Board(**FULL))
    for board in (Board(**{k: v for k, v in FULL.items() if k != absent}), Board(**FULL | {absent: None})):
        facts = jetson.from_jtop(board)
        assert facts.keys() == whole.keys()
        assert None in facts.values()
        assert all(value in (None, whole[name]) for name, value in facts.items())
    nameless = FULL["board"] | {"hardware": {"Jetpack": "", "Module": ""}}  # a board that it does not know
    assert jetson.from_jtop(Board(board=nameless)) == dict.fromkeys(whole)


def service(folder: Path, opening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library ``jtop`` whose client does ``opening`` when it connects, and the socket of its service."""
    code = f"class jtop:\n  def __enter__(self):\n    {opening}\n  def __exit__(self, *error):\n    return True\n"
    write(folder, {"run/jtop.sock": "", "site/jtop.py": code})
    write(folder, {"site/jetson_stats-4.3.2.dist-info/METADATA": "Name: jetson-stats\nVersion: 4.3.2\n"})
    monkeypatch.syspath_prepend(str(folder / "site"))
    monkeypatch.delitem(sys.modules, "jtop", raising=False)


def test_the_service_knows_better_than_the_files(orin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for the clocks: jtop calls them locked, too, when it found none to look at."""
    service(orin, "from tests.jetson_samples import FULL, Board; return Board(**FULL)", monkeypatch)
    files = jetson.read(orin)
    assert files is not None
    assert files["read_from"] == "jetson-stats 4.3.2 and files"
    assert (files["power_mode"], files["jetpack"], files["temperatures_c"]["cpu"]) == ("MAXN_SUPER", "6.1", 51.5)
    assert files["clocks_locked"] is False
    assert files["memory_bytes"] == 7802596 * 1024


def test_the_service_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    write(tmp_path, {"etc/nv_tegra_release": RELEASE})
    opening = "from tests.jetson_samples import FULL, Board; return Board(**FULL | {'jetson_clocks': None})"
    service(tmp_path, opening, monkeypatch)
    facts = jetson.read(tmp_path)
    assert facts is not None
    assert (facts["compute_capability"], facts["power_mode"], facts["clocks_locked"]) == ("8.7", "MAXN_SUPER", None)


def test_a_service_that_is_down(orin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service(orin, "raise RuntimeError('The jtop.service is not active')", monkeypatch)
    facts = jetson.read(orin)
    assert facts is not None
    assert (facts["read_from"], facts["power_mode"]) == ("files", "25W")
