"""What was measured on a bundle, kept beside what its manifest lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.artifact import EVIDENCE, Artifact
from rpfm_edge.core.errors import ArtifactError
from rpfm_edge.core.files import keep_text


def add_evidence(bundle: Artifact, name: str, evidence: Mapping[str, Any]) -> None:
    """Store ``evidence`` as ``evidence/NAME.json`` of a bundle, beside what its manifest lists.

    A bundle that cannot be written to, or a full disk, is said on standard error.
    """
    keep_text(bundle.path / EVIDENCE / f"{name}.json", json.dumps(evidence, indent=1))


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


def inspect(path: str | Path) -> dict[str, Any]:
    """Kind, config, signatures, lineage and evidence of an artifact; verifies the sha256 of every file."""
    loaded = artifact.load(shipped.resolve(path))
    return {
        "path": str(loaded.path),
        "kind": loaded.kind,
        "digest": loaded.digest,
        "config": {k: v for k, v in loaded.config.items() if k != "losses"},
        "signatures": {name: s.to_json() for name, s in loaded.signatures.items()},
        "files": {
            name: {"sha256": sha, "bytes": (loaded.path / name).stat().st_size} for name, sha in loaded.files.items()
        },
        "lineage": [{f.name: getattr(stage, f.name) for f in fields(stage)} for stage in loaded.lineage],
        "evidence": read_evidence(loaded),
    }
