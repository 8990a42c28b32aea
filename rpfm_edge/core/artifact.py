"""Artifacts: a folder with a ``manifest.json`` (kind, config, signatures, lineage, sha256 of every file) and its files.

An artifact is written beside its destination and renamed into place, so a failure or a kill never leaves half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

from rpfm_edge.core.errors import ArtifactError, ConfigError
from rpfm_edge.core.files import exchange, file_digest, json_digest, put_aside, scratch_folder, write_text
from rpfm_edge.core.signature import Signature

Kind = Literal["teacher", "student", "codec", "graph", "bundle"]
MANIFEST = "manifest.json"
EVIDENCE = "evidence"  # the folder of what was measured on an artifact: no part of it
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
        exchange(scratch, out)


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
        if not path.exists() and (aside := put_aside(path)):
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
