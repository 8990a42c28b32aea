"""The TensorRT libraries: which one is here, and what differs between them. They share one API, by the same names.

``tensorrt`` (8.6, 10, 11; what JetPack brings) and ``tensorrt_rtx`` (RTX GPUs) build and run; ``tensorrt_lean`` and
``tensorrt_dispatch`` only run engines that were built version compatible.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rpfm_edge.core.backends import BACKENDS
from rpfm_edge.core.errors import BackendError

LIBRARIES = BACKENDS["tensorrt"].libraries  # in order of preference
INSTALL = (
    "install one: TensorRT comes with JetPack; elsewhere run: pip install 'rpfm-edge[tensorrt]', or "
    "'rpfm-edge[tensorrt-rtx]' for RTX GPUs"
)


@dataclass(frozen=True, slots=True)
class Library:
    """One of the libraries, and the table of what differs: read from its names, so that it holds for later versions.

    Attributes:
        module: the Python module.
        name: its name.
        version: its version, "10.3.0".
        builds: it has a builder and a parser (lean and dispatch have not).
        network_flags: of a network that computes in the types its graph names.
        precision_flags: builder flags that allow FP16 and INT8 where networks cannot be strongly typed (8.6).
        parses_opset_20: Gelu and INT8 weights as initializers (8.6 has neither).
        times_tactics: it measures kernels while it builds, so a timing cache helps (RTX compiles them on the device).
        targets: GPUs that it builds for on another machine, by compute capability, "8.6" → its own name for it.
        hardware_levels: for which an engine fits other GPUs too, "ampere_plus" and later ones.
        portable: an engine fits every GPU of its compute capability and every driver (RTX).
    """

    module: Any
    name: str
    version: str
    builds: bool
    network_flags: tuple[str, ...]
    precision_flags: tuple[str, ...]
    parses_opset_20: bool
    times_tactics: bool
    targets: dict[str, str]
    hardware_levels: tuple[str, ...]
    portable: bool


def describe(module: Any) -> Library:
    """The table's row of an imported library."""
    creation, flags = _names(module, "NetworkDefinitionCreationFlag"), _names(module, "BuilderFlag")
    typed = "STRONGLY_TYPED" in creation or "FP16" not in flags  # TensorRT 11 has dropped the flags of 8 and 10
    wanted = "STRONGLY_TYPED" if typed else "EXPLICIT_BATCH"
    levels = _names(module, "HardwareCompatibilityLevel")
    crosses = hasattr(getattr(module, "IBuilderConfig", None), "set_compute_capability")
    known = [name for name in _names(module, "ComputeCapability") if crosses and name.startswith("SM")]
    targets = {_capability(name): name for name in known}
    return Library(
        module=module,
        name=module.__name__,
        version=str(module.__version__),
        builds=hasattr(module, "Builder") and hasattr(module, "OnnxParser"),
        network_flags=(wanted,) if wanted in creation else (),
        precision_flags=() if typed else ("FP16", "INT8", "PREFER_PRECISION_CONSTRAINTS"),
        parses_opset_20=typed,
        times_tactics=not targets,
        targets=targets,
        hardware_levels=() if targets else tuple(level.lower() for level in levels if level != "NONE"),
        portable=bool(targets),
    )


def load(name: str = "auto") -> Library:
    """Import library ``name``, or with "auto" the first of ``LIBRARIES`` that is installed.

    Raises:
        BackendError: none is installed, it cannot be imported, or it is older than 8.6.
    """
    names = [one for one in (LIBRARIES if name == "auto" else (name,)) if find_spec(one)]
    if not names:
        wanted = " or ".join(LIBRARIES[:2]) if name == "auto" else name
        raise BackendError("TensorRT is not installed", expected=f"the package {wanted}", fix=INSTALL)
    try:
        module = import_module(names[0])
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a library of another CUDA version, a stub
        raise BackendError(
            f"{names[0]} cannot be imported ({str(error) or type(error).__name__})",
            expected="a TensorRT that fits this machine's CUDA",
            fix=INSTALL,
        ) from error
    version = str(getattr(module, "__version__", "unknown"))
    context = getattr(module, "IExecutionContext", None)
    if not hasattr(context, "execute_async_v3") or not hasattr(getattr(module, "DataType", None), "UINT8"):
        raise BackendError(f"{names[0]} {version} is too old", expected="TensorRT 8.6 or later", fix="update it")
    return describe(module)


def _names(module: Any, enumeration: str) -> list[str]:
    return list(getattr(getattr(module, enumeration, None), "__members__", ()))


def _capability(name: str) -> str:
    """SM86 → 8.6, SM120 → 12.0."""
    digits = name.removeprefix("SM")
    return f"{digits[:-1]}.{digits[-1]}"
