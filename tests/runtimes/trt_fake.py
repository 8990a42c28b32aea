"""Stand-ins for a GPU: CUDA's runtime API over host memory, and an engine that calls a Python function.

They show that the right bytes are in the right buffers when an engine runs, that nothing is freed twice or leaked, and
that no frame is overwritten before it was fetched. They say nothing about TensorRT, about kernels, about the order of
work on a GPU (here everything happens at once, when it is asked for) or about time.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from rpfm_edge.core.signature import Signature

SUCCESS, NO_MEMORY, FAILURE = 0, 2, 999
Compute = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


class FakeCuda:
    """``cuda.bindings.runtime`` without a GPU: device memory is host memory, graphs are recordings of calls.

    Attributes:
        calls: name → how often it was called.
        alive: handles that were made and not given back.
        fail: name → the error that it reports.
    """

    cudaError_t = SimpleNamespace(cudaSuccess=SUCCESS, cudaErrorMemoryAllocation=NO_MEMORY)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking, cudaEventDisableTiming, cudaHostAllocDefault = 1, 2, 0

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.alive: dict[int, Any] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.fail: dict[str, int] = {}
        self._last = 1000

    def __getattr__(self, name: str) -> Any:
        work = {
            "Malloc": self._memory,
            "HostAlloc": lambda size, flags: self._memory(size),
            "MemcpyAsync": self._copy,
            "GraphInstantiate": lambda graph, flags: self._handle(self.alive[graph]),
            "GraphLaunch": lambda graph, stream: [step() for step in self.alive[graph]],
            "StreamBeginCapture": self._begin,
            "StreamEndCapture": self._end,
        }
        for made in ("StreamCreateWithFlags", "EventCreateWithFlags"):
            work[made] = lambda flags: self._handle(None)
        for freed in ("Free", "FreeHost", "StreamDestroy", "EventDestroy", "GraphDestroy", "GraphExecDestroy"):
            work[freed] = self.alive.__delitem__
        for nothing in ("EventRecord", "EventSynchronize", "StreamSynchronize", "StreamWaitEvent"):
            work[nothing] = lambda *handles: None
        if name.removeprefix("cuda") not in work:
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls[name] += 1
            if name == "cudaStreamEndCapture" and name in self.fail:
                self.recording = None  # the stream has left the capture in any case
            return (self.fail[name], None) if name in self.fail else (SUCCESS, work[name[4:]](*arguments))

        return call

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return SUCCESS, b"out of memory" if error == NO_MEMORY else b"unknown error"

    def _handle(self, value: Any) -> int:
        self._last += 1
        self.alive[self._last] = value
        return self._last

    def _memory(self, size: int) -> int:
        block = (ctypes.c_byte * size)()
        self.alive[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _copy(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        self.do(lambda: ctypes.memmove(to, source, size))

    def do(self, step: Callable[[], Any]) -> None:
        """Do ``step`` now, or record it for the graph that is being captured."""
        if self.recording is None:
            step()
        else:
            self.recording.append(step)

    def _begin(self, stream: int, mode: int) -> None:
        self.recording = []

    def _end(self, stream: int) -> int:
        steps, self.recording = self.recording, None
        return self._handle(steps)


class FakeEngine:
    """A deserialized engine with the tensors of ``signature`` that computes ``compute``."""

    def __init__(self, cuda: FakeCuda, signature: Signature, compute: Compute) -> None:
        self.cuda, self.signature, self.compute = cuda, signature, compute
        self.contexts: list[FakeContext] = []

    def create_execution_context(self) -> FakeContext:
        self.contexts.append(FakeContext(self))
        return self.contexts[-1]


class FakeContext:
    """An execution context; ``addresses`` counts how often each tensor was given its address."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.pointers: dict[str, int] = {}
        self.addresses: Counter[str] = Counter()

    def set_tensor_address(self, name: str, pointer: int) -> None:
        self.pointers[name] = pointer
        self.addresses[name] += 1

    def execute_async_v3(self, stream: int) -> bool:
        self.engine.cuda.do(self._execute)
        return True

    def _execute(self) -> None:
        signature = self.engine.signature
        feeds = {spec.name: view(self.pointers[spec.name], spec.shape, spec.dtype) for spec in signature.inputs}
        for name, array in self.engine.compute(feeds).items():
            view(self.pointers[name], array.shape, array.dtype.name)[...] = array


def view(pointer: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The array at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_byte * size).from_address(pointer), dtype).reshape(shape)
