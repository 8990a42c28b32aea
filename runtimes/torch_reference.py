"""The reference, which the other backends are compared with: the float student itself, in torch. Slow.

This file knows no network. A graph artifact that carries its student names a factory, ``package.module:function``, in
its config; the function takes the folder of the student and returns one callable per graph, numpy in, numpy out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, BackendError, SignatureError
from rpfm_edge.core.files import write_text
from rpfm_edge.core.runtime import Known, LayerTime, Session
from rpfm_edge.core.signature import Feeds, Signature
from rpfm_edge.measure import canary
from runtimes import profiling
from runtimes.options import THREADS, checked
from runtimes.session import guarded

name = "torch"
DEFAULTS = {"threads": 0}  # 0: as torch is set
FACTORY, STUDENT = "factory.json", "student"
TRUSTED = "distill"  # the package whose factories run; $RPFM_EDGE_FACTORIES adds others, separated by commas
Graph = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def build(graph: Artifact, name: str, engine: Path, options: Mapping[str, Any], known: Known | None = None) -> None:
    """Copy the student of ``graph`` into ``engine`` and check that its factory makes graph ``name``.

    Options: ``DEFAULTS``.
    """
    checked_options(options)
    graph.file(f"{name}.onnx")  # the same refusal of an unknown graph as everywhere
    require_student(graph, "torch")
    shutil.copytree(graph.path / STUDENT, engine / STUDENT)
    write_text(engine / FACTORY, json.dumps({"factory": graph.config["factory"], "graph": name}))
    _graph(engine)
    if known:
        with open(engine, graph.signatures[name], options) as session:
            canary.check(graph, name, session, known, f"torch {_torch().__version__}")


@contextmanager
def open(engine: Path, signature: Signature, options: Mapping[str, Any]) -> Iterator[Session]:
    """Make the graph of ``engine`` by its factory. ``threads`` is set for the whole process, until leaving."""
    threads = checked_options(options)["threads"]
    torch = _torch()
    graph = _graph(engine)

    def call(feeds: Feeds) -> dict[str, np.ndarray]:
        outputs = graph({tensor: np.array(array) for tensor, array in feeds.items()})
        shaped = {tensor: _as_before(np.array(array), signature, tensor) for tensor, array in outputs.items()}
        return dict(_checked_outputs(shaped, signature))

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with guarded("torch", signature, call) as session:
            yield session
    finally:
        torch.set_num_threads(before)


def profile(
    engine: Path, signature: Signature, options: Mapping[str, Any], feeds: Feeds, runs: int = 30
) -> list[LayerTime]:
    """Refused: torch runs the student, which has no ONNX nodes."""
    profiling.refuse("torch", "it runs the student itself, not the ONNX graph")


def versions(options: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The version of torch."""
    return {"torch": str(_torch().__version__)}


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` over ``DEFAULTS``; ``ConfigError`` for what is unknown or out of range."""
    return checked("torch", DEFAULTS, options, {"threads": THREADS})


def require_student(graph: Artifact, backend: str) -> None:
    """Raise ``BackendError`` unless ``graph`` carries the student that ``backend`` starts from."""
    if "factory" not in graph.config or f"{STUDENT}/{artifact.MANIFEST}" not in graph.files:
        raise BackendError(
            f"{graph.path} has no student and factory",
            expected=f"both, because the {backend} backend runs only the float student that a graph was exported from",
            fix="build from the graph as it was exported, before quantization, or for another backend",
        )


def trusted(spec: str) -> Callable[[Path], Mapping[str, Any]]:
    """Import ``package.module:function``, only from trusted packages: a bundle from elsewhere may name anything."""
    module, _, function = spec.partition(":")
    packages = [TRUSTED, *filter(None, os.environ.get("RPFM_EDGE_FACTORIES", "").split(","))]
    if module.split(".")[0] not in packages:
        raise BackendError(
            f"factory {spec!r} is in a package that is not trusted",
            expected=f"package.module:function, the package being one of {packages}",
            fix="if you trust it, add its name to $RPFM_EDGE_FACTORIES",
        )
    try:
        found: Callable[[Path], Mapping[str, Any]] = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BackendError(
            f"factory {spec!r} cannot be imported ({error})",
            expected="package.module:function",
            fix="install the package that has it (for distill, pip install 'rpfm-edge[distill]')",
        ) from error
    return found


def _torch() -> Any:
    try:
        import torch
    except (ImportError, OSError) as error:
        raise BackendError(
            f"torch cannot be imported ({error})",
            expected="a working package torch",
            fix="run: pip install 'rpfm-edge[distill]' --force-reinstall",
        ) from error
    return torch


def _graph(engine: Path) -> Graph:
    """The callable that the factory of ``engine`` makes for its graph."""
    try:
        config = json.loads((engine / FACTORY).read_text(encoding="utf-8"))
        factory, graph = str(config["factory"]), config["graph"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{engine / FACTORY} is missing or damaged ({error})",
            expected="a factory and a graph",
            fix="copy the bundle again or build the engine again",
        ) from error
    artifact.load(engine / STUDENT, "student")
    graphs: Mapping[str, Graph] = trusted(factory)(engine / STUDENT)
    if graph not in graphs:
        raise BackendError(
            f"factory {factory} makes no graph {graph!r}", expected=f"one of {sorted(graphs)}", fix="build one of these"
        )
    return graphs[graph]


def _as_before(array: np.ndarray, signature: Signature, tensor: str) -> np.ndarray:
    """``array`` without the axis of one source that a student puts in front, and that older manifests lack."""
    shapes = [spec.shape for spec in signature.outputs if spec.name == tensor]
    return array[0] if shapes and array.shape == (1, *shapes[0]) else array


def _checked_outputs(outputs: Mapping[str, np.ndarray], signature: Signature) -> Mapping[str, np.ndarray]:
    found = {tensor: f"{array.dtype}{list(array.shape)}" for tensor, array in outputs.items()}
    expected = {spec.name: str(spec) for spec in signature.outputs}
    if found != expected:
        raise SignatureError(
            f"the torch student returns {found}", expected=f"{expected}", fix="export the student again"
        )
    return outputs
