"""torch-tensorrt: TensorRT engines made from the float student itself, ahead of time, without ONNX on the way.

The network is strongly typed: it computes in the types that the exported program names, so FP16 is written into the
program (``half_products``). Plan, record and execution are those of the ``tensorrt`` backend.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact, tool_versions
from rpfm_edge.core.errors import BackendError
from rpfm_edge.core.files import file_digest
from rpfm_edge.core.runtime import Known, LayerTime, Session
from rpfm_edge.core.signature import Feeds, Signature
from rpfm_edge.measure import canary
from runtimes import profiling
from runtimes.options import checked
from runtimes.torch_reference import STUDENT, require_student, trusted
from runtimes.trt import backend, store
from runtimes.trt.api import load as load_library
from runtimes.trt.build import MIB, Settings
from runtimes.trt.cuda import device

name = "torch-tensorrt"
DEFAULTS = {
    "precision": "fp32",
    "workspace_mib": 0,  # 0: as the library likes
    "optimization_level": 3,
    "cuda_graph": True,
    "identities": 8,  # whose tensors stay on the GPU
}
CHOICES = {"precision": ("fp32", "fp16"), "optimization_level": range(6)}
RUN_ONLY = ("cuda_graph", "identities")
MODULES = "modules"  # a function beside the factory: folder of a student → torch module by graph name
DISTRIBUTIONS = ("torch-tensorrt", "torch-tensorrt-rtx")


def build(graph: Artifact, name: str, engine: Path, options: Mapping[str, Any], known: Known | None = None) -> None:
    """Compile graph ``name`` of the student of ``graph`` into ``engine``, or take the engine from the cache, and
    compare it with ``known``. Options: ``DEFAULTS``.

    Raises:
        ConfigError: options that are unknown or out of range.
        BackendError: no student, no library, no GPU, or a module that torch-tensorrt refuses.
        ParityError: the engine computes something else than ONNX Runtime.
    """
    option = checked_options(options)
    require(graph, name)
    made = _record(graph, name, option)

    def compare() -> None:
        if known is not None:
            with open(engine, graph.signatures[name], option) as session:
                canary.check(graph, name, session, known, " ".join(f"{k} {v}" for k, v in versions().items()))

    store.make(engine, made, lambda: compile_plan(graph, name, option), compare)


@contextmanager
def open(engine: Path, signature: Signature, options: Mapping[str, Any]) -> Iterator[Session]:
    """Load the plan of ``engine`` as the ``tensorrt`` backend does, with the library that it was built with.

    One of another GPU is not built again here: that takes the student, torch and minutes.
    """
    option = checked_options(options)
    _, made = store.read(engine)
    running = {key: option[key] for key in RUN_ONLY} | {"library": made["library"], "rebuild": False}
    with backend.open(engine, signature, running) as session:
        yield session


def profile(
    engine: Path, signature: Signature, options: Mapping[str, Any], feeds: Feeds, runs: int = 30
) -> list[LayerTime]:
    """Refused: the engine comes from the student, which has no ONNX nodes."""
    profiling.refuse("torch-tensorrt", "its engine is made from the student, not from the ONNX graph")


def versions(options: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The version of torch-tensorrt, under the name of its distribution."""
    return {key: value for key, value in tool_versions(*DISTRIBUTIONS).items() if key in DISTRIBUTIONS}


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` over ``DEFAULTS``; ``ConfigError`` for what is unknown or out of range."""
    return checked("torch-tensorrt", DEFAULTS, options, CHOICES)


def require(graph: Artifact, name: str) -> None:
    """Raise unless ``graph`` has graph ``name`` and the float student that it was exported from."""
    graph.file(f"{name}.onnx")  # the same refusal of an unknown graph as everywhere
    require_student(graph, "torch-tensorrt")


def compile_plan(graph: Artifact, name: str, option: Mapping[str, Any]) -> bytes:
    """The plan of graph ``name``, for the GPU that torch-tensorrt finds; ``option``: ``checked_options``."""
    compiler, signature = library(), graph.signatures[name]
    package = graph.config["factory"].partition(":")[0]
    module = trusted(f"{package}:{MODULES}")(graph.path / STUDENT)[name]
    with half_products(module) if option["precision"] == "fp16" else nullcontext():
        program = exported(module, signature)
    import torch

    try:
        plan: bytes = compiler.dynamo.convert_exported_program_to_serialized_trt_engine(
            program,
            arg_inputs=[compiler.Input(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in signature.inputs],
            arg_input_binding_names=tuple(spec.name for spec in signature.inputs),
            output_binding_names=tuple(spec.name for spec in signature.outputs),
            workspace_size=option["workspace_mib"] * MIB,
            optimization_level=option["optimization_level"],
            disable_tf32=True,  # an engine must not change its numbers because the GPU is newer
        )
    except RuntimeError as error:
        cause = str(error).removeprefix("While interpreting the module got an error: ").partition("\n")[0]
        raise BackendError(
            f"torch-tensorrt cannot compile graph {name} ({cause})",
            expected="operations that it converts, and enough memory",
            fix="build for tensorrt instead, which starts from the ONNX graph",
        ) from error
    return plan


def exported(module: Any, signature: Signature) -> Any:
    """The ``ExportedProgram`` of a torch module, its inputs and outputs those of ``signature``."""
    import torch

    class Boundary(torch.nn.Module):  # type: ignore[misc]
        """The module without the outputs that only its exporter compares."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *feeds: Any) -> Any:
            result = self.module(*feeds)
            return result[: len(signature.outputs)] if isinstance(result, tuple) else (result,)

    example = tuple(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in signature.inputs)
    with torch.no_grad():
        return torch.export.export(Boundary().eval(), example, strict=False)


@contextmanager
def half_products(module: Any) -> Iterator[None]:
    """A context in which linear layers, convolutions and attention compute in FP16, as a GPU's matrix units do.

    Their results stay in FP16 until they meet FP32 (a concatenation stays in FP16): the residual stream, LayerNorm and
    the rounding to grey levels are in FP32, and so are the parts of ``module`` with an attribute ``single``.
    """
    import torch
    from torch.nn import functional as F
    from torch.overrides import TorchFunctionMode

    products = (F.linear, F.conv2d, F.scaled_dot_product_attention)

    def half(values: Any) -> Any:
        return type(values)(value.half() if isinstance(value, torch.Tensor) else value for value in values)

    inside: list[Any] = []  # the parts in FP32 that are running

    class HalfProducts(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if inside:
                return func(*args, **(kwargs or {}))
            if func in products:
                args = half(args)
            elif func is torch.cat and any(part.dtype == torch.float16 for part in args[0]):
                args = (half(args[0]), *args[1:])
            return func(*args, **(kwargs or {}))

    hooks = [
        hook
        for part in module.modules()
        if getattr(part, "single", False)
        for hook in (
            part.register_forward_pre_hook(lambda part, _: inside.append(part)),
            part.register_forward_hook(lambda *_: inside.clear()),
        )
    ]
    try:
        with HalfProducts():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@cache
def library() -> Any:
    """torch-tensorrt, imported; raises ``BackendError`` where there is no GPU."""
    logging.getLogger("torch_tensorrt").setLevel(logging.CRITICAL)  # it logs the trace of what it raises as well
    try:
        import torch_tensorrt
    except (ImportError, OSError, RuntimeError, AssertionError) as error:  # it asks for a GPU when it is imported
        raise BackendError(
            f"torch-tensorrt cannot be imported ({str(error).partition(chr(10))[0]})",
            expected="an NVIDIA GPU with its driver, and the package torch-tensorrt",
            fix="run: pip install 'rpfm-edge[torch-tensorrt]' on the machine with the GPU",
        ) from error
    _convert_to_uint8()
    return torch_tensorrt


def _convert_to_uint8() -> None:
    """Teach torch-tensorrt the cast to uint8, which its own converter refuses, though TensorRT takes it."""
    import torch
    from torch_tensorrt.dynamo.conversion import ConverterPriority, dynamo_tensorrt_converter, impl

    def wanted(node: Any, settings: Any) -> bool:
        return node.kwargs.get("dtype") is torch.uint8

    def converter(ctx: Any, target: Any, args: Any, kwargs: Any, name: str) -> Any:
        return impl.cast.to_copy(ctx, target, None, name, args[0], torch.uint8)

    operation = torch.ops.aten._to_copy.default
    dynamo_tensorrt_converter(operation, capability_validator=wanted, priority=ConverterPriority.HIGH)(converter)


def _record(graph: Artifact, name: str, option: Mapping[str, Any]) -> dict[str, Any]:
    """What the plan depends on, in the form of the ``tensorrt`` backend."""
    used = load_library(library().tensorrt_package_name)
    settings = Settings(workspace_mib=option["workspace_mib"], optimization_level=option["optimization_level"])
    options = {key: value for key, value in option.items() if key not in RUN_ONLY}
    student = file_digest(graph.path / STUDENT / artifact.MANIFEST)
    return store.record(used, device(), settings, f"{student} {name}", options | versions())
