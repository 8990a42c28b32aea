"""Graph → bundle: the graphs, an engine per backend, the noise, and later the evidence of quality and speed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import runtimes
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.artifact import EVIDENCE, Artifact, Stage, tool_versions
from rpfm_edge.core.backends import BACKENDS
from rpfm_edge.core.errors import BackendError, ConfigError, warn
from rpfm_edge.core.files import write_bytes
from rpfm_edge.core.precisions import require_backends
from rpfm_edge.core.signature import GIVEN_JOINTS, TensorSpec
from rpfm_edge.measure import canary
from rpfm_edge.people.pose import pose_input, pose_kind, to_graph
from rpfm_edge.people.splits import open_splits


def build(
    graph: str | Path,
    out: str | Path,
    target: str | Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Artifact:
    """Compile a graph artifact for one or more backends and write the bundle ``out``.

    ``graph`` may also be a bundle: its engines are kept and the new ones are added. ``options`` are per backend. With
    ONNX Runtime here, the bundle gets a canary, with which every engine is compared, a later one, too.
    A bundle that is written in place keeps its evidence, unless an engine is built again, of which it would be untrue.

    Raises:
        ConfigError: ``out`` is something else than a bundle, no target, options of another backend, unknown ones or
            values out of range, or a target that does not compute in the graph's precision.
        BackendError: a target that is unknown, not installed or refuses the graph.
    """
    targets, out = [target] if isinstance(target, str) else list(target), Path(out)
    if not targets:
        raise ConfigError("no target", expected=f"one of {sorted(BACKENDS)}", fix="give --target")
    if idle := sorted(set(options or {}) - set(targets)):
        raise ConfigError(
            f"options of {idle[0]!r}, which is no target", expected=f"one of {list(targets)}", fix="correct the name"
        )
    source = artifact.load(shipped.resolve(graph), "graph", "bundle")
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
        known = canary.read(source) or record(source)
        if known and canary.FILE not in source.files:
            write_bytes(folder / canary.FILE, canary.content(known))
        for backend, runtime in loaded.items():
            shutil.rmtree(folder / "engines" / backend, ignore_errors=True)
            for name in source.signatures:
                engine = folder / "engines" / backend / name
                engine.mkdir(parents=True)
                runtime.build(source, name, engine, given[backend], known)
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
        write_bytes(folder / EVIDENCE / file.name, file.read_bytes())


def record(graph: Artifact) -> dict[str, np.ndarray] | None:
    """Tensor name → array, of every input and output of the graphs of ``graph``: the first pair of the packaged sample,
    its keypoints where they are asked for, the artifact's noise, and the tensors that ``prepare`` makes. None without
    ONNX Runtime, or if it refuses a graph. Floats are FP16, and the inputs that were used are those rounded.
    """
    known: dict[str, np.ndarray] = {}
    try:
        runtime = runtimes.load("onnxruntime")
        for name, signature in graph.signatures.items():
            for spec in signature.inputs:
                if spec.name not in known:
                    known[spec.name] = _compact(_input(graph, spec))
            with tempfile.TemporaryDirectory() as scratch:
                runtime.build(graph, name, Path(scratch), {})
                with runtime.open(Path(scratch), signature, {}) as session:
                    outputs = session.run({spec.name: known[spec.name].astype(spec.dtype) for spec in signature.inputs})
            known |= {tensor: _compact(array) for tensor, array in outputs.items()}
    except BackendError:
        return None
    return known


def _input(graph: Artifact, spec: TensorSpec) -> np.ndarray:
    if spec.dtype == "uint8" or spec.name in ("pose", GIVEN_JOINTS):
        return _sample(spec, spec.shape[1:3] if spec.dtype == "uint8" else graph.config["size"])
    if spec.name == "noise" and "noise.npy" in graph.files:
        return np.asarray(np.load(graph.file("noise.npy"), allow_pickle=False))
    return np.random.default_rng(0).standard_normal(spec.shape, dtype=np.float32)


def _sample(spec: TensorSpec, shape: Sequence[int]) -> np.ndarray:
    """Photo, keypoints or pose, for pictures of ``shape``."""
    sample, size = open_splits("sample").test, (int(shape[0]), int(shape[1]))
    source, target = (int(index) for index in sample.pairs[0])
    if spec.name == "source":
        return np.asarray(sample.image(source, size)[None])
    if spec.name == GIVEN_JOINTS:
        return to_graph(sample.pose(source, size))[None]
    return pose_input(sample.pose(target, size), pose_kind(spec), size)


def _compact(array: np.ndarray) -> np.ndarray:
    """FP16 where it holds the values."""
    if array.dtype != np.float32:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.isfinite(half).all() else array
