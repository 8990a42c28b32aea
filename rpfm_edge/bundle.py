"""Graph → bundle: the graphs, an engine per backend, the noise, and later the evidence of quality and speed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import runtimes
from rpfm_edge import artifact, assets, canary
from rpfm_edge.artifact import Artifact, Stage, file_digest, tool_versions
from rpfm_edge.errors import ArtifactError, ConfigError
from rpfm_edge.precisions import require_backends

EVIDENCE = "evidence"


def build(
    graph: str | Path, targets: Sequence[str], out: Path, options: Mapping[str, Mapping[str, Any]] | None = None
) -> Artifact:
    """Compile a graph artifact for every backend in ``targets`` and write the bundle ``out``.

    ``graph`` may also be a bundle: its engines are kept and the new ones are added. ``options`` are per backend. With
    ONNX Runtime here, the bundle gets a canary, by which an engine that is built elsewhere later can be judged.

    Raises:
        ConfigError: no target, options of another backend, or a target that does not compute in the graph's precision.
    """
    if not targets:
        raise ConfigError("no target", expected=f"one of {sorted(runtimes.BACKENDS)}", fix="give --target")
    if idle := sorted(set(options or {}) - set(targets)):
        raise ConfigError(
            f"options of {idle[0]!r}, which is no target", expected=f"one of {list(targets)}", fix="correct the name"
        )
    source = artifact.load(assets.resolve(graph), "graph", "bundle")
    require_backends(str(source.config.get("precision", "fp32")), targets)
    backends = dict(source.config.get("backends", {}))
    tools: dict[str, str] = {}
    with artifact.replacing_folder(out) as folder:
        for name in source.files:
            if not name.startswith((f"{EVIDENCE}/", "student/")):  # the torch backend keeps its own copy
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source.path / name, folder / name)
        if canary.FILE not in source.files and (tensors := canary.record(source)):
            artifact.write_bytes(folder / canary.FILE, canary.content(tensors))
        for target in targets:
            runtime, chosen = runtimes.load(target), dict((options or {}).get(target, {}))
            shutil.rmtree(folder / "engines" / target, ignore_errors=True)
            for name in source.signatures:
                engine = folder / "engines" / target / name
                engine.mkdir(parents=True)
                runtime.build(source, name, engine, chosen)
            backends[target] = chosen
            tools |= runtime.versions(chosen)
        stage = Stage("build", {"backends": backends}, tool_versions() | tools, {source.kind: source.digest})
        config = {**source.config, "backends": backends}
        artifact.seal(folder, "bundle", config, source.signatures, (*source.lineage, stage))
    return artifact.load(out, "bundle")


def add_evidence(bundle: Artifact, name: str, evidence: Mapping[str, Any]) -> Artifact:
    """Store ``evidence`` as ``evidence/NAME.json`` of a bundle; evidence is no part of the bundle's digest."""
    file, manifest = f"{EVIDENCE}/{name}.json", bundle.path / artifact.MANIFEST
    record = json.loads(manifest.read_text(encoding="utf-8"))
    if record["files"].pop(file, None):  # the old one first: whenever this is killed, the bundle still verifies
        artifact.write_text(manifest, json.dumps(record, indent=1))
    artifact.write_text(bundle.path / file, json.dumps(evidence, indent=1))
    record["files"][file] = file_digest(bundle.path / file)
    artifact.write_text(manifest, json.dumps(record, indent=1))
    return artifact.load(bundle.path, "bundle")


def read_evidence(bundle: Artifact) -> dict[str, Any]:
    """Name → evidence of everything measured on this bundle."""
    found = {}
    for name in bundle.files:
        if name.startswith(f"{EVIDENCE}/"):
            try:
                found[Path(name).stem] = json.loads(bundle.file(name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ArtifactError(
                    f"{bundle.path / name} is no JSON ({error})", expected="evidence", fix="validate the bundle again"
                ) from None
    return found


def size_bytes(bundle: Artifact, backend: str) -> int:
    """Bytes of the engines of one backend: what a device has to hold."""
    return sum((bundle.path / n).stat().st_size for n in bundle.files if n.startswith(f"engines/{backend}/"))
