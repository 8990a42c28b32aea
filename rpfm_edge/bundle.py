"""Graph → bundle: the graphs, an engine per backend, the noise, and later the evidence of quality and speed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import runtimes
from rpfm_edge import artifact, assets, canary
from rpfm_edge.artifact import EVIDENCE, Artifact, Stage, tool_versions
from rpfm_edge.errors import ArtifactError, ConfigError, warn
from rpfm_edge.precisions import require_backends


def build(
    graph: str | Path,
    out: str | Path,
    target: str | Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Artifact:
    """Compile a graph artifact for one or more backends and write the bundle ``out``.

    ``graph`` may also be a bundle: its engines are kept and the new ones are added. ``options`` are per backend. With
    ONNX Runtime here, the bundle gets a canary, by which an engine that is built elsewhere later can be judged.
    A bundle that is written in place keeps its evidence, unless an engine is built again, of which it would be untrue.

    Raises:
        ConfigError: ``out`` is something else than a bundle, no target, options of another backend, unknown ones or
            values out of range, or a target that does not compute in the graph's precision.
        BackendError: a target that is unknown, not installed or refuses the graph.
    """
    targets, out = [target] if isinstance(target, str) else list(target), Path(out)
    if not targets:
        raise ConfigError("no target", expected=f"one of {sorted(runtimes.BACKENDS)}", fix="give --target")
    if idle := sorted(set(options or {}) - set(targets)):
        raise ConfigError(
            f"options of {idle[0]!r}, which is no target", expected=f"one of {list(targets)}", fix="correct the name"
        )
    source = artifact.load(assets.resolve(graph), "graph", "bundle")
    require_backends(str(source.config.get("precision", "fp32")), targets)
    given = {name: dict((options or {}).get(name, {})) for name in targets}
    loaded = {name: runtimes.load(name) for name in targets}
    for backend, runtime in loaded.items():  # of all, before the first is compiled
        runtime.checked_options(given[backend])
    backends = dict(source.config.get("backends", {}))
    tools: dict[str, str] = {}
    with artifact.replacing_folder(out, "bundle") as folder:
        for name in source.files:
            if not name.startswith("student/"):  # the torch backend keeps its own copy
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source.path / name, folder / name)
        if canary.FILE not in source.files and (tensors := canary.record(source)):
            artifact.write_bytes(folder / canary.FILE, canary.content(tensors))
        for backend, runtime in loaded.items():
            shutil.rmtree(folder / "engines" / backend, ignore_errors=True)
            for name in source.signatures:
                engine = folder / "engines" / backend / name
                engine.mkdir(parents=True)
                runtime.build(source, name, engine, given[backend])
            backends[backend] = given[backend]
            tools |= runtime.versions(given[backend])
        if source.path.resolve() == out.resolve():
            _keep_evidence(source, folder, targets)
        stage = Stage("build", {"backends": backends}, tool_versions() | tools, {source.kind: source.digest})
        config = {**source.config, "backends": backends}
        artifact.seal(folder, "bundle", config, source.signatures, (*source.lineage, stage))
    return artifact.load(out, "bundle")


def _keep_evidence(bundle: Artifact, folder: Path, targets: Sequence[str]) -> None:
    """Copy the evidence of ``bundle`` to ``folder``, or say what is lost because an engine is built again."""
    files = sorted((bundle.path / EVIDENCE).glob("[!.]*.json"))
    again = sorted(set(targets) & set(bundle.config.get("backends", {})))
    if files and again:
        names = ", ".join(file.stem for file in files)
        warn(f"{', '.join(again)} built again: the evidence of {bundle.path} ({names}) is dropped; measure it again")
        return
    for file in files:
        artifact.write_bytes(folder / EVIDENCE / file.name, file.read_bytes())


def add_evidence(bundle: Artifact, name: str, evidence: Mapping[str, Any]) -> None:
    """Store ``evidence`` as ``evidence/NAME.json`` of a bundle, beside what its manifest lists.

    A bundle that cannot be written to, or a full disk, is said on standard error.
    """
    artifact.keep_text(bundle.path / EVIDENCE / f"{name}.json", json.dumps(evidence, indent=1))


def read_evidence(bundle: Artifact) -> dict[str, Any]:
    """Name → evidence of everything measured on this bundle."""
    found = {}
    for file in sorted((bundle.path / EVIDENCE).glob("[!.]*.json")):
        try:
            found[file.stem] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(
                f"{file} is no JSON ({error})", expected="evidence", fix="measure it again, or delete it"
            ) from None
    return found


def size_bytes(bundle: Artifact, backend: str) -> int:
    """Bytes of the engines of one backend: what a device has to hold."""
    return sum((bundle.path / n).stat().st_size for n in bundle.files if n.startswith(f"engines/{backend}/"))
