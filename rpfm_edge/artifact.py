"""Artifacts: a folder with a ``manifest.json`` (kind, config, signatures, lineage, sha256 of every file) and its files.

An artifact is written beside its destination and renamed into place, so a failure or a kill never leaves half of one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from rpfm_edge.errors import ArtifactError
from rpfm_edge.signature import Signature

Kind = Literal["teacher", "student", "graph", "bundle"]
MANIFEST = "manifest.json"
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
        """sha256 over kind, config and the sha256 of every file: the identity of the content, wherever it lies.

        Evidence is what was measured on the content, so it does not change the identity.
        """
        files = {name: sha for name, sha in self.files.items() if not name.startswith("evidence/")}
        return json_digest({"kind": self.kind, "config": self.config, "files": files})


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


@contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """Yield a scratch folder beside ``out``; on success it becomes ``out``, on failure it is removed.

    If a process was killed between the two renames of an exchange, what was there before is first put back.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    left = sorted(out.parent.glob(f".{glob.escape(out.name)}.*{OLD}"))
    if left and not out.exists():
        left[-1].rename(out)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        _replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _replace(scratch: Path, out: Path) -> None:
    """Rename ``scratch`` to ``out``; what was there comes back if that fails."""
    if not out.exists():
        scratch.rename(out)
        return
    old = scratch.with_name(scratch.name + OLD)
    out.rename(old)
    try:
        scratch.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` of UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``path`` aside and rename it into place, so that nobody ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def seal(
    folder: Path,
    kind: Kind,
    config: Mapping[str, Any],
    signatures: Mapping[str, Signature],
    lineage: tuple[Stage, ...],
) -> None:
    """Write the manifest of ``folder``: every file below it is listed with its sha256."""
    files = {
        str(path.relative_to(folder)): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
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
        raise ArtifactError(
            f"{path} is no artifact", expected=f"a folder with a {MANIFEST}", fix="check the path or make it again"
        )
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
    files = dict(manifest["files"])
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
