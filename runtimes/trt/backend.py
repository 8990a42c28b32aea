"""TensorRT: NVIDIA GPUs, Jetson and desktop. An engine is a plan and the record of the one place that it fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError, warn
from rpfm_edge.core.files import json_digest
from rpfm_edge.core.precisions import require_gpus
from rpfm_edge.core.runtime import Known, LayerTime
from rpfm_edge.core.signature import Feeds, Signature, TensorSpec
from rpfm_edge.measure import canary
from runtimes import profiling
from runtimes.options import checked
from runtimes.session import require_signature
from runtimes.trt import store
from runtimes.trt.api import LIBRARIES, Library
from runtimes.trt.api import load as load_library
from runtimes.trt.build import Settings, build_plan, require_precision, start
from runtimes.trt.cuda import Device, device
from runtimes.trt.profile import layer_times
from runtimes.trt.run import TensorRTSession

name = "tensorrt"
DEFAULTS = {
    "library": "auto",
    "device": "GPU",
    "compute_capability": "",  # "8.6" or "8.6 8.9": build for these GPUs on any machine; tensorrt_rtx only
    "workspace_mib": 0,  # 0: as the library likes
    "optimization_level": 3,
    "version_compatible": False,
    "hardware_compatible": "no",
    "cuda_graph": True,
    "identities": 8,  # whose tensors stay on the GPU
    "rebuild": True,  # an engine of another GPU, driver or version, from the bundle's graph into the user's cache
}
NOISE = 1  # the bundle's, which stays on the GPU beside the identities
FREE = ("pose", "noise")  # inputs of a frame that belong to no identity
CHOICES = {
    "library": ("auto", *LIBRARIES),
    "device": ("GPU", "DLA"),
    "optimization_level": range(6),
    "hardware_compatible": ("no", "ampere_plus", "same_compute_capability"),
}
# Options that do not change a plan, or that its record tells anyway.
RUN_ONLY = ("library", "device", "compute_capability", "cuda_graph", "identities", "rebuild")


def build(graph: Artifact, name: str, engine: Path, options: Mapping[str, Any], known: Known | None = None) -> None:
    """Build graph ``name`` into ``engine``, or take the engine from the cache, and compare it with ``known``.

    INT8 graphs come in FP16 and INT8 where the artifact has that form. An engine for other GPUs
    (``compute_capability``) cannot be compared here. Options: ``DEFAULTS``.

    Raises:
        ConfigError: options that are unknown or exclude each other, or a GPU that lacks the precision of the graph.
        BackendError: no library, one that lacks the precision, no GPU, a graph that TensorRT refuses, or too little
            memory.
        ParityError: the engine computes something else than ONNX Runtime.
    """
    option = checked_options(options)
    library, settings = load_library(option["library"]), _settings(option)
    source = graph_file(graph, name, library)
    precision = str(graph.config.get("precision", "fp32"))
    require_precision(library, precision)
    here = None if settings.targets else device()
    require_gpus(precision, (here.capability,) if here else settings.targets)
    record = _record(graph, name, option, library, here)
    compare = partial(_compare, graph, name, engine, option, library, known) if here else None
    store.make(engine, record, lambda: build_plan(library, source, settings, store.timing_file(library, here)), compare)


@contextmanager
def open(engine: Path, signature: Signature, options: Mapping[str, Any]) -> Iterator[TensorRTSession]:
    """Load the plan of ``engine`` on the GPU at hand.

    One that was built for another GPU, driver or library is built again, once, from the graph that its bundle carries,
    where this library can build and the option ``rebuild`` is set; the bundle stays as it is.
    """
    option = checked_options(options)
    plan, record = store.read(engine)
    library, here = load_library(option["library"]), device()
    try:
        store.require_fit(engine, record, library, here)
    except BackendError:
        bundle = store.bundle_of(engine)
        if not (option["rebuild"] and library.builds and bundle):
            raise
        plan, record = _rebuilt(bundle, engine, option, library, here)
    with ExitStack() as resources:
        loaded = _deserialize(library, plan, engine, resources, bool(record["options"].get("version_compatible")))
        require_signature(engine / store.PLAN, _signature(library, loaded), signature)
        prepared = max(len(signature.inputs) - len(FREE), 1)  # tensors of an identity
        kept = max(option["identities"], 1) * prepared + NOISE
        session = TensorRTSession(library, loaded, signature, resources, kept, option["cuda_graph"])
        try:
            yield session
        finally:
            session.close()
            del loaded  # before the runtime that made it


def profile(
    engine: Path, signature: Signature, options: Mapping[str, Any], feeds: Feeds, runs: int = 30
) -> list[LayerTime]:
    """Layer times by TensorRT's profiler, without a CUDA graph. ``names`` are those that TensorRT's layers bear."""
    profiling.require(signature, feeds, runs)
    option = checked_options(options)
    with open(engine, signature, {**option, "cuda_graph": False}) as session:
        return layer_times(load_library(option["library"]), session, feeds, runs)


def versions(options: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The version of the library that ``options`` name, or else of the one that is taken by default."""
    library = load_library(checked_options(options or {})["library"])
    return {library.name: library.version}


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` over ``DEFAULTS``; ``ConfigError`` for what is unknown, out of range or cannot work."""
    option = checked("tensorrt", DEFAULTS, options, CHOICES)
    if option["device"] == "DLA":
        raise ConfigError(
            "tensorrt option device is 'DLA'",
            expected="'GPU', because a DLA multiplies by constants only, and attention multiplies two activations",
            fix="leave device out",
        )
    return option


def graph_file(graph: Artifact, name: str, library: Library) -> Path:
    """The ONNX file to build from: FP16 and INT8 (``typed/``) where there is one and the library is strongly typed."""
    typed = f"typed/{name}.onnx"
    return graph.file(typed if typed in graph.files and not library.precision_flags else f"{name}.onnx")


def graph_digest(graph: Artifact, file: Path) -> str:
    """sha256 over an ONNX file and the external data beside it."""
    name = file.relative_to(graph.path).as_posix()
    return json_digest({n: sha for n, sha in graph.files.items() if n.startswith(name)})


def _rebuilt(
    bundle: Path, engine: Path, option: Mapping[str, Any], library: Library, here: Device
) -> tuple[bytes, dict[str, Any]]:
    """Plan and record of ``engine`` for the GPU at hand: from the cache, or built now and compared with the canary."""
    option = {**option, "compute_capability": ""}  # of other machines
    graph = artifact.load(bundle, "bundle", verify=False)
    record = _record(graph, engine.name, option, library, here)
    if plan := store.cached(record):
        return plan, record
    warn(f"{engine} is of another GPU, driver or version of TensorRT; building it again, into the cache")
    with TemporaryDirectory() as folder:
        build(graph, engine.name, Path(folder), option, canary.read(graph))
        return store.read(Path(folder))


def _record(
    graph: Artifact, name: str, option: Mapping[str, Any], library: Library, here: Device | None
) -> dict[str, Any]:
    digest = graph_digest(graph, graph_file(graph, name, library))
    return store.record(library, here, _settings(option), digest, _build_options(option))


def _settings(option: Mapping[str, Any]) -> Settings:
    return Settings(
        targets=tuple(option["compute_capability"].replace(",", " ").split()),
        workspace_mib=option["workspace_mib"],
        optimization_level=option["optimization_level"],
        version_compatible=option["version_compatible"],
        hardware_compatible=option["hardware_compatible"],
    )


def _build_options(option: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in option.items() if key not in RUN_ONLY}


def _compare(
    graph: Artifact, name: str, engine: Path, option: Mapping[str, Any], library: Library, known: Known | None
) -> None:
    if known is None:
        warn(f"engine {name} was not compared, because the bundle has no canary and ONNX Runtime is not here")
        return
    with open(engine, graph.signatures[name], option) as session:
        canary.check(graph, name, session, known, f"{library.name} {library.version}")


@cache
def _logger(module: Any) -> Any:
    """The logger of all runtimes of a library, which keeps the first one's address however many are made."""
    return module.Logger(module.Logger.ERROR)


def _deserialize(library: Library, plan: bytes, engine: Path, resources: ExitStack, with_code: bool) -> Any:
    runtime = start(library.module.Runtime, library, _logger(library.module))
    resources.callback(lambda kept: None, runtime)  # an engine needs it, and does not keep it
    if with_code:  # a version-compatible plan carries a runtime of its own
        runtime.engine_host_code_allowed = True
    loaded = runtime.deserialize_cuda_engine(plan)
    if loaded is None:
        raise ArtifactError(
            f"{library.name} {library.version} cannot load {engine / store.PLAN}",
            expected="an engine of this version for this GPU, and enough memory",
            fix=store.rebuild(engine),
        )
    return loaded


def _signature(library: Library, engine: Any) -> Signature:
    trt = library.module
    sides: dict[bool, list[TensorSpec]] = {True: [], False: []}
    for place in range(engine.num_io_tensors):
        tensor = engine.get_tensor_name(place)
        spec = TensorSpec(
            tensor, tuple(engine.get_tensor_shape(tensor)), np.dtype(trt.nptype(engine.get_tensor_dtype(tensor))).name
        )
        sides[engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT].append(spec)
    return Signature(tuple(sides[True]), tuple(sides[False]))
