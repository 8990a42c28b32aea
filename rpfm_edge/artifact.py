"""Artifacts: a folder with a ``manifest.json`` (kind, config, signatures, lineage, sha256 of every file) and its files.

An artifact is written beside its destination and renamed into place, so a failure or a kill never leaves half of one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from rpfm_edge.errors import ArtifactError, ConfigError, warn
from rpfm_edge.signature import Signature

with suppress(ImportError):  # on Windows, where folders cannot be opened either, so that nothing is locked
    import fcntl

Kind = Literal["teacher", "student", "graph", "bundle"]
MANIFEST = "manifest.json"
EVIDENCE = "evidence"  # the folder of what was measured on an artifact: no part of it
SCRATCH = ".rpfm-"  # in the names of scratch folders, before eight random characters
OLD = ".old"  # what an exchange of folders has put aside
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the lineage: what ran, with which config and tools, on which inputs (name → digest)."""

    stage: str
    config: Mapping[str, Any]
    tools: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder that ``load`` has read. ``config`` is whatever its kind needs to be used again."""

    path: Path
    kind: Kind
    config: Mapping[str, Any]
    signatures: Mapping[str, Signature]
    files: Mapping[str, str]
    lineage: tuple[Stage, ...]

    def file(self, name: str) -> Path:
        """The path of a file of this artifact; raises ``ArtifactError`` if the manifest does not list it."""
        if name not in self.files:
            raise ArtifactError(
                f"{self.path} has no {name}", expected=f"one of {sorted(self.files)}", fix="build the artifact again"
            )
        return self.path / name

    @property
    def digest(self) -> str:
        """sha256 over kind, config and the sha256 of every file: the identity of the content, wherever it lies."""
        return json_digest({"kind": self.kind, "config": self.config, "files": dict(self.files)})


def json_digest(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=dict).encode()).hexdigest()


def finite(value: Any) -> Any:
    """JSON knows neither infinity (the PSNR of equal images) nor nan: both become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    sha = hashlib.sha256()
    while block := stream.read(1 << 20):
        sha.update(block)
    return sha.hexdigest()


def tool_versions(*names: str) -> dict[str, str]:
    """Versions of the installed distributions among ``names``, and ours."""
    found = {}
    for name in ("rpfm-edge", *names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def require_free(out: Path | str, kind: Kind) -> None:
    """Refuse an ``out`` that must not be replaced by an artifact of ``kind``. To be asked before anything slow.

    Raises:
        ConfigError: it is neither absent, nor an empty folder, nor an artifact of that kind; or it cannot be renamed,
            because it is the working directory or a mount point.
    """
    out = Path(out).resolve()
    if not out.exists():
        return
    found = _kind(out)
    if found != kind and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out} is a {found}" if found else f"{out} holds something else",
            expected=f"a new folder, an empty one, or a {kind} to replace",
            fix="choose another, or move it away",
        )
    if Path.cwd().is_relative_to(out) or os.path.ismount(out):
        raise ConfigError(
            f"{out} is in use, as the working directory or a mount point",
            expected="a folder that can be renamed",
            fix="leave it, or choose a folder in it",
        )


def _kind(folder: Path) -> str | None:
    """The kind of the artifact in a folder, whole or not; None if there is none."""
    try:
        kind = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kind if kind in get_args(Kind) else None


def require_writable(folder: Path) -> None:
    """Make ``folder`` and try to write there: now, not after what is to be kept there was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        error.filename = str(folder)  # instead of the temporary file
        raise


@contextmanager
def replacing_folder(out: Path, kind: Kind) -> Iterator[Path]:
    """Yield a scratch folder beside ``out``; on success it becomes ``out``, on failure it is removed.

    Raises:
        ConfigError: ``require_free`` refuses ``out``.
    """
    out = out.resolve()  # through links, and out of a folder that is itself to be replaced
    with scratch_folder(out) as scratch:
        require_free(out, kind)
        yield scratch
        _replace(scratch, out)


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out``, for as long as the block lasts.

    What killed processes have left is removed. If one was killed between the two renames of an exchange, what was there
    before is first put back.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with _locked(out.parent) as alone:
            if (aside := _put_aside(out)) and not out.exists():
                aside[-1].rename(out)
            if alone:
                _sweep(out)
            scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}{SCRATCH}", dir=out.parent))
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            scratch.chmod(0o755)
            stack.enter_context(_locked(scratch))
        yield scratch


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of ``folder``, which ends with the process. False if another has it and we do not ``wait``, or if
    there are no locks: on Windows, and on some network file systems. A scratch folder is not waited for: whoever writes
    in it is who has locked it.
    """
    wait = wait and SCRATCH not in folder.name
    with ExitStack() as stack:
        try:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            held = False
        else:
            held = True
        yield held


def _scratch_folders(out: Path, end: str = "") -> list[Path]:
    return list(out.parent.glob(f".{glob.escape(out.name)}{SCRATCH}{'?' * 8}{end}"))


def _put_aside(out: Path) -> list[Path]:
    """What exchanges that were killed between their two renames have left."""
    return _scratch_folders(out.resolve(), OLD)


def _sweep(out: Path) -> None:
    """Remove the scratch folders that no process holds, and what was put aside for an ``out`` that is there."""
    for folder in _scratch_folders(out):
        with _locked(folder, wait=False) as ended:
            if ended:
                shutil.rmtree(folder, ignore_errors=True)
    if _kind(out):
        for folder in _put_aside(out):
            shutil.rmtree(folder, ignore_errors=True)


def _replace(scratch: Path, out: Path) -> None:
    """Rename ``scratch`` to ``out``; what was there comes back if that fails, and otherwise is removed with scratch."""
    old = scratch.with_name(scratch.name + OLD)
    with _locked(out.parent):  # nobody takes what is put aside for what a kill has left
        try:
            if out.exists():
                out.rename(old)
            scratch.rename(out)
        except BaseException:  # an interrupt, too
            if old.exists() and not out.exists():
                old.rename(out)
            raise
        if old.exists():
            old.rename(scratch)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``path`` aside and rename it into place, so that nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # containers may share the folder and the pid
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not name it
        raise
    finally:
        scratch.unlink(missing_ok=True)


def keep_text(path: Path, text: str) -> None:
    """``write_text`` of a result that is returned as well: what prevents it is said on standard error, and no more."""
    try:
        write_text(path, text)
    except OSError as error:
        warn(f"{path} was not written, so this result is not kept: {error.strerror or error}")


def seal(
    folder: Path,
    kind: Kind,
    config: Mapping[str, Any],
    signatures: Mapping[str, Signature],
    lineage: tuple[Stage, ...],
) -> None:
    """Write the manifest of ``folder``: every file below it, but evidence, is listed with its sha256."""
    files = {
        str(path.relative_to(folder)): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST and folder / EVIDENCE not in path.parents
    }
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "config": dict(config),
        "signatures": {name: signature.to_json() for name, signature in signatures.items()},
        "files": files,
        "lineage": [
            {"stage": s.stage, "config": dict(s.config), "tools": dict(s.tools), "inputs": dict(s.inputs)}
            for s in lineage
        ],
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))


def load(path: Path | str, *kinds: Kind, verify: bool = True) -> Artifact:
    """Read the artifact at ``path``.

    Args:
        kinds: the kinds that will do; empty for any.
        verify: also compare the sha256 of every file with the manifest.

    Raises:
        ArtifactError: no manifest, an unreadable one, another kind, a missing or altered file.
    """
    path = Path(path)
    loaded = _read_manifest(path)
    if kinds and loaded.kind not in kinds:
        raise ArtifactError(
            f"{path} is a {loaded.kind}", expected=f"a {' or '.join(kinds)}", fix="give the right artifact"
        )
    if verify:
        _verify(path, loaded.files)
    return loaded


def _read_manifest(path: Path) -> Artifact:
    file = path / MANIFEST
    if not file.is_file():
        fix = "check the path or make it again"
        if not path.exists() and (aside := _put_aside(path)):
            fix = f"a killed process left it as {aside[-1]}, rename that"
        raise ArtifactError(f"{path} is no artifact", expected=f"a folder with a {MANIFEST}", fix=fix)
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found = f"has format {manifest['format']}"
        missing = sorted({"kind", "config", "signatures", "files", "lineage"} - set(manifest))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(file, error) from None
    if manifest["format"] != FORMAT or missing:
        raise ArtifactError(
            f"{file} {found}" + (f", without {missing}" if missing else ""),
            expected=f"a complete manifest of format {FORMAT}",
            fix="make the artifact again",
        )
    try:
        return _parse(path, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{file} cannot be read ({type(error).__name__}: {error})",
        expected="a manifest",
        fix="make the artifact again",
    )


def _parse(path: Path, manifest: Mapping[str, Any]) -> Artifact:
    if manifest["kind"] not in get_args(Kind):
        raise ValueError(f"kind {manifest['kind']!r}")
    # evidence was listed once, and may have changed since
    files = {name: sha for name, sha in manifest["files"].items() if not name.startswith(f"{EVIDENCE}/")}
    for name in files:  # a manifest must not reach outside its folder
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"file name {name!r}")
    return Artifact(
        path=path,
        kind=manifest["kind"],
        config=dict(manifest["config"]),
        signatures={name: Signature.from_json(s) for name, s in manifest["signatures"].items()},
        files=files,
        lineage=tuple(Stage(**stage) for stage in manifest["lineage"]),
    )


def _verify(path: Path, files: Mapping[str, str]) -> None:
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise ArtifactError(
                f"{file} is missing", expected="every file of the manifest", fix="copy or make it again"
            )
        if file_digest(file) != expected:
            raise ArtifactError(
                f"{file} was altered or cut short", expected=f"sha256 {expected[:12]}…", fix="copy or make it again"
            )
