"""Stages that are run once: a stage runs again only if its config, one of its inputs or a library changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rpfm_edge import artifact, assets
from rpfm_edge.artifact import file_digest, json_digest, tool_versions, write_text
from rpfm_edge.errors import ArtifactError

console = Console(stderr=True)
LIBRARIES = ("torch", "onnx", "onnxsim", "onnxruntime", "onnxruntime-gpu", "nncf", "openvino")


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
    ) -> tuple[Path, bool]:
        """Run ``make``, which writes ``out``, unless the record says that this very thing was made.

        Args:
            tools: the libraries whose versions count. Training takes none: a network that took hours on another
                machine stays what it is.

        Returns:
            ``out``, and whether it is fresh.
        """
        record = self._record(name)
        versions, digests = tool_versions(*tools), {k: identity(v) for k, v in inputs.items()}
        key = json_digest({"config": config, "tools": versions, "inputs": digests})
        if _recorded(record) == {"key": key, "digest": identity(out)}:
            console.print(f"[dim]{name}: unchanged[/dim]")
            return out, False
        console.print(f"[bold]{name}[/bold]")
        self.keep(name, key, out.with_name(out.name + ".work"))
        make()
        write_text(record, json.dumps({"key": key, "digest": identity(out)}))
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


def identity(thing: str | Path) -> str:
    """The digest of an artifact or a file; other strings (factories, data set names) stand for themselves."""
    path = Path(thing)
    try:
        folder = assets.resolve(thing)
        if (folder / artifact.MANIFEST).is_file():
            return artifact.load(folder, verify=False).digest
    except ArtifactError:
        pass
    return file_digest(path) if path.is_file() else str(thing)


def _recorded(record: Path) -> dict[str, str]:
    try:
        return dict(json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
