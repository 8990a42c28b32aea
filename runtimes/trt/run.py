"""Running a TensorRT engine: buffers that stay, two slots in turn, one CUDA graph per slot.

A slot has an execution context, memory for every tensor on the GPU and on the host, and a graph that holds the engine's
kernels and the copy of its outputs to the host. While one slot computes, the inputs of the next frame are copied into
the other one. A frozen input, such as the keys and values of a person, is uploaded once and kept on the GPU.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from threading import Lock
from typing import Any

import numpy as np

from rpfm_edge.core.errors import BackendError, SignatureError, warn
from rpfm_edge.core.signature import Signature
from runtimes.session import GuardedSession
from runtimes.trt import dlpack
from runtimes.trt.api import Library
from runtimes.trt.cuda import Cuda, DeviceArray

SLOTS = 2
LEGACY_STREAM = 1  # the default stream, by its number in the CUDA array interface
DeviceFeeds = Mapping[str, Any]  # numpy arrays, or anything with __cuda_array_interface__ or __dlpack__


class Pending:
    """A frame under way. ``wait`` returns its outputs; later frames of the session do not overwrite them."""

    def __init__(self, slot: Slot) -> None:
        self._slot: Slot | None = slot
        self._outputs: dict[str, np.ndarray] = {}
        self._lock = Lock()

    def wait(self) -> dict[str, np.ndarray]:
        """Outputs by name on the host, owned by the caller."""
        with self._lock:  # the session waits too, when it needs the slot again, perhaps in another thread
            if self._slot:
                self._outputs = self._slot.collect()
                self._slot = None
            return self._outputs


class Slot:
    """One frame's buffers, context, graph and events."""

    def __init__(self, cuda: Cuda, engine: Any, signature: Signature, stream: Any, captured: bool) -> None:
        self.cuda, self.stream = cuda, stream
        self.own = cuda.resources.enter_context(ExitStack())  # what has to go before the context
        self.context = engine.create_execution_context()
        if self.context is None:
            raise BackendError(
                "TensorRT cannot make an execution context",
                expected="enough free GPU memory",
                fix="close other programs on the GPU",
            )
        self.inputs, self.outputs = (
            {spec.name: cuda.device_array(spec.shape, spec.dtype) for spec in side}
            for side in (signature.inputs, signature.outputs)
        )
        self.staged, self.results = (
            {spec.name: cuda.pinned(spec.shape, spec.dtype) for spec in side}
            for side in (signature.inputs, signature.outputs)
        )
        self.uploaded, self.done = cuda.event(), cuda.event()
        self.holds: dict[str, DeviceArray | None] = {}
        self.fed: list[Any] = []  # arrays of callers on the GPU that the frame under way reads
        self.pending: Pending | None = None
        for name, array in (*self.inputs.items(), *self.outputs.items()):
            self.context.set_tensor_address(name, array.pointer)
        self.graph = self._capture() if captured else None

    def launch(self) -> Pending:
        """Compute once the inputs are there; does not wait."""
        self.cuda.call("cudaStreamWaitEvent", self.stream, self.uploaded, 0)
        if self.graph is None:
            self._enqueue()
        else:
            self.cuda.call("cudaGraphLaunch", self.graph, self.stream)
        self.cuda.call("cudaEventRecord", self.done, self.stream)
        self.pending = Pending(self)
        return self.pending

    def collect(self) -> dict[str, np.ndarray]:
        """Wait for the frame under way, and copy its outputs."""
        self.cuda.call("cudaEventSynchronize", self.done)
        outputs = {name: array.copy() for name, array in self.results.items()}
        self.pending = None
        self.fed.clear()
        return outputs

    def free(self) -> None:
        """Finish the frame under way, so that the slot's memory may be written again."""
        pending = self.pending
        if pending:
            pending.wait()

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(int(self.stream)):
            raise BackendError(
                "TensorRT cannot run the engine", expected="a working GPU", fix="build the engine again on this device"
            )
        for name, array in self.outputs.items():
            self.cuda.copy(self.results[name].ctypes.data, array.pointer, array.nbytes, self.stream)

    def _capture(self) -> Any:
        """The graph of one frame, None if the engine refuses. It has to run once before, which sets its memory up."""
        self._enqueue()
        call, api = self.cuda.call, self.cuda.api
        call("cudaStreamSynchronize", self.stream)
        call("cudaStreamBeginCapture", self.stream, api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        refused = False
        try:
            self._enqueue()
        except BackendError:  # it has just run without, so this is about the capture
            refused = True
        finally:  # a stream must not be left in capture
            _, graph = api.cudaStreamEndCapture(self.stream)
        if not graph:
            return None
        executable = None
        if not refused:
            executable = call("cudaGraphInstantiate", graph, 0)
            self.own.callback(self.cuda.free, "cudaGraphExecDestroy", executable)
        call("cudaGraphDestroy", graph)
        return executable


class Residents:
    """Frozen arrays that were uploaded, by identity: the last ``count`` that were used."""

    def __init__(self, cuda: Cuda, stream: Any, count: int) -> None:
        self.cuda, self.stream, self.count = cuda, stream, count
        self._known: OrderedDict[int, tuple[weakref.ref[np.ndarray], DeviceArray, ExitStack]] = OrderedDict()
        cuda.resources.callback(self.drop, 0)

    def get(self, array: np.ndarray) -> DeviceArray:
        """``array`` on the GPU, uploaded now if it is not there."""
        found = self._known.get(id(array))
        if found and found[0]() is array:  # an id is used again once its array is gone
            self._known.move_to_end(id(array))
            return found[1]
        if found:
            self._known.pop(id(array))[2].close()
        self.drop(self.count - 1)
        own = ExitStack()
        held = self.cuda.device_array(array.shape, array.dtype.name, own)
        whole = np.ascontiguousarray(array)
        self.cuda.copy(held.pointer, whole.ctypes.data, held.nbytes, self.stream)
        self.cuda.call("cudaStreamSynchronize", self.stream)  # ``whole`` may be gone after this; once per identity
        self._known[id(array)] = (weakref.ref(array), held, own)
        return held

    def drop(self, left: int) -> None:
        """Free the least recently used until ``left`` remain; the GPU frees memory once nothing uses it any more."""
        while len(self._known) > left:
            self._known.popitem(last=False)[1][2].close()


class TensorRTSession(GuardedSession):
    """A session with ``enqueue``, which does not wait, and with its buffers open to callers on the GPU."""

    def __init__(
        self, library: Library, engine: Any, signature: Signature, resources: ExitStack, identities: int, captured: bool
    ) -> None:
        super().__init__("tensorrt", signature, lambda feeds: self._start(feeds).wait())
        self.cuda = Cuda(resources)
        self._uploads, compute = self.cuda.stream(), self.cuda.stream()
        self._followed: set[int] = set()
        self._residents = Residents(self.cuda, self._uploads, identities)
        self._slots = [Slot(self.cuda, engine, signature, compute, captured) for _ in range(SLOTS)]
        if captured and any(slot.graph is None for slot in self._slots):
            warn("TensorRT captures no CUDA graph of this engine, and it runs without one")
        resources.callback(self.cuda.free, "cudaStreamSynchronize", compute)  # first of all to be called on closing

    def enqueue(self, feeds: DeviceFeeds) -> Pending:
        """Start a frame.

        Args:
            feeds: numpy arrays, which may be changed as soon as this returns; or contiguous arrays on the GPU with
                ``__cuda_array_interface__`` or DLPack, which are copied there and may be changed once the frame is
                done. One that is memory of ``buffers()`` is not copied at all.
        """
        with self._lock:
            self.require_open()
            feeds = {name: dlpack.adopted(array, int(self._uploads)) for name, array in feeds.items()}
            self._check(feeds)
            return self._start(feeds)

    def buffers(self) -> dict[str, DeviceArray]:
        """The GPU memory that the next frame reads its inputs from: write there, then ``enqueue`` the same arrays."""
        with self._lock:
            self.require_open()
            self._slots[0].free()
            self._slots[0].holds.clear()  # the caller may write over what was there
            return dict(self._slots[0].inputs)

    def outputs(self, pending: Pending) -> dict[str, DeviceArray]:
        """The outputs of a frame on the GPU, complete; valid until the frame after the next one is started."""
        with self._lock:
            self.require_open()
            slot = next((slot for slot in self._slots if slot.pending is pending), None)
            if slot is None:
                raise BackendError(
                    "the outputs of this frame are no longer on the GPU",
                    expected="one of the last frames, before wait()",
                    fix="call outputs() before wait() and before the frame after the next",
                )
            self.cuda.call("cudaEventSynchronize", slot.done)
            return dict(slot.outputs)

    def observe(self, profiler: Any) -> Any:
        """Have the time of every layer reported to ``profiler``, an ``IProfiler``; returns the engine that runs."""
        with self._lock:
            self.require_open()
            for slot in self._slots:
                slot.context.profiler = profiler
            return self._slots[0].context.engine

    def close(self) -> None:
        """Finish what is under way and drop the engine; frames that were started can still be waited for."""
        super().close()
        with self._lock:
            for slot in self._slots:
                slot.free()
                slot.own.close()  # a graph must not outlive the context that it was captured from
            self._slots.clear()

    def keep(self, array: np.ndarray) -> np.ndarray:
        """A frozen copy: it is uploaded once, however often it is fed."""
        frozen = np.array(array)
        frozen.flags.writeable = False
        return frozen

    def _check(self, feeds: DeviceFeeds) -> None:
        """The session's own check, for arrays on the GPU too."""
        specs = {spec.name: spec for spec in self.signature.inputs}
        host: dict[str, Any] = {}
        for name, array in feeds.items():
            described = getattr(array, "__cuda_array_interface__", None)
            if described is None or name not in specs:
                host[name] = array
                continue
            if described.get("strides") is not None and _strided(described):
                raise SignatureError(
                    f"input {name!r} on the GPU is not contiguous", expected=str(specs[name]), fix="copy it first"
                )
            host[name] = _stand_in(described)
        self.signature.check(host)

    def _start(self, feeds: DeviceFeeds) -> Pending:
        slot = self._slots[0]
        slot.free()
        self._followed.clear()
        for name, array in feeds.items():
            self._upload(slot, name, array)
        self.cuda.call("cudaEventRecord", slot.uploaded, self._uploads)
        self._slots.append(self._slots.pop(0))
        return slot.launch()

    def _upload(self, slot: Slot, name: str, array: Any) -> None:
        buffer, described = slot.inputs[name], getattr(array, "__cuda_array_interface__", None)
        if described is not None:
            slot.holds[name] = None
            slot.fed.append(array)  # or its owner could use the memory again while it is being copied
            self._follow(slot, described.get("stream", LEGACY_STREAM))
            if described["data"][0] != buffer.pointer:
                self.cuda.copy(buffer.pointer, described["data"][0], buffer.nbytes, self._uploads)
        elif is_frozen(array):
            held = self._residents.get(array)
            if slot.holds.get(name) is not held:
                self.cuda.copy(buffer.pointer, held.pointer, buffer.nbytes, self._uploads)
                slot.holds[name] = held
        else:
            slot.holds[name] = None
            np.copyto(slot.staged[name], array)
            self.cuda.copy(buffer.pointer, slot.staged[name].ctypes.data, buffer.nbytes, self._uploads)

    def _follow(self, slot: Slot, stream: int | None) -> None:
        """Wait, on the GPU, for what the owner of an array has started on ``stream`` (1 and 2 are the default ones).

        An array that names none, as torch's, is taken to be written on the legacy default stream; None is for an owner
        that has finished.
        """
        if stream is not None and stream not in self._followed:  # once a frame
            self._followed.add(stream)
            self.cuda.call("cudaEventRecord", slot.uploaded, stream)
            self.cuda.call("cudaStreamWaitEvent", self._uploads, slot.uploaded, 0)


def is_frozen(array: np.ndarray) -> bool:
    """Whether nothing can change ``array``: neither it nor what it is a view of is writeable."""
    below: Any = array
    while isinstance(below, np.ndarray):
        if below.flags.writeable:
            return False
        below = below.base
    return below is None


def _strided(described: Mapping[str, Any]) -> bool:
    expected = np.empty(described["shape"], described["typestr"]).strides
    return tuple(described["strides"]) != expected


def _stand_in(described: Mapping[str, Any]) -> np.ndarray:
    """An array of the shape and type described, without its memory."""
    return np.broadcast_to(np.empty((), described["typestr"]), described["shape"])
