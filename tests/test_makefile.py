"""The Makefile asks for a Python that the pinned versions are for, before anything is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def made(folder: Path, minor: int) -> str:
    """What ``make demo`` says in a fresh checkout, by a Python that says it is 3.``minor`` and can do no more."""
    python = folder / "python"
    patch = f"import sys; sys.version_info = (3, {minor}, 0); exec(sys.argv[1])"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -c "{patch}" "$2"\nexit 9\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    ended = subprocess.run(["make", "demo", f"PYTHON={python}"], cwd=folder, capture_output=True, text=True)
    assert ended.returncode != 0
    assert not (folder / ".venv").exists()
    return ended.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_old_python_is_refused_in_one_sentence(tmp_path: Path) -> None:
    message = made(tmp_path, 10)
    assert "is Python 3.10: expected 3.11 or later" in message
    assert "run: make demo PYTHON=python3.11" in message
    assert "expected 3.11" not in made(tmp_path, 11)
