"""Stages that are run once: a stage runs again only if its config, one of its inputs or a library changed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.artifact import tool_versions
from rpfm_edge.core.backends import BACKENDS
from rpfm_edge.core.errors import ArtifactError
from rpfm_edge.core.files import file_digest, json_digest, write_text

console = Console(stderr=True)
ENGINES = (distribution for row in BACKENDS.values() if not row.on_gpu for distribution in row.distributions)
LIBRARIES = ("onnx", "onnxsim", "nncf", *ENGINES)


@dataclass(frozen=True, slots=True)
class Stages:
    """Where results and their records lie; ``once`` is the whole of the resuming."""

    folder: Path

    def once(
        self,
        name: str,
        config: Any,
        inputs: Mapping[str, str | Path],
        out: Path,
        make: Callable[[], Any],
        tools: Sequence[str] = LIBRARIES,
        also: Sequence[Path] = (),
    ) -> tuple[Path, bool]:
        """Run ``make``, which writes ``out``, unless the record says that this very thing was made, and it is whole.

        Args:
            tools: the libraries whose versions count. Training takes none: a network that took hours on another
                machine stays what it is.
            also: what else ``make`` writes: files, or folders of files.

        Returns:
            ``out``, and whether it is fresh.
        """
        record = self._record(name)
        versions, digests = tool_versions(*tools), {k: identity(v) for k, v in inputs.items()}
        key = json_digest({"config": config, "tools": versions, "inputs": digests})
        if _recorded(record) == _made(key, out, also):
            console.print(f"[dim]{name}: unchanged[/dim]")
            return out, False
        console.print(f"[bold]{name}[/bold]")
        self.keep(name, key, out.with_name(out.name + ".work"))
        make()
        write_text(record, json.dumps(_made(key, out, also)))
        return out, True

    def keep(self, name: str, key: str, work: Path) -> Path:
        """``work``, the unfinished work of ``name``; removed first if it is of another ``key``, not to be continued."""
        begun = self._record(f"{name}.begun")
        if _recorded(begun) != {"key": key}:
            shutil.rmtree(work, ignore_errors=True)
            write_text(begun, json.dumps({"key": key}))
        return work

    def _record(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"


def identity(thing: str | Path, verify: bool = False) -> str:
    """The digest of an artifact or a file; a factory's name with that of its module's file; other strings (names of
    data sets) stand for themselves.

    ``verify``: read every file of an artifact, 2 ms per MiB; one with a missing or altered file has no digest.
    """
    path = Path(thing)
    try:
        folder = shipped.resolve(thing)
        if (folder / artifact.MANIFEST).is_file():
            return artifact.load(folder, verify=verify).digest
    except ArtifactError:
        pass
    return file_digest(path) if path.is_file() else _factory(str(thing))


def _factory(spec: str) -> str:
    """``package.module:function`` with the digest of the file that it is written in, if there is one."""
    module, colon, _ = spec.partition(":")
    try:
        found = find_spec(module) if colon and re.fullmatch(r"\w+(\.\w+)*:\w+", spec) else None
    except (ImportError, ValueError):  # its package is not there, or the module is __main__
        return spec
    file = Path(found.origin) if found and found.origin else None
    return f"{spec} {file_digest(file)}" if file and file.is_file() else spec


def _made(key: str, out: Path, also: Sequence[Path]) -> dict[str, str]:
    """The record of a stage, by what lies there now."""
    return {"key": key, "digest": identity(out, verify=True), **{path.name: _content(path) for path in also}}


def _content(path: Path) -> str:
    """The digest of a file, or of the files in a folder but hidden ones."""
    if not path.is_dir():
        return identity(path)
    return json_digest({file.name: file_digest(file) for file in path.glob("[!.]*") if file.is_file()})


def _recorded(record: Path) -> dict[str, str]:
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
