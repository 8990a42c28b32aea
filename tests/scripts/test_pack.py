"""Packing: what comes out is what went in, no piece is too large, and damage is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scripts import pack

PIECE_MB = 0.1
Call = Callable[..., str]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the script with arguments; returns what it printed, after a look at its exit code."""

    def run(*arguments: object, code: int = 0) -> str:
        assert pack.main([str(argument) for argument in arguments]) == code
        return "".join(capsys.readouterr())

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files of many sizes, one of them of three pieces, with an empty one and a name that no tar header holds."""
    root, rng = tmp_path / "data", np.random.default_rng(0)
    sizes = {f"train/p{n:03d}.jpg": 600 * n for n in range(40)} | {"big.safetensors": 250_001}
    sizes |= {"lists/pairs.csv": 511, f"deep/{'ö' * 100}/{'x' * 150}.txt": 1300}
    for name, size in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(rng.bytes(size))
    return root


@pytest.fixture
def packed(call: Call, data: Path, tmp_path: Path) -> Path:
    call("pack", data, tmp_path / "packed", "--piece-mb", PIECE_MB)
    return tmp_path / "packed"


def pieces(packed: Path) -> list[Path]:
    return sorted(packed.glob("part-*.tar"))


def test_everything_comes_back(call: Call, data: Path, packed: Path, tmp_path: Path) -> None:
    assert "complete" in call("unpack", packed, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(data)
    assert not (tmp_path / "back.pieces.json").exists()


def test_pieces_keep_the_limit_and_fill_it(data: Path, packed: Path) -> None:
    sizes = [piece.stat().st_size for piece in pieces(packed)]
    assert max(sizes) <= PIECE_MB * 1e6
    total = sum(len(content) for content in contents(data).values())
    assert total / len(sizes) > 0.75 * PIECE_MB * 1e6


def test_every_piece_is_a_tar_of_whole_files(data: Path, packed: Path) -> None:
    whole = {}
    for piece in pieces(packed):
        with tarfile.open(piece) as tar:
            for member in tar.getmembers():
                stream = tar.extractfile(member)
                assert stream is not None
                whole[member.name] = stream.read()
    cut = [name for name in whole if name.startswith("big.safetensors.from-")]
    assert b"".join(whole.pop(name) for name in sorted(cut)) == (data / "big.safetensors").read_bytes()
    assert whole == {name: content for name, content in contents(data).items() if name != "big.safetensors"}


def test_the_same_data_gives_the_same_pieces(call: Call, data: Path, packed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy", copy_function=shutil.copyfile)
    call("pack", copy, tmp_path / "again", "--piece-mb", PIECE_MB)
    assert contents(tmp_path / "again") == contents(packed)


def test_pieces_arrive_one_by_one_in_any_order(call: Call, data: Path, packed: Path, tmp_path: Path) -> None:
    names = [piece.name for piece in pieces(packed)]
    for number, name in enumerate(reversed(names)):
        arrived = tmp_path / f"arrived-{number}"
        arrived.mkdir()
        for file in (name, "manifest.json"):
            shutil.copy(packed / file, arrived / file)
        last = number == len(names) - 1
        said = call("unpack", arrived, tmp_path / "back", code=0 if last else 1)
        assert [n for n in names if n in said] == names[: len(names) - 1 - number]
    assert contents(tmp_path / "back") == contents(data)


def test_one_large_file(call: Call, data: Path, tmp_path: Path) -> None:
    call("pack", data / "big.safetensors", tmp_path / "packed", "--piece-mb", PIECE_MB)
    assert len(pieces(tmp_path / "packed")) == 3
    call("unpack", tmp_path / "packed", tmp_path / "back")
    assert (tmp_path / "back" / "big.safetensors").read_bytes() == (data / "big.safetensors").read_bytes()


def test_a_damaged_piece_is_refused_and_a_new_copy_taken(call: Call, data: Path, packed: Path, tmp_path: Path) -> None:
    piece = pieces(packed)[1]
    sound = piece.read_bytes()
    piece.write_bytes(sound[:700] + bytes([sound[700] ^ 1]) + sound[701:])
    said = call("unpack", packed, tmp_path / "back", code=2)
    assert said.startswith(f"pack: {piece} is damaged: expected sha256 ")
    assert said.endswith("; copy it again.\n")
    piece.write_bytes(sound)
    call("unpack", packed, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(data)


def test_a_file_that_changed_between_pieces_is_found(call: Call, packed: Path, tmp_path: Path) -> None:
    last = pieces(packed)[-1]
    aside = last.rename(tmp_path / last.name)
    call("unpack", packed, tmp_path / "back", code=1)
    (tmp_path / "back" / "train" / "p001.jpg").write_bytes(b"other")
    aside.rename(last)
    said = call("unpack", packed, tmp_path / "back", code=2)
    assert "p001.jpg is not what was packed" in said
    assert "delete it and back.pieces.json" in said


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "there is no"),
        ("{", "cannot be read"),
        ('{"format": 2, "pieces": {"a": {"members": {}}}, "files": {}}', "is no manifest"),
        ('{"format": 1, "pieces": {"a": {"members": {"x": ["../x", 0]}}}, "files": {}}', "is no manifest"),
    ],
)
def test_a_wrong_manifest(call: Call, tmp_path: Path, content: str | None, problem: str) -> None:
    if content:
        (tmp_path / "manifest.json").write_text(content)
    said = call("unpack", tmp_path, tmp_path / "back", code=2)
    assert problem in said
    assert str(tmp_path / "manifest.json") in said
    assert not (tmp_path / "back").exists()


def test_what_cannot_be_packed(call: Call, data: Path, packed: Path, tmp_path: Path) -> None:
    assert f"there are no files in {tmp_path / 'absent'}" in call("pack", tmp_path / "absent", tmp_path / "o", code=2)
    assert f"{packed} is not empty" in call("pack", data, packed, code=2)
    for size in (0.01, "nan", "inf"):
        assert f"pieces of {size} MB" in call("pack", data, tmp_path / "out", "--piece-mb", size, code=2)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train").symlink_to(data, target_is_directory=True)
    assert "train is a link to a folder" in call("pack", tmp_path / "linked", tmp_path / "out", code=2)


def test_it_needs_nothing_that_is_not_python(packed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", str(Path(pack.__file__)), "unpack", str(packed), str(tmp_path / "back")]
    assert "complete" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
