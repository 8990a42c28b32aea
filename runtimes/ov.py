"""OpenVINO: Intel CPUs, GPUs and NPUs, and ARM CPUs. An engine is the graph as OpenVINO IR, compiled when opened."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13, passes

from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError
from rpfm_edge.core.runtime import Known, LayerTime, Session
from rpfm_edge.core.signature import Feeds, Signature, TensorSpec
from rpfm_edge.measure import canary
from runtimes import profiling
from runtimes.options import THREADS, checked
from runtimes.session import guarded, require_signature

name = "openvino"
MODEL = "model.xml"
DEFAULTS = {
    "device": "CPU",  # or AUTO, GPU, GPU.0, NPU
    "hint": "LATENCY",
    "threads": 0,  # 0: all cores
    "precision_hint": "f32",  # arithmetic of the float layers; on CPUs with bf16 units OpenVINO's own default is bf16
}
ADDED = r"(/WithoutBiases|/DequantizationMultiply|/DequantizationSubtract|_original)$"  # to the names of ONNX nodes
NARROW = ("i4", "i8", "u8", "f16")  # types of weights that are stored as they are
CHOICES = {"threads": THREADS, "hint": ("LATENCY", "THROUGHPUT"), "precision_hint": ("f32", "bf16", "f16")}


def build(graph: Artifact, name: str, engine: Path, options: Mapping[str, Any], known: Known | None = None) -> None:
    """Convert graph ``name`` to ``model.xml`` and ``model.bin`` in ``engine``, and check that it compiles.

    Weights keep the types that they have in the graph, but the float weights of a quantized graph are stored in FP16
    (they are FP32 again once compiled). Options: ``DEFAULTS``.
    """
    source = graph.file(f"{name}.onnx")
    core = openvino.Core()
    settings = compile_settings(core, options)
    try:
        model = core.read_model(source)
    except RuntimeError as error:
        raise BackendError(
            f"OpenVINO cannot read {source} ({_cause(error)})",
            expected="an ONNX graph that it supports",
            fix="export it again",
        ) from error
    _fold(model)
    if graph.config.get("precision", "fp32") != "fp32":
        _halve_weights(model)
    try:
        openvino.save_model(model, engine / MODEL, compress_to_fp16=False)
    except RuntimeError as error:  # a full disk, most of all
        raise BackendError(
            f"OpenVINO cannot write {engine / MODEL}",
            expected="room for the model",
            fix="free some space or check the path",
        ) from error
    compiled = _compile(core, model, source, settings)
    require_signature(source, _signature(compiled, graph.signatures[name]), graph.signatures[name])
    if known:
        hint = options.get("precision_hint", DEFAULTS["precision_hint"])
        with open(engine, graph.signatures[name], options) as session:
            library = f"openvino {openvino.__version__}"
            canary.check(graph, name, session, known, library, canary.BF16_DB if hint == "bf16" else None)


@contextmanager
def open(engine: Path, signature: Signature, options: Mapping[str, Any]) -> Iterator[Session]:
    """Compile the IR of ``engine``. OpenVINO's own cache is not used: it loads what was damaged, and grows for ever.

    A writeable, C-contiguous input is read where it lies, during ``run`` only, so changing it between runs is safe; it
    is kept alive until another array takes its place. Any other input is copied in every ``run``.
    """
    core = openvino.Core()
    _, compiled = _load(core, engine / MODEL, signature, compile_settings(core, options))
    with guarded("openvino", signature, _Request(compiled, signature)) as session:
        yield session


def profile(
    engine: Path, signature: Signature, options: Mapping[str, Any], feeds: Feeds, runs: int = 30
) -> list[LayerTime]:
    """Layer times by OpenVINO's counters. Of a fused kernel, ``names`` has every node.

    Names of OpenVINO's own, "MVN_306", stand for nodes that it divides when it reads the graph.
    """
    profiling.require(signature, feeds, runs)
    core = openvino.Core()
    device, properties = compile_settings(core, options)
    model, compiled = _load(core, engine / MODEL, signature, (device, {**properties, "PERF_COUNT": True}))
    known = {_node(operation.get_friendly_name()) for operation in model.get_ordered_ops()}
    names = {
        operation.get_friendly_name(): _nodes(operation.get_rt_info(), known)
        for operation in compiled.get_runtime_model().get_ordered_ops()
    }
    request = _Request(compiled, signature)
    rounds = [request.counters(feeds) for _ in range(profiling.WARM_UP + runs)]
    status = openvino.ProfilingInfo.Status.EXECUTED  # not given to a kernel when it took less than a microsecond
    executed = {layer.node_name for layers in rounds for layer in layers if layer.status == status}
    return profiling.medians(
        (layer.node_name, names.get(layer.node_name, ()), layer.exec_type, layer.real_time.total_seconds())
        for layers in rounds
        for layer in layers
        if layer.node_name in executed
    )


def versions(options: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The version of OpenVINO."""
    return {"openvino": openvino.__version__}


def devices() -> dict[str, str]:
    """Device name ("CPU", "GPU.0") → full name, of every device that OpenVINO finds."""
    core = openvino.Core()
    return {device: str(core.get_property(device, "FULL_DEVICE_NAME")) for device in core.available_devices}


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` over ``DEFAULTS``; ``ConfigError`` for what is unknown, out of range or does not fit the device."""
    option = checked("openvino", DEFAULTS, options, CHOICES)
    if option["threads"] and option["device"] != "CPU":
        raise ConfigError(
            f"openvino option threads is {option['threads']} on {option['device']}",
            expected="threads for device CPU only",
            fix="leave threads out",
        )
    return option


def compile_settings(core: openvino.Core, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Device and properties for ``Core.compile_model``: the one place where options become OpenVINO's settings.

    Raises:
        ConfigError: an option that is unknown or does not fit the device.
        BackendError: the device is not in this machine.
    """
    option = checked_options(options)
    device, found = option["device"], core.available_devices
    if device != "AUTO" and device not in {*found, *(one.split(".")[0] for one in found)}:
        raise BackendError(
            f"OpenVINO finds no device {device}",
            expected=f"AUTO or one of {found}",
            fix="choose one, or install its driver",
        )
    settings = {"PERFORMANCE_HINT": option["hint"], "INFERENCE_PRECISION_HINT": option["precision_hint"]}
    if option["threads"]:
        settings["INFERENCE_NUM_THREADS"] = option["threads"]
    return device, settings


class _Request:
    """One inference request over numpy memory that stays put, so that a run costs little beside the graph itself."""

    def __init__(self, compiled: openvino.CompiledModel, signature: Signature) -> None:
        self._request = compiled.create_infer_request()
        self._buffers = {spec.name: np.empty(spec.shape, spec.dtype) for spec in signature.inputs}
        self._outputs = {spec.name: np.empty(spec.shape, spec.dtype) for spec in signature.outputs}
        self._bound: dict[str, np.ndarray] = {}
        for tensor, array in (*self._buffers.items(), *self._outputs.items()):
            self._bind(tensor, array)

    def __call__(self, feeds: Feeds) -> dict[str, np.ndarray]:
        for tensor, array in feeds.items():
            if not (array.flags.c_contiguous and array.flags.writeable):  # OpenVINO cannot share these
                np.copyto(self._buffers[tensor], array)
                array = self._buffers[tensor]
            if self._bound[tensor] is not array:
                self._bind(tensor, array)
        self._request.infer(share_outputs=True)
        return {tensor: array.copy() for tensor, array in self._outputs.items()}

    def counters(self, feeds: Feeds) -> list[Any]:
        """Run, and return OpenVINO's ``ProfilingInfo`` of every layer."""
        self(feeds)
        return list(self._request.get_profiling_info())

    def _bind(self, tensor: str, array: np.ndarray) -> None:
        self._request.set_tensor(tensor, openvino.Tensor(array, shared_memory=True))
        self._bound[tensor] = array


def _load(
    core: openvino.Core, path: Path, signature: Signature, settings: tuple[str, dict[str, Any]]
) -> tuple[openvino.Model, openvino.CompiledModel]:
    """The IR at ``path``, and what it compiles to."""
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path} is missing or damaged ({_cause(error)})",
            expected="the IR that was built",
            fix="copy the bundle again or build the engine again",
        ) from error
    compiled = _compile(core, model, path, settings)
    require_signature(path, _signature(compiled, signature), signature)
    return model, compiled


def _nodes(info: Mapping[str, Any], known: Collection[str]) -> tuple[str, ...]:
    """ONNX nodes that a layer of a compiled model was made from; names that only its passes gave are left out."""
    if "originalLayersNames" not in info:
        return ()
    listed = [_node(name) for name in str(info["originalLayersNames"].value).split(",")]
    return tuple(dict.fromkeys(name for name in listed if name in known))


def _fold(model: openvino.Model) -> None:
    """Compute what depends on no input, such as shapes, and drop zero points of 0: a third of a quantized graph.

    Weights in types other than FP32 are hidden meanwhile, or they would become FP32.
    """
    weights = [
        constant
        for constant in model.get_ops()
        if constant.get_type_name() == "Constant"
        and constant.get_element_type().get_type_name() in NARROW
        and len(constant.get_output_shape(0)) > 1
    ]
    hidden = [opset13.parameter(weight.get_output_shape(0), weight.get_element_type()) for weight in weights]
    for weight, parameter in zip(weights, hidden, strict=True):
        _replace(weight, parameter)
    model.add_parameters(hidden)
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(model)
    for weight, parameter in zip(weights, hidden, strict=True):
        _replace(parameter, weight)
        model.remove_parameter(parameter)
    for operation in model.get_ordered_ops():
        if operation.get_type_name() == "Subtract":
            zero = operation.input_value(1).get_node()
            if zero.get_type_name() == "Constant" and not zero.data.any():
                operation.output(0).replace(operation.input_value(0))


def _replace(old: openvino.Node, new: openvino.Node) -> None:
    for target in old.output(0).get_target_inputs():
        target.replace_source_output(new.output(0))


def _halve_weights(model: openvino.Model) -> None:
    """Store FP32 matrices, kernels and tables in FP16; scales and biases are small, and stay.

    ``save_model`` would do this for a graph without INT8 weights only.
    """
    for constant in model.get_ops():
        if constant.get_type_name() != "Constant" or constant.get_element_type() != openvino.Type.f32:
            continue
        flat = sum(size > 1 for size in constant.get_output_shape(0)) < 2
        if flat or np.abs(constant.data).max() > np.finfo(np.float16).max:
            continue
        whole = opset13.convert(opset13.constant(constant.data.astype(np.float16)), "f32")
        _replace(constant, whole)


def _node(name: str) -> str:
    """The ONNX node's name without what OpenVINO puts behind it when one node becomes several operations."""
    while (short := re.sub(ADDED, "", name)) != name:
        name = short
    return name


def _compile(
    core: openvino.Core, model: openvino.Model, path: Path, settings: tuple[str, dict[str, Any]]
) -> openvino.CompiledModel:
    device, properties = settings
    try:
        return core.compile_model(model, device, properties)
    except RuntimeError as error:
        raise BackendError(
            f"OpenVINO cannot compile {path} for {device} ({_cause(error)})",
            expected=f"a graph and options that {device} supports",
            fix="choose another device or precision_hint, or quantize another way",
        ) from error


def _signature(compiled: openvino.CompiledModel, expected: Signature) -> Signature:
    """The boundary of a compiled model. A tensor may have several names: the expected one is taken if it is there."""

    def specs(ports: list[Any], known: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        names = {spec.name for spec in known}
        return tuple(
            TensorSpec(
                next(iter(sorted(port.get_names() & names) or sorted(port.get_names()))),
                tuple(port.partial_shape.get_max_shape()),
                np.dtype(port.element_type.to_dtype()).name,
            )
            for port in ports
        )

    return Signature(specs(compiled.inputs, expected.inputs), specs(compiled.outputs, expected.outputs))


def _cause(error: RuntimeError) -> str:
    """OpenVINO's own words: the last line of its message that is not a place in its sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (said or lines or ["no reason given"])[-1]
