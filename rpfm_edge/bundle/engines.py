"""The engines of a bundle: which there are, which run here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import runtimes
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.backends import BACKENDS, runs_student
from rpfm_edge.core.errors import ArtifactError, BackendError, ParityError, RpfmError, SignatureError
from rpfm_edge.core.runtime import Runtime
from rpfm_edge.measure.machine import where


def size_bytes(bundle: Artifact, backend: str) -> int:
    """Bytes of the engines of one backend: what a device has to hold."""
    return sum((bundle.path / n).stat().st_size for n in bundle.files if n.startswith(f"engines/{backend}/"))


REFUSALS = (ArtifactError, BackendError, ParityError, SignatureError, RuntimeError)  # of a graph or an engine


def built_by(backend: str, options: Mapping[str, Any]) -> list[Any]:
    """What an engine and its speed depend on beside the graph: the backend's versions, its options and the device.

    Without a GPU there is no device for TensorRT; an engine can still be built for the one that its options name.
    """
    try:
        runs_on = device(backend)
    except BackendError:
        runs_on = {}
    return [runtimes.load(backend).versions(options), dict(options), runs_on]


def device(backend: str) -> dict[str, Any]:
    """What an engine runs on, so that work that was copied from another machine is not taken for this one's."""
    if BACKENDS[backend].on_gpu:
        return asdict(import_module("runtimes.trt.cuda").device())
    return {name: fact for name, fact in where().items() if name in ("cpu", "board")}


def require_engine(bundle: Artifact, backend: str) -> Runtime:
    """The backend, installed and with an engine in ``bundle``; raises ``BackendError`` otherwise."""
    runtime, backends = runtimes.load(backend), bundle.config["backends"]
    if backend not in backends:
        raise BackendError(
            f"{bundle.path} has no engine for {backend}",
            expected=f"one of {sorted(backends)}",
            fix=_how_to_add(bundle.path, backend),
        )
    return runtime


def _how_to_add(bundle: Path, backend: str) -> str:
    if runs_student(backend):  # whose student a bundle does not carry
        return f"build it from the graph, which has the student: rpfm-edge build GRAPH --target {backend} --out BUNDLE"
    path = shlex.quote(str(bundle))
    return f"run: rpfm-edge build {path} --target {backend} --out {path}"


def default_backend(bundle: Artifact) -> str:
    """The first backend of ``bundle`` that is installed here; its very first one if none is, which is then refused."""
    names: list[str] = list(bundle.config["backends"])
    return next((name for name in names if runtimes.why_not(name) is None), names[0])


def engine_versions(bundle: Artifact, backend: str) -> dict[str, str]:
    """The versions of the libraries that run the engine of ``backend`` with the options of ``bundle``."""
    return require_engine(bundle, backend).versions(bundle.config["backends"][backend])


FAILURES = (RpfmError, RuntimeError, MemoryError)  # of one backend, which does not end the others


def usable_backends(bundle: Artifact, backend: str | None) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The one that was asked for, or the backends of a bundle whose libraries are here; and, if any is not, a record
    ``skipped`` of the reasons. ``BackendError`` if none is left."""
    names = [backend] if backend else list(bundle.config["backends"])
    reasons = {} if backend else {name: why for name in names if (why := runtimes.why_not(name)) is not None}
    usable = [name for name in names if name not in reasons]
    for name in usable or names[:1]:
        require_engine(bundle, name)
    return usable, {"skipped": reasons} if reasons else {}


def checked_backends(bundle: Artifact, backend: str | None) -> list[str]:
    """The one that was asked for, or all of the bundle; each is refused before anything slow if it cannot be used."""
    names = [backend] if backend else list(bundle.config["backends"])
    for name in names:
        require_engine(bundle, name)
    return names
