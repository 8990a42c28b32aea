"""Artifacts: whole or not there, verified when they are read, the same wherever they lie."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from rpfm_edge.core import artifact, files
from rpfm_edge.core.artifact import Artifact, Stage
from rpfm_edge.core.errors import ArtifactError, ConfigError
from rpfm_edge.core.signature import Signature, TensorSpec

SIGNATURES = {"frame": Signature((TensorSpec("noise", (1, 4), "float32"),), (TensorSpec("image", (2, 2, 3), "uint8"),))}
LINEAGE = (Stage("distill", {"steps": 4}, {"torch": "2.13.0"}, {"teacher": "ab12"}), Stage("export", {"opset": 20}))


def make(out: Path, content: bytes = b"weights", kind: Any = "graph", **config: Any) -> Artifact:
    with artifact.replacing_folder(out, kind) as folder:
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
    with artifact.replacing_folder(out, "graph") as folder:
        (folder / "student").mkdir()
        artifact.seal(folder / "student", "student", {}, {}, ())
        artifact.seal(folder, "graph", {}, {}, ())
    assert list(artifact.load(out).files) == ["student/manifest.json"]
    assert artifact.load(out / "student", "student").kind == "student"


def test_large_files_are_hashed_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * (3 << 12) + b"end"
    (tmp_path / "large").write_bytes(content)
    assert files.file_digest(tmp_path / "large") == hashlib.sha256(content).hexdigest()
    with (tmp_path / "large").open("rb") as stream:
        assert files._digest(stream) == hashlib.sha256(content).hexdigest()  # as Python 3.10 does it


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
        with artifact.replacing_folder(out, "graph") as folder:
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
    files.write_text(tmp_path / "report.json", "old")

    write = Path.write_bytes

    def half(self: Path, data: bytes) -> None:
        write(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match="No space left") as caught:
            files.write_text(tmp_path / "report.json", "new and longer")
    assert caught.value.filename == str(tmp_path / "report.json")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.json": "old"}


def test_two_write_a_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same process number, as containers that share a folder may have."""
    file, write = tmp_path / "report.json", Path.write_bytes

    def interleaved(self: Path, data: bytes) -> int:
        monkeypatch.setattr(Path, "write_bytes", write)
        written = write(self, data)
        files.write_text(file, "the other's, which is longer")
        return written

    monkeypatch.setattr(Path, "write_bytes", interleaved)
    files.write_text(file, "mine")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"report.json": "mine"}


WRITER = """
import sys, time; sys.path = {path!r}
from pathlib import Path
from rpfm_edge.core import artifact
with artifact.replacing_folder(Path({out!r}), "graph") as folder:
    (folder / "half").write_bytes(b"ha")
    print(folder, flush=True)
    sys.stdin.read()
    artifact.seal(folder, "graph", {{}}, {{}}, ())
"""


@contextmanager
def writing(out: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process in the middle of writing ``out``, until its input ends; and its scratch folder."""
    command, pipe = [sys.executable, "-c", WRITER.format(path=sys.path, out=str(out))], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout
        yield process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_while_writing_leaves_no_half(out: Path, existing: bool) -> None:
    old = make(out).digest if existing else None
    with writing(out) as (process, scratch):
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert scratch.is_dir()
    if existing:
        assert artifact.load(out).digest == old
    else:
        assert not out.exists()
    assert make(out, content=b"new").digest != old
    assert list(out.parent.iterdir()) == [out]


def test_what_others_are_writing_stays(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where their processes cannot be seen: in another container, on the same folder."""

    def unseen(pid: int, number: int) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", unseen)
    with writing(out) as (process, scratch):
        make(out)
        assert (scratch / "half").read_bytes() == b"ha"
        process.communicate("")
    assert process.returncode == 0
    assert (out / "half").exists()
    assert list(out.parent.iterdir()) == [out]


def test_only_scratch_folders_of_this_name_are_removed(out: Path) -> None:
    others = {".graph", ".graph.backup", ".graph.old", ".graph.int8.rpfm-k1ll3d_0", ".graph.int8.rpfm-k1ll3d_0.old"}
    for name in (*others, ".graph.rpfm-k1ll3d_0", ".graph.rpfm-k1ll3d_1.old"):
        (out.parent / name).mkdir(parents=True)
    out.mkdir()  # what is put aside is the only copy as long as there is nothing here
    with pytest.raises(ZeroDivisionError), artifact.replacing_folder(out, "graph"):
        raise ZeroDivisionError
    assert {path.name for path in out.parent.iterdir()} == {"graph", ".graph.rpfm-k1ll3d_1.old", *others}
    make(out)
    make(out)
    assert {path.name for path in out.parent.iterdir()} == {"graph", *others}


def nothing(out: Path) -> None:
    pass


def empty(out: Path) -> None:
    out.mkdir(parents=True)


def linked(out: Path) -> None:
    make(out.with_name("disk") / "target")
    out.symlink_to("disk/target")


def torn(out: Path) -> None:
    make(out)
    cut(out)


@pytest.mark.parametrize("there", [nothing, empty, make, torn, linked])
def test_what_may_be_replaced(out: Path, there: Callable[[Path], Any]) -> None:
    there(out)
    linked = out.is_symlink()
    artifact.require_free(out, "graph")
    assert make(out, content=b"new").file("weights/model.bin").read_bytes() == b"new"
    assert out.is_symlink() == linked
    assert not [path for path in out.parent.rglob(".*")]


def of_the_user(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "photo.jpg").write_bytes(b"jpeg")


def a_file(out: Path) -> None:
    out.parent.mkdir(parents=True)
    out.write_text("notes")


def link_to_the_users(out: Path) -> None:
    of_the_user(out.with_name("holiday"))
    out.symlink_to("holiday")


def student(out: Path) -> None:
    make(out, kind="student")


def other_manifest(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "manifest.json").write_text('{"name": "app", "icons": []}')


@pytest.mark.parametrize("there", [of_the_user, a_file, link_to_the_users, student, other_manifest])
def test_what_must_not_be_replaced(out: Path, there: Callable[[Path], None]) -> None:
    there(out)
    before = {path: path.is_file() and path.read_bytes() for path in out.parent.rglob("*")}
    words = "graph is a student" if there is student else "holds something else"
    expected = f"{words}: expected a new folder, an empty one, or a graph to replace; choose another, or move it away"
    with pytest.raises(ConfigError, match=expected):
        artifact.require_free(out, "graph")
    with pytest.raises(ConfigError, match=expected):
        make(out)
    assert {path: path.is_file() and path.read_bytes() for path in out.parent.rglob("*")} == before


@pytest.mark.parametrize("name", [".", "..", "../../graph"])
def test_the_working_directory_is_not_replaced(out: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = make(out).digest
    monkeypatch.chdir(out if name == "." else out / "weights")
    with pytest.raises(ConfigError, match="graph is in use, as the working directory or a mount point"):
        make(Path(name))
    assert Path.cwd().exists()
    assert artifact.load(out).digest == digest


def test_a_way_through_what_is_replaced(out: Path) -> None:
    make(out / ".." / "graph")
    make(out / ".." / "graph", content=b"new")
    assert artifact.load(out).file("weights/model.bin").read_bytes() == b"new"
    assert list(out.parent.iterdir()) == [out]


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


def test_what_a_killed_exchange_put_aside_comes_back(out: Path) -> None:
    old, aside = make(out), out.with_name(".graph.rpfm-k1ll3d_0.old")
    out.rename(aside)  # as a kill between the two renames leaves it
    with pytest.raises(ArtifactError, match=rf"is no artifact: .* left it as {aside}, rename that"):
        artifact.load(out)
    with pytest.raises(ConfigError, match="graph is a graph"):  # and it is not taken for a free place
        make(out, kind="bundle")
    assert artifact.load(out).digest == old.digest
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupt_between_two_renames(
    out: Path, error: type[BaseException], renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [make(out).digest, make(out.with_name("copy"), content=b"new").digest]
    shutil.rmtree(out.with_name("copy"))
    rename, done = Path.rename, list[str]()

    def interrupted(self: Path, target: Any) -> Path:
        if len(done) == renames:
            monkeypatch.setattr(Path, "rename", rename)
            raise error
        done.append(str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(error):
        make(out, content=b"new")
    assert artifact.load(out).digest == made[renames == 2]
    make(out)
    assert list(out.parent.iterdir()) == [out]


def test_evidence_is_no_part_of_an_artifact(out: Path) -> None:
    made = make(out)
    (out / "evidence").mkdir()
    (out / "evidence" / "speed.json").write_text("{}")
    artifact.seal(out, "graph", made.config, made.signatures, made.lineage)
    assert artifact.load(out) == made
    manifest = json.loads((out / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["noise.npy", "weights/model.bin"]
    manifest["files"]["evidence/speed.json"] = "0" * 64  # as it was listed once, and has been measured again since
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert artifact.load(out) == made
    assert artifact.load(out).digest == made.digest


def test_artifacts_are_written_in_a_scratch_folder(tmp_path: Path) -> None:
    """As a float graph on the way to an INT8 one; its process holds the lock of that folder already."""

    def write() -> None:
        with (
            artifact.replacing_folder(tmp_path / "graph", "graph") as outer,
            artifact.replacing_folder(outer / "float", "graph") as inner,
        ):
            (inner / "file").write_text("x")

    writer = Thread(target=write, daemon=True)
    writer.start()
    writer.join(20)
    assert not writer.is_alive()
    assert (tmp_path / "graph" / "float" / "file").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]
