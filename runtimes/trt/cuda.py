"""Memory, streams and events of a GPU, by cuda-bindings' runtime API; everything is freed by an ExitStack.

The GPU is the process's first one: choose another with CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from rpfm_edge.core.errors import BackendError
from rpfm_edge.core.extras import import_extra
from runtimes.trt import dlpack


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU: its name, compute capability "8.7", and the CUDA version of its driver, "12.6"."""

    name: str
    capability: str
    driver: str


@dataclass(frozen=True, eq=False, slots=True)
class DeviceArray:
    """Memory on the GPU that torch, CuPy, Numba and JAX can take without a copy: CUDA array interface 3, and DLPack.

    It is the session's, and valid as long as that is open.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "data": (self.pointer, False),
            "shape": self.shape,
            "typestr": np.dtype(self.dtype).str,
            "strides": None,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, 0

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule; ``stream`` need not wait, since what a session hands out is complete."""
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("only the memory itself, on its own GPU")  # as the protocol wants it
        return dlpack.capsule(self.pointer, self.shape, self.dtype, self.__dlpack_device__(), self)


class Cuda:
    """cuda-bindings with errors raised; what it makes lives until ``resources`` is closed."""

    def __init__(self, resources: ExitStack) -> None:
        self.api = runtime_api()
        self.resources = resources

    def call(self, name: str, *arguments: Any) -> Any:
        """``cudaName(*arguments)``: its value or None; raises ``BackendError``."""
        return checked_call(self.api, name, *arguments)

    def free(self, name: str, handle: Any) -> None:
        """Give ``handle`` back; an error here would only hide the one that broke the GPU's context before."""
        getattr(self.api, name)(handle)

    def device_array(self, shape: tuple[int, ...], dtype: str, own: ExitStack | None = None) -> DeviceArray:
        """Uninitialised memory on the GPU, freed with ``own`` if that is given."""
        array = DeviceArray(0, shape, dtype)
        pointer = int(self.call("cudaMalloc", array.nbytes))
        (own or self.resources).callback(self.free, "cudaFree", pointer)
        return DeviceArray(pointer, shape, dtype)

    def pinned(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Uninitialised host memory that the GPU copies from and to without waiting for the CPU."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pointer = int(self.call("cudaHostAlloc", size, self.api.cudaHostAllocDefault))
        self.resources.callback(self.free, "cudaFreeHost", pointer)
        return np.ndarray(shape, dtype, memoryview((ctypes.c_char * size).from_address(pointer)))

    def stream(self) -> Any:
        stream = self.call("cudaStreamCreateWithFlags", self.api.cudaStreamNonBlocking)
        self.resources.callback(self.free, "cudaStreamDestroy", stream)
        return stream

    def event(self) -> Any:
        event = self.call("cudaEventCreateWithFlags", self.api.cudaEventDisableTiming)
        self.resources.callback(self.free, "cudaEventDestroy", event)
        return event

    def copy(self, to: int, source: int, size: int, stream: Any) -> None:
        """Copy bytes between any two places, in the order of ``stream``."""
        self.call("cudaMemcpyAsync", to, source, size, self.api.cudaMemcpyKind.cudaMemcpyDefault, stream)


def runtime_api() -> Any:
    """The module ``cuda.bindings.runtime``."""
    return import_extra("cuda.bindings.runtime", "tensorrt")


def checked_call(api: Any, name: str, *arguments: Any) -> Any:
    """Call a function of the runtime API; raises ``BackendError`` with CUDA's own words."""
    error, *values = getattr(api, name)(*arguments)
    if error != api.cudaError_t.cudaSuccess:
        _, text = api.cudaGetErrorString(error)
        memory = error == api.cudaError_t.cudaErrorMemoryAllocation
        raise BackendError(
            f"{name} failed ({text.decode() if isinstance(text, bytes) else text})",
            expected="enough free GPU memory" if memory else "a working GPU",
            fix="close other programs on the GPU" if memory else "check it with nvidia-smi (Jetson: tegrastats)",
        )
    return values[0] if values else None


def device() -> Device:
    """The GPU at hand; raises ``BackendError`` where there is none or its driver is missing or too old."""
    api = runtime_api()
    error, count = api.cudaGetDeviceCount()
    if error != api.cudaError_t.cudaSuccess or not count:
        _, text = api.cudaGetErrorString(error)
        raise BackendError(
            f"no NVIDIA GPU can be used ({text.decode() if count is None else 'none found'})",
            expected="a GPU with a driver as new as the package cuda-bindings",
            fix="run on the device, update its driver, or install the cuda-bindings of its CUDA version",
        )
    kinds = api.cudaDeviceAttr
    major, minor = (
        checked_call(api, "cudaDeviceGetAttribute", kind, 0)
        for kind in (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
    )
    name = checked_call(api, "cudaGetDeviceProperties", 0).name
    driver = int(checked_call(api, "cudaDriverGetVersion"))
    label = name.split(b"\0")[0].decode() if isinstance(name, bytes) else str(name)
    return Device(label, f"{major}.{minor}", f"{driver // 1000}.{driver % 1000 // 10}")
