"""DLPack against numpy and torch, on the CPU: what they make of our capsules, and what we make of theirs."""

from __future__ import annotations

import gc
import weakref
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from rpfm_edge.core.errors import SignatureError
from runtimes.trt import cuda as trt_cuda
from runtimes.trt import dlpack
from runtimes.trt.cuda import DeviceArray
from tests.runtimes.test_trt_session import (
    SIGNATURE,  # noqa: F401
    compute,
    cuda,  # noqa: F401
    feeds,
    opened,
    resources,  # noqa: F401
)
from tests.runtimes.trt_fake import FakeCuda, view

DTYPES = ["uint8", "int32", "int64", "float16", "float32", "bool"]


class Exporter:
    """Memory of numpy, offered by our capsules."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CPU, 0

    def __dlpack__(self, stream: Any = None) -> Any:
        return dlpack.capsule(self.array.ctypes.data, self.array.shape, self.array.dtype.name, (dlpack.CPU, 0), self)


def pictures(dtype: str) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, (2, 3, 4)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_others_read_our_memory(dtype: str, library: str) -> None:
    module, array = pytest.importorskip(library), pictures(dtype)
    taken = module.from_dlpack(Exporter(array))
    np.testing.assert_array_equal(np.asarray(taken), array)
    array[0, 0, 0] = array[0, 0, 0] == 0  # the memory itself, no copy
    np.testing.assert_array_equal(np.asarray(taken), array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_we_read_the_memory_of_others(dtype: str, library: str) -> None:
    array = pictures(dtype)
    theirs: Any = array if library == "numpy" else pytest.importorskip("torch").from_numpy(array)
    described = dlpack.Adopted(theirs[1:].__dlpack__()).__cuda_array_interface__
    assert (described["shape"], described["typestr"]) == ((1, 3, 4), np.dtype(dtype).str)
    assert described["data"] == (array[1:].ctypes.data, False)
    assert described["strides"] in (None, array.strides)


def test_strides_are_told_in_bytes() -> None:
    array = pictures("float32")
    described = dlpack.Adopted(array.transpose(2, 0, 1).__dlpack__()).__cuda_array_interface__
    assert described["strides"] == array.transpose(2, 0, 1).strides


@pytest.mark.parametrize("used", [False, True])
def test_our_memory_lives_as_long_as_the_capsule_or_its_taker(used: bool) -> None:
    exporter = Exporter(pictures("uint8"))
    alive, before = weakref.ref(exporter), len(dlpack._alive)
    held = np.from_dlpack(exporter) if used else exporter.__dlpack__()
    del exporter
    gc.collect()
    assert alive() is not None
    del held
    gc.collect()
    assert alive() is None
    assert len(dlpack._alive) == before


def test_their_memory_is_given_back_once() -> None:
    exporter = Exporter(pictures("uint8"))
    alive = weakref.ref(exporter)
    capsule = exporter.__dlpack__()
    taken = dlpack.Adopted(capsule)
    del exporter
    with pytest.raises(SignatureError, match="a DLPack capsule was used before: expected a new one; feed the array"):
        dlpack.Adopted(capsule)
    del capsule
    gc.collect()
    assert alive() is not None
    del taken
    gc.collect()
    assert alive() is None


class OnGpu(Exporter):
    """The same, said to be on a GPU, as the memory of the stand-in is."""

    kind, number, stream = dlpack.CUDA, 0, None

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, self.number

    def __dlpack__(self, stream: Any = None) -> Any:
        self.stream = stream
        return super().__dlpack__()


def test_a_session_takes_and_gives_dlpack(cuda: FakeCuda, resources: ExitStack) -> None:  # noqa: F811
    session, _ = opened(cuda, resources)
    given = {name: OnGpu(array) for name, array in feeds(0).items()}
    frame = session.enqueue(given)
    image = session.outputs(frame)["image"]
    assert image.__dlpack_device__() == (2, 0)
    found = dlpack.Adopted(image.__dlpack__(stream=1)).__cuda_array_interface__
    np.testing.assert_array_equal(view(found["data"][0], found["shape"], "float32"), compute(feeds(0))["image"])
    np.testing.assert_array_equal(frame.wait()["image"], compute(feeds(0))["image"])
    assert {exporter.stream for exporter in given.values()} == {int(session._uploads)}


def test_a_session_keeps_what_it_reads_until_the_frame_is_done(cuda: FakeCuda, resources: ExitStack) -> None:  # noqa: F811
    session, _ = opened(cuda, resources)
    given = OnGpu(feeds(0)["pose"])
    alive = weakref.ref(given)
    frame = session.enqueue({**feeds(0), "pose": given})
    del given
    gc.collect()
    assert alive() is not None
    frame.wait()
    gc.collect()
    assert alive() is None


def test_memory_of_the_cpu_is_taken_as_numpy(cuda: FakeCuda, resources: ExitStack) -> None:  # noqa: F811
    session, _ = opened(cuda, resources)
    given = {name: Exporter(array) for name, array in feeds(0).items()}
    np.testing.assert_array_equal(session.enqueue(given).wait()["image"], compute(feeds(0))["image"])


def test_refuses_other_devices_and_types(cuda: FakeCuda, resources: ExitStack) -> None:  # noqa: F811
    session, _ = opened(cuda, resources)
    other = OnGpu(feeds(0)["pose"])
    other.number = 1
    with pytest.raises(SignatureError, match="an array on DLPack device 2:1: expected memory of the CPU or of the GPU"):
        session.enqueue({**feeds(0), "pose": other})
    with pytest.raises(SignatureError, match="pose"):
        session.enqueue({**feeds(0), "pose": OnGpu(feeds(0)["pose"].astype(np.float32))})
    brain = pytest.importorskip("torch").zeros(2, 3).bfloat16()
    with pytest.raises(SignatureError, match="a DLPack array of type 4 with 16 bits and 1 lanes: expected numbers"):
        dlpack.Adopted(brain.__dlpack__())


def test_only_the_memory_itself_is_given() -> None:
    array = DeviceArray(16, (2, 3), "float32")
    for asked in ({"copy": True}, {"dl_device": (dlpack.CPU, 0)}):
        with pytest.raises(BufferError):
            array.__dlpack__(**asked)  # type: ignore[arg-type]
    assert trt_cuda.DeviceArray.__dlpack_device__(array) == (dlpack.CUDA, 0)
