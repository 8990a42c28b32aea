"""ONNX → TensorRT plan. Precision is what the graph says, in a strongly typed network wherever the library has them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpfm_edge.core.errors import BackendError, ConfigError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.core.files import write_bytes
from rpfm_edge.core.precisions import ROWS
from rpfm_edge.core.progress import Advance, progress
from rpfm_edge.core.source_map import exact_nodes
from runtimes.trt.api import Library

MIB = 2**20
FP32_LAYERS = ("NORMALIZATION", "SOFTMAX")  # on 8.6, which would sum in FP16 there

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a plan is built: the options of the backend that change it.

    Attributes:
        targets: compute capabilities, "8.6", of other machines; empty for the GPU at hand.
        workspace_mib: limit of the builder's scratch memory; 0 is the library's own.
        optimization_level: 0 to 5; lower builds faster, 3 is the library's own.
        version_compatible: the plan runs on later versions of the same major one, and on lean and dispatch.
        hardware_compatible: "no", "ampere_plus" or "same_compute_capability".
    """

    targets: tuple[str, ...] = ()
    workspace_mib: int = 0
    optimization_level: int = 3
    version_compatible: bool = False
    hardware_compatible: str = "no"


def build_plan(
    library: Library, graph: Path, settings: Settings, timing: Path | None = None, log: Log | None = None
) -> bytes:
    """The plan of an ONNX file.

    Args:
        timing: file of the timing cache, read and written where the library has one.
        log: takes every line of the builder's verbose log, which then lists each layer with its types.

    Raises:
        BackendError: the library cannot build, refuses the graph, or runs out of memory.
        ConfigError: a target or a compatibility that the library lacks.
    """
    if not library.builds:
        raise BackendError(
            f"{library.name} only runs engines", expected="tensorrt or tensorrt_rtx", fix="build where one is installed"
        )
    trt, logger = library.module, _logger(library.module, log)
    builder = start(trt.Builder, library, logger)
    network = builder.create_network(_bits(trt.NetworkDefinitionCreationFlag, library.network_flags))
    parser = trt.OnnxParser(network, logger)
    _parse(parser, network, library, graph)
    config = _config(library, builder, settings, detailed=log is not None)
    _allow_precisions(library, network, config, graph)
    cache = _timing_cache(library, config, timing)
    with progress(f"building {graph.stem}", 1) as advance:
        monitor = _monitor(trt, advance)
        if monitor is not None:
            config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise BackendError(
            f"{library.name} {library.version} cannot build {graph} ({_reason(logger.last)})",
            expected="a graph that it supports and enough memory",
            fix="close other programs, lower workspace_mib, or quantize another way",
        )
    if timing and cache is not None:
        write_bytes(timing, bytes(cache.serialize()))
    return bytes(plan)


def require_precision(library: Library, precision: str) -> None:
    """Raise ``BackendError`` unless ``library`` builds graphs in ``precision``, by strongly typed networks."""
    row = ROWS[precision]
    if row.tensorrt and (library.precision_flags or not hasattr(library.module.DataType, row.data_type)):
        raise BackendError(
            f"{library.name} {library.version} does not build {precision}",
            expected=row.tensorrt,
            fix="update it, or quantize to int8 or fp16",
        )


def _parse(parser: Any, network: Any, library: Library, graph: Path) -> None:
    if library.parses_opset_20:
        parsed = parser.parse_from_file(str(graph))
    else:
        from runtimes.trt.legacy import legacy_bytes

        parsed = parser.parse(legacy_bytes(graph), str(graph))
    if not parsed or not network.num_outputs:  # an empty file is no error to the parser
        raise BackendError(
            f"{library.name} {library.version} cannot parse {graph} ({parser_cause(parser)})",
            expected="an ONNX graph that it supports",
            fix="export it again, or update TensorRT",
        )


def parser_cause(parser: Any) -> str:
    """The first error of a parser in one line: the node, and the reason without places in TensorRT's sources."""
    if not parser.num_errors:
        return "it has no outputs"
    error = parser.get_error(0)
    node = error.node_name() if hasattr(error, "node_name") else f"number {error.node()}"
    kind = error.node_operator() if hasattr(error, "node_operator") else ""
    place = f"node {node}{f' of type {kind}' if kind else ''}: " if node else ""
    return place + _reason(str(error.desc()))


def _reason(text: str) -> str:
    """The first line of a message, or what follows its first error code, without places in TensorRT's sources."""
    inner = re.search(r"Error Code \d+: [\w ]+ \((?:\S+: )?(.*?)(?:\. In \w+ at .*)?\)$", text, re.MULTILINE)
    return (inner.group(1) if inner else text.strip().partition("\n")[0]).strip() or "no reason given"


def _config(library: Library, builder: Any, settings: Settings, detailed: bool) -> Any:
    trt, config = library.module, builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "TF32"):  # an engine must not change its numbers because the GPU is newer
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib * MIB)
    config.builder_optimization_level = settings.optimization_level
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible != "no":
        if settings.hardware_compatible not in library.hardware_levels:
            raise ConfigError(
                f"{library.name} {library.version} has no hardware compatibility {settings.hardware_compatible}",
                expected=f"one of {['no', *library.hardware_levels]}",
                fix="choose one of them",
            )
        level = settings.hardware_compatible.upper()
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _set_targets(library, config, settings.targets)
    return config


def _set_targets(library: Library, config: Any, targets: tuple[str, ...]) -> None:
    for target in targets:
        if target not in library.targets:
            raise ConfigError(
                f"{library.name} {library.version} cannot build for compute capability {target} from elsewhere",
                expected=f"one of {list(library.targets)}" if library.targets else "no compute_capability",
                fix="build on the device itself" if not library.targets else "choose one of them",
            )
    if targets:
        config.num_compute_capabilities = len(targets)
        for place, target in enumerate(targets):
            config.set_compute_capability(getattr(library.module.ComputeCapability, library.targets[target]), place)


def start(kind: Any, library: Library, logger: Any) -> Any:
    """A builder or a runtime; raises ``BackendError`` where the library does not come up, as on a broken GPU."""
    try:
        return kind(logger)
    except TypeError as error:  # what a null pointer becomes
        raise BackendError(
            f"{library.name} {library.version} cannot start ({error})",
            expected="a GPU with a driver as new as the library, and free memory",
            fix="check it with nvidia-smi (Jetson: tegrastats)",
        ) from error


def _allow_precisions(library: Library, network: Any, config: Any, graph: Path) -> None:
    """On 8.6, allow the precisions that the graph has, and keep norms, softmax and the source's map in FP32.

    Later versions read both from the graph.
    """
    if not library.precision_flags:
        return
    trt = library.module
    layers = [network.get_layer(place) for place in range(network.num_layers)]
    quantized = any(layer.type.name == "QUANTIZE" for layer in layers)
    half = quantized or any(layer.get_output(0).dtype == trt.float16 for layer in layers)
    for flag in library.precision_flags:
        if quantized if flag == "INT8" else half:
            config.set_flag(getattr(trt.BuilderFlag, flag))
    exact = exact_nodes(import_extra("onnx", "tensorrt-8").load(graph, load_external_data=False)) if half else ()
    for layer in layers:
        if layer.type.name in FP32_LAYERS or layer.name in exact:
            layer.precision = trt.float32


def _timing_cache(library: Library, config: Any, timing: Path | None) -> Any:
    if not timing or not library.times_tactics:
        return None
    known = timing.read_bytes() if timing.is_file() else b""
    cache = config.create_timing_cache(known) or config.create_timing_cache(b"")  # a damaged file starts anew
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _bits(enumeration: Any, names: tuple[str, ...]) -> int:
    return sum(1 << int(getattr(enumeration, name)) for name in names)


def _logger(trt: Any, log: Log | None) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the last error, and passes everything on to ``log``."""

        last = ""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = message
            if log:
                log(message)

    return Logger()


def _monitor(trt: Any, advance: Advance) -> Any:
    """A progress monitor that moves the bar through the outermost phase and can be interrupted; None before 10."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.interrupted = False

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if not parent:
                self.steps[name] = max(steps, 1)

        def phase_finish(self, name: str) -> None:
            self.step_complete(name, self.steps.get(name, 0) - 1)

        def step_complete(self, name: str, step: int) -> bool:
            try:
                if name in self.steps and not self.interrupted:
                    advance((step + 1) / self.steps[name], name)
            except KeyboardInterrupt:  # must not travel through the library, which stops at this answer
                self.interrupted = True
            return not self.interrupted

    return Monitor()
