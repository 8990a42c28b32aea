"""ONNX Runtime: the CPU of any machine, and whatever execution providers are installed. An engine is the ONNX graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime

from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, BackendError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.core.runtime import Known, LayerTime, Session
from rpfm_edge.core.signature import Feeds, Signature, TensorSpec
from rpfm_edge.measure import canary
from runtimes import profiling
from runtimes.options import THREADS, checked
from runtimes.session import guarded, require_signature

name = "onnxruntime"
MODEL = "model.onnx"
DEFAULTS = {"provider": "CPUExecutionProvider", "threads": 0}  # 0: all cores
KERNEL, CAST, BLOCKED = "_kernel_time", "InsertedPrecisionFreeCast_", "_nchwc"  # around names in a profile
SESSION = onnxruntime.InferenceSession  # looked up at import: a half uninstalled onnxruntime is an empty package
DTYPES = {"float": "float32"}  # where ONNX Runtime's name is not numpy's


def build(graph: Artifact, name: str, engine: Path, options: Mapping[str, Any], known: Known | None = None) -> None:
    """Copy graph ``name`` to ``engine``, once ONNX Runtime has optimised it. Options: ``DEFAULTS``."""
    source = graph.file(f"{name}.onnx")
    option = checked_options(options)
    try:
        session = _session(source, option)
    except _refusals() as error:
        raise BackendError(
            f"ONNX Runtime cannot load {source} ({_cause(error)})",
            expected="an ONNX graph that it supports",
            fix="export it again",
        ) from error
    require_signature(source, _signature(session), graph.signatures[name])
    shutil.copyfile(source, engine / MODEL)
    for file in graph.files:
        if file.startswith(f"{name}.onnx."):  # weights outside the graph, which names them by this file name
            shutil.copyfile(graph.path / file, engine / file)
    if known:
        with open(engine, graph.signatures[name], options) as session:
            canary.check(graph, name, session, known, f"onnxruntime {onnxruntime.__version__}")


@contextmanager
def open(engine: Path, signature: Signature, options: Mapping[str, Any]) -> Iterator[Session]:
    """Load the graph of ``engine``. Inputs are read where they lie, during ``run`` only."""
    loaded = _load(engine / MODEL, signature, checked_options(options))
    names = [spec.name for spec in signature.outputs]

    def call(feeds: Feeds) -> dict[str, np.ndarray]:
        return dict(zip(names, loaded.run(names, feeds), strict=True))

    with guarded("onnxruntime", signature, call) as session:
        yield session


def profile(
    engine: Path, signature: Signature, options: Mapping[str, Any], feeds: Feeds, runs: int = 30
) -> list[LayerTime]:
    """Layer times by ONNX Runtime's profiler, in whole microseconds. Of a fused kernel, ``names`` has the product.

    Needs the package onnx, since kernels are named after tensors too.
    """
    profiling.require(signature, feeds, runs)
    option = checked_options(options)
    if option["provider"] != DEFAULTS["provider"]:
        profiling.refuse("onnxruntime", f"its profiler times only the launch of kernels on {option['provider']}")
    onnx = import_extra("onnx", "profile")
    with TemporaryDirectory() as folder:
        loaded = _load(engine / MODEL, signature, option, Path(folder) / "profile")
        names = [spec.name for spec in signature.outputs]
        for _ in range(profiling.WARM_UP + runs):
            loaded.run(names, feeds)
        events = json.loads(Path(loaded.end_profiling()).read_text(encoding="utf-8"))
    nodes = onnx.load(engine / MODEL, load_external_data=False).graph.node
    return profiling.medians(_entries(events, {node.name: node for node in nodes if node.name}))


def versions(options: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The version of ONNX Runtime."""
    return {"onnxruntime": onnxruntime.__version__}


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` over ``DEFAULTS``; ``BackendError`` for a provider that this build of ONNX Runtime lacks."""
    option = checked("onnxruntime", DEFAULTS, options, {"threads": THREADS})
    found = onnxruntime.get_available_providers()
    if option["provider"] not in found:
        raise BackendError(
            f"ONNX Runtime has no {option['provider']}",
            expected=f"one of {found}",
            fix="choose one, or install its package",
        )
    return option


def _load(
    path: Path, signature: Signature, option: Mapping[str, Any], profile: Path | None = None
) -> onnxruntime.InferenceSession:
    try:
        loaded = _session(path, option, profile)
    except _refusals() as error:
        raise ArtifactError(
            f"{path} is missing or damaged ({_cause(error)})",
            expected="the graph that was built",
            fix="copy the bundle again or build the engine again",
        ) from error
    require_signature(path, _signature(loaded), signature)
    return loaded


def _entries(events: list[Any], nodes: Mapping[str, Any]) -> list[profiling.Entry]:
    """Every run of every kernel in a profile; ``nodes``: those of the graph that was loaded, by name."""
    makers = {tensor: node for node in nodes.values() for tensor in node.output}
    found: list[profiling.Entry] = []
    for event in events:
        kernel = event["name"].removesuffix(KERNEL)
        if event.get("cat") == "Node" and kernel != event["name"]:
            kind = event["args"]["op_name"]
            found.append((kernel, _nodes(kernel, kind, nodes, makers), kind, event["dur"] * 1e-6))
    return found


def _nodes(kernel: str, kind: str, nodes: Mapping[str, Any], makers: Mapping[str, Any]) -> tuple[str, ...]:
    """The nodes that a kernel computes: it is named after one, perhaps with its fusions behind, or after a tensor."""
    if kernel in nodes:
        return (kernel,)
    tensor = kernel.removeprefix(CAST).removesuffix(BLOCKED)
    node, found = makers.get(tensor) if kernel.endswith(BLOCKED) else None, []
    while node is not None:  # back over what was fused behind it, to the convolution itself
        found.append(node.name)
        node = makers.get(node.input[0]) if node.op_type != kind else None
    first = "/".join(kernel.split("/")[: next((i for i, part in enumerate(kernel.split("/")) if "Fusion" in part), 0)])
    return tuple(found) or ((first,) if first in nodes else ())


def _session(path: Path, option: Mapping[str, Any], profile: Path | None = None) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    if profile:
        settings.enable_profiling, settings.profile_file_prefix = True, str(profile)
    settings.intra_op_num_threads = option["threads"]
    settings.log_severity_level = 3  # errors: warnings about providers are turned into one below
    session = SESSION(path, settings, providers=[option["provider"]])
    if session.get_providers()[0] != option["provider"]:
        raise BackendError(
            f"ONNX Runtime falls back from {option['provider']} to {session.get_providers()[0]}",
            expected="a provider that works on this machine",
            fix="install its driver, or choose another provider",
        )
    return session


def _signature(session: onnxruntime.InferenceSession) -> Signature:
    def specs(nodes: list[Any]) -> tuple[TensorSpec, ...]:
        kinds = [node.type.removeprefix("tensor(").removesuffix(")") for node in nodes]
        return tuple(
            TensorSpec(node.name, tuple(node.shape), DTYPES.get(kind, kind))
            for node, kind in zip(nodes, kinds, strict=True)
        )

    return Signature(specs(session.get_inputs()), specs(session.get_outputs()))


def _refusals() -> tuple[type[Exception], ...]:
    """The exceptions by which ONNX Runtime refuses a model: they share no base class but ``Exception``."""
    state = onnxruntime.capi.onnxruntime_pybind11_state
    names = "Fail InvalidArgument InvalidGraph InvalidProtobuf NoSuchFile NotImplemented RuntimeException"
    return tuple(getattr(state, kind) for kind in names.split())


def _cause(error: Exception) -> str:
    return str(error).partition("\n")[0].rpartition(" : ")[2].strip()
