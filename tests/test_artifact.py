"""Artifacts: whole or not there, verified when they are read, the same wherever they lie."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpfm_edge import artifact
from rpfm_edge.artifact import Artifact, Stage
from rpfm_edge.errors import ArtifactError
from rpfm_edge.signature import Signature, TensorSpec

SIGNATURES = {"frame": Signature((TensorSpec("noise", (1, 4), "float32"),), (TensorSpec("image", (2, 2, 3), "uint8"),))}
LINEAGE = (Stage("distill", {"steps": 4}, {"torch": "2.13.0"}, {"teacher": "ab12"}), Stage("export", {"opset": 20}))


def make(out: Path, content: bytes = b"weights", kind: Any = "graph", **config: Any) -> Artifact:
    with artifact.replacing_folder(out) as folder:
        (folder / "weights").mkdir()
        (folder / "weights" / "model.bin").write_bytes(content)
        (folder / "noise.npy").write_bytes(b"noise")
        artifact.seal(folder, kind, {"steps": 4} | config, SIGNATURES, LINEAGE)
    return artifact.load(out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A destination whose parent does not exist yet."""
    return tmp_path / "runs" / "graph"


def test_what_was_written_is_read(out: Path) -> None:
    made = make(out, size=[256, 176])
    assert (made.path, made.kind, made.config) == (out, "graph", {"steps": 4, "size": [256, 176]})
    assert (made.signatures, made.lineage) == (SIGNATURES, LINEAGE)
    assert made.files == {
        "noise.npy": hashlib.sha256(b"noise").hexdigest(),
        "weights/model.bin": hashlib.sha256(b"weights").hexdigest(),
    }
    assert made.file("weights/model.bin").read_bytes() == b"weights"


def test_an_artifact_inside_another_is_listed_with_its_manifest(out: Path) -> None:
    with artifact.replacing_folder(out) as folder:
        (folder / "student").mkdir()
        artifact.seal(folder / "student", "student", {}, {}, ())
        artifact.seal(folder, "graph", {}, {}, ())
    assert list(artifact.load(out).files) == ["student/manifest.json"]
    assert artifact.load(out / "student", "student").kind == "student"


def test_large_files_are_hashed_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * (3 << 12) + b"end"
    (tmp_path / "large").write_bytes(content)
    assert artifact.file_digest(tmp_path / "large") == hashlib.sha256(content).hexdigest()
    with (tmp_path / "large").open("rb") as stream:
        assert artifact._digest(stream) == hashlib.sha256(content).hexdigest()  # as Python 3.10 does it


def test_digest_is_of_the_content_wherever_it_lies(out: Path, tmp_path: Path) -> None:
    made = make(out)
    shutil.copytree(out, tmp_path / "copy")
    assert artifact.load(tmp_path / "copy").digest == made.digest
    assert make(tmp_path / "again").digest == made.digest
    others = [
        make(tmp_path / "content", content=b"Weights"),
        make(tmp_path / "config", size=[1, 2]),
        make(tmp_path / "kind", kind="bundle"),
    ]
    assert len({made.digest, *(other.digest for other in others)}) == 4


def test_a_newer_artifact_replaces_the_old_one_whole(out: Path) -> None:
    make(out)
    (out / "left over").touch()
    assert make(out, content=b"new").file("weights/model.bin").read_bytes() == b"new"
    assert not (out / "left over").exists()
    assert list(out.parent.iterdir()) == [out]


def test_a_failure_leaves_nothing(out: Path) -> None:
    def fail() -> None:
        with artifact.replacing_folder(out) as folder:
            (folder / "half").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("where", ["content", "manifest"])
def test_a_full_disk_leaves_the_old_artifact(out: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, write = make(out), Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if where == "content" or artifact.MANIFEST in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            make(out, content=b"new")
    assert artifact.load(out).digest == old.digest
    assert list(out.parent.iterdir()) == [out]


def test_a_full_disk_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact.write_text(tmp_path / "report.json", "old")

    write = Path.write_bytes

    def half(self: Path, data: bytes) -> None:
        write(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left"):
            artifact.write_text(tmp_path / "report.json", "new and longer")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.json": "old"}


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_while_writing_leaves_no_half(out: Path, existing: bool) -> None:
    old = make(out).digest if existing else None
    code = f"""
import sys, time; sys.path = {sys.path!r}
from pathlib import Path
from rpfm_edge import artifact
with artifact.replacing_folder(Path({str(out)!r})) as folder:
    (folder / "half").write_bytes(b"ha")
    print("writing", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "writing\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    if existing:
        assert artifact.load(out).digest == old
    else:
        assert not out.exists()
    assert make(out, content=b"new").digest != old


def altered(out: Path) -> None:
    (out / "weights" / "model.bin").write_bytes(b"Weights")


def cut(out: Path) -> None:
    (out / "weights" / "model.bin").write_bytes(b"weig")


def lost(out: Path) -> None:
    (out / "noise.npy").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (altered, r"weights/model\.bin was altered or cut short: expected sha256 [0-9a-f]{12}…; copy or make it again"),
        (cut, r"weights/model\.bin was altered or cut short"),
        (lost, r"noise\.npy is missing: expected every file of the manifest"),
    ],
)
def test_damaged_files(out: Path, damage: Callable[[Path], None], message: str) -> None:
    digest = make(out).digest
    damage(out)
    with pytest.raises(ArtifactError, match=message):
        artifact.load(out)
    assert artifact.load(out, verify=False).digest == digest


def test_wrong_kind(out: Path) -> None:
    make(out)
    assert artifact.load(out, "student", "graph").kind == "graph"
    with pytest.raises(ArtifactError, match="graph is a graph: expected a teacher or student; give the right artifact"):
        artifact.load(out, "teacher", "student")


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_no_artifact(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=rf"{name} is no artifact: expected a folder with a manifest\.json"):
        artifact.load(tmp_path / name)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "{}", '"format"', "\ud800"])
def test_a_manifest_that_is_none(out: Path, text: str) -> None:
    make(out)
    (out / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ArtifactError, match=r"manifest\.json cannot be read \(.+\): expected a manifest"):
        artifact.load(out)


def test_a_manifest_of_another_format_or_incomplete(out: Path) -> None:
    make(out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ArtifactError, match="has format 99: expected a complete manifest of format 1"):
        artifact.load(out)
    (out / "manifest.json").write_text(json.dumps({key: manifest[key] for key in manifest if key != "files"}))
    with pytest.raises(ArtifactError, match=r"has format 1, without \['files'\]: expected a complete manifest"):
        artifact.load(out)


def test_a_file_that_the_manifest_does_not_list(out: Path) -> None:
    made = make(out)
    (out / "stray").touch()
    with pytest.raises(ArtifactError, match=r"has no stray: expected one of \['noise\.npy', 'weights/model\.bin'\]"):
        made.file("stray")
    artifact.load(out)


def test_tool_versions() -> None:
    from importlib.metadata import version

    found = artifact.tool_versions("numpy", "no-such-distribution")
    assert found["numpy"] == version("numpy")
    assert set(found) <= {"numpy", "rpfm-edge"}


def test_what_a_killed_exchange_put_aside_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with artifact.replacing_folder(out) as folder:
        (folder / "a").write_text("old")
    out.rename(tmp_path / ".out.k1ll3d.old")  # as a kill between the two renames leaves it
    with pytest.raises(RuntimeError), artifact.replacing_folder(out) as folder:
        raise RuntimeError
    assert (out / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
