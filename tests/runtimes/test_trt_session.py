"""The session of TensorRT over a stand-in for the GPU (``trt_fake``): which bytes go where, and when.

The stand-in runs everything at once, so the order of work on a GPU is not shown here; the conformance suite on a GPU
shows that, and that CUDA and TensorRT are called as they want to be.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.chain import build
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import BackendError, SignatureError
from rpfm_edge.core.signature import Signature, TensorSpec
from runtimes.trt import cuda as trt_cuda
from runtimes.trt.api import Library
from runtimes.trt.cuda import DeviceArray
from runtimes.trt.run import SLOTS, Slot, TensorRTSession, is_frozen
from tests.runtimes.trt_fake import FAILURE, NO_MEMORY, Compute, FakeContext, FakeCuda, FakeEngine, view

SIGNATURE = Signature(
    (TensorSpec("pose", (2, 3), "uint8"), TensorSpec("source_kv", (4,), "float32")),
    (TensorSpec("image", (2, 3), "float32"),),
)
IDENTITIES = 2


def compute(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A frame that depends on every byte of its inputs."""
    return {"image": feeds["pose"] * feeds["source_kv"][:3] + feeds["source_kv"][3]}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda()
    monkeypatch.setattr(trt_cuda, "runtime_api", lambda: made)
    return made


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def opened(
    cuda: FakeCuda,
    resources: ExitStack,
    captured: bool = True,
    signature: Signature = SIGNATURE,
    compute: Compute = compute,
) -> tuple[TensorRTSession, FakeEngine]:
    engine = FakeEngine(cuda, signature, compute)
    library = Library(SimpleNamespace(), "tensorrt", "10.3.0", True, (), (), True, True, {}, (), False)
    session = TensorRTSession(library, engine, signature, resources, IDENTITIES, captured)
    resources.callback(session.close)
    return session, engine


@pytest.fixture
def session(cuda: FakeCuda, resources: ExitStack) -> TensorRTSession:
    return opened(cuda, resources)[0]


def feeds(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "pose": rng.integers(0, 256, (2, 3), dtype=np.uint8),
        "source_kv": rng.standard_normal(4, dtype=np.float32),
    }


def uploads(cuda: FakeCuda, work: Any) -> int:
    """Copies that ``work`` makes outside of graphs."""
    before = cuda.calls["cudaMemcpyAsync"]
    work()
    return cuda.calls["cudaMemcpyAsync"] - before


@pytest.mark.parametrize("captured", [True, False])
def test_computes_and_gives_addresses_once(cuda: FakeCuda, resources: ExitStack, captured: bool) -> None:
    session, engine = opened(cuda, resources, captured)
    for seed in range(5):
        np.testing.assert_array_equal(session.run(feeds(seed))["image"], compute(feeds(seed))["image"])
    assert all(set(context.addresses.values()) == {1} for context in engine.contexts)
    assert cuda.calls["cudaGraphLaunch"] == (5 if captured else 0)


def test_enqueued_frames_are_all_there_in_the_end(session: TensorRTSession) -> None:
    """More frames than slots: the session fetches what nobody has fetched before it uses a slot again."""
    pending = [session.enqueue(feeds(seed)) for seed in range(7)]
    for seed in (6, 0, 3, 1, 5, 2, 4):
        np.testing.assert_array_equal(pending[seed].wait()["image"], compute(feeds(seed))["image"])
    assert pending[0].wait() is pending[0].wait()


def test_feeds_may_be_changed_after_enqueue(session: TensorRTSession) -> None:
    fed = feeds(0)
    frame = session.enqueue(fed)
    for array in fed.values():
        array[...] = 0
    np.testing.assert_array_equal(frame.wait()["image"], compute(feeds(0))["image"])


def test_a_kept_array_is_uploaded_once(session: TensorRTSession, cuda: FakeCuda) -> None:
    person, poses = session.keep(feeds(0)["source_kv"]), [feeds(seed)["pose"] for seed in range(8)]
    frames: list[np.ndarray] = []

    def render() -> None:
        frames.extend(session.run({"pose": pose, "source_kv": person})["image"] for pose in poses)

    # A pose for each frame, the person once to the GPU and once into each of the two slots.
    assert uploads(cuda, render) == len(poses) + 1 + 2
    for pose, image in zip(poses, frames, strict=True):
        np.testing.assert_array_equal(image, compute({"pose": pose, "source_kv": person})["image"])


def test_the_noise_of_a_pipeline_stays_on_the_gpu(
    cuda: FakeCuda, resources: ExitStack, tiny_graph: Artifact, tmp_path: Path
) -> None:
    """Once both slots hold the person and the noise, a frame uploads its pose and nothing else."""
    pytest.importorskip("onnxruntime")
    made = build.build(tiny_graph.path, tmp_path / "bundle", ["onnxruntime"])
    signature, fed = made.signatures["frame"], []

    def frame(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        fed.append(feeds["noise"].copy())
        return {spec.name: np.zeros(spec.shape, spec.dtype) for spec in signature.outputs}

    with Pipeline.open(made.path) as whole:
        session, _ = opened(cuda, resources, signature=signature, compute=frame)
        pipe = Pipeline(made, "tensorrt", whole._prepare, session, ExitStack())
        person = pipe.prepare(np.zeros((*pipe.size, 3), np.uint8))
        pose = np.full((18, 2), 10.0, np.float32)
        for _ in range(2):
            pipe.render(person, pose)
        assert uploads(cuda, lambda: pipe.render(person, pose)) == 1
    np.testing.assert_array_equal(fed[-1], np.load(made.file("noise.npy")))


def test_several_identities_in_turn_and_one_too_many(session: TensorRTSession, cuda: FakeCuda) -> None:
    people = [session.keep(feeds(seed)["source_kv"]) for seed in range(IDENTITIES + 1)]
    pose = feeds(9)["pose"]

    def render(which: int) -> None:
        image = session.run({"pose": pose, "source_kv": people[which]})["image"]
        np.testing.assert_array_equal(image, compute({"pose": pose, "source_kv": people[which]})["image"])

    for which in (0, 1):
        render(which)
    before = cuda.calls["cudaMalloc"]
    for which in (0, 1, 1, 0):
        render(which)
    assert cuda.calls["cudaMalloc"] == before
    render(2)  # takes the place of 1, which was used before 0
    render(0)
    assert cuda.calls["cudaMalloc"] == before + 1
    render(1)
    assert cuda.calls["cudaMalloc"] == before + 2
    assert cuda.calls["cudaFree"] == 2


def test_an_identity_at_the_address_of_one_that_is_gone(session: TensorRTSession) -> None:
    pose = feeds(9)["pose"]
    for seed in range(20):  # Python gives the memory, and so the id, to the next array
        person = session.keep(feeds(seed)["source_kv"])
        image = session.run({"pose": pose, "source_kv": person})["image"]
        np.testing.assert_array_equal(image, compute({"pose": pose, "source_kv": person})["image"])
        del person
        gc.collect()


def test_only_what_nothing_can_change_is_frozen() -> None:
    array = np.zeros(4, np.float32)
    view_of_it = array.view()
    view_of_it.flags.writeable = False
    assert not is_frozen(array)
    assert not is_frozen(view_of_it)
    array.flags.writeable = False
    assert is_frozen(array)
    assert is_frozen(array[1:])
    assert not is_frozen(np.frombuffer(bytearray(16), np.float32))


def on_gpu(cuda: FakeCuda, array: np.ndarray) -> DeviceArray:
    held = DeviceArray(cuda._memory(array.nbytes), array.shape, array.dtype.name)
    view(held.pointer, held.shape, held.dtype)[...] = array
    return held


def test_takes_arrays_on_the_gpu(session: TensorRTSession, cuda: FakeCuda) -> None:
    fed = {name: on_gpu(cuda, array) for name, array in feeds(3).items()}
    np.testing.assert_array_equal(session.enqueue(fed).wait()["image"], compute(feeds(3))["image"])
    for held in fed.values():
        cuda.alive.pop(held.pointer)


def test_its_own_buffers_are_not_copied(session: TensorRTSession, cuda: FakeCuda) -> None:
    for seed in range(3):
        buffers = session.buffers()
        for name, array in feeds(seed).items():
            view(buffers[name].pointer, buffers[name].shape, buffers[name].dtype)[...] = array
        before = cuda.calls["cudaMemcpyAsync"]
        frame = session.enqueue(buffers)
        assert cuda.calls["cudaMemcpyAsync"] == before
        on_device = session.outputs(frame)["image"]
        np.testing.assert_array_equal(
            view(on_device.pointer, on_device.shape, on_device.dtype), compute(feeds(seed))["image"]
        )
        frame.wait()


def test_a_kept_array_after_an_array_on_the_gpu(session: TensorRTSession, cuda: FakeCuda) -> None:
    """A slot must not believe that it still holds the person that was overwritten."""
    pose, person = feeds(0)["pose"], session.keep(feeds(0)["source_kv"])
    other = on_gpu(cuda, feeds(1)["source_kv"])
    for source_kv in (person, person, other, other, person, person):
        image = session.enqueue({"pose": pose, "source_kv": source_kv}).wait()["image"]
        wanted = person if source_kv is person else feeds(1)["source_kv"]
        np.testing.assert_array_equal(image, compute({"pose": pose, "source_kv": wanted})["image"])
    cuda.alive.pop(other.pointer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (3, 2)}, r"input 'pose' is uint8\[3, 2\]: expected uint8\[2, 3\]"),
        ({"typestr": "<f4"}, r"input 'pose' is float32\[2, 3\]: expected uint8\[2, 3\]"),
        ({"strides": (1, 2)}, "input 'pose' on the GPU is not contiguous"),
    ],
)
def test_refuses_arrays_on_the_gpu(session: TensorRTSession, change: dict[str, Any], message: str) -> None:
    described = {"data": (1, False), "shape": (2, 3), "typestr": "|u1", "strides": None, "version": 3} | change
    pose = SimpleNamespace(__cuda_array_interface__=described)
    with pytest.raises(SignatureError, match=message):
        session.enqueue(feeds(0) | {"pose": pose})
    np.testing.assert_array_equal(session.run(feeds(0))["image"], compute(feeds(0))["image"])


def test_outputs_on_the_gpu_are_refused_when_they_are_gone(session: TensorRTSession) -> None:
    first = session.enqueue(feeds(0))
    for seed in (1, 2):
        session.enqueue(feeds(seed))
    with pytest.raises(BackendError, match="are no longer on the GPU"):
        session.outputs(first)


def test_closing_gives_everything_back(cuda: FakeCuda) -> None:
    for _ in range(3):
        with ExitStack() as resources:
            session, _ = opened(cuda, resources)
            person = session.keep(feeds(0)["source_kv"])
            for seed in range(3):
                session.run({"pose": feeds(seed)["pose"], "source_kv": person})
            late = session.enqueue(feeds(5))
        np.testing.assert_array_equal(late.wait()["image"], compute(feeds(5))["image"])
        assert cuda.alive == {}
        for use in (session.buffers, lambda s=session: s.enqueue(feeds(0)), lambda s=session, p=late: s.outputs(p)):
            with pytest.raises(BackendError, match="this tensorrt session is closed"):
                use()


@pytest.mark.parametrize("place", ["cudaMalloc", "cudaHostAlloc", "cudaGraphInstantiate"])
def test_too_little_memory(cuda: FakeCuda, place: str) -> None:
    cuda.fail[place] = NO_MEMORY
    message = rf"{place} failed \(out of memory\): expected enough free GPU memory; close other programs on the GPU"
    with pytest.raises(BackendError, match=message), ExitStack() as resources:
        opened(cuda, resources)
    assert not [handle for handle, value in cuda.alive.items() if not isinstance(value, list)]


def test_no_execution_context(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "create_execution_context", lambda self: None)
    with pytest.raises(BackendError, match="cannot make an execution context"), ExitStack() as resources:
        opened(cuda, resources)


def test_an_engine_that_does_not_run(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeContext, "execute_async_v3", lambda self, stream: False)
    with pytest.raises(BackendError, match="TensorRT cannot run the engine"), ExitStack() as resources:
        opened(cuda, resources)


def test_an_engine_that_cannot_be_captured_runs_without_a_graph(
    cuda: FakeCuda, resources: ExitStack, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda.fail["cudaStreamEndCapture"] = FAILURE
    session, _ = opened(cuda, resources)
    assert "captures no CUDA graph" in capsys.readouterr().err
    for seed in range(3):
        np.testing.assert_array_equal(session.run(feeds(seed))["image"], compute(feeds(seed))["image"])
    assert not cuda.calls["cudaGraphLaunch"]


def test_an_engine_that_refuses_while_it_is_captured(
    cuda: FakeCuda, resources: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue = Slot._enqueue

    def refuse(slot: Slot) -> None:
        if cuda.recording is not None:
            raise BackendError("TensorRT cannot run the engine", expected="", fix="")
        enqueue(slot)

    monkeypatch.setattr(Slot, "_enqueue", refuse)
    session, _ = opened(cuda, resources)
    np.testing.assert_array_equal(session.run(feeds(0))["image"], compute(feeds(0))["image"])
    assert not cuda.calls["cudaGraphInstantiate"]
    assert cuda.calls["cudaGraphDestroy"] == SLOTS


def test_graphs_go_before_the_contexts_they_were_captured_from(cuda: FakeCuda, resources: ExitStack) -> None:
    session, engine = opened(cuda, resources)
    assert cuda.calls["cudaGraphInstantiate"] == SLOTS
    gone: list[int] = []
    for context in engine.contexts:
        weakref.finalize(context, lambda: gone.append(cuda.calls["cudaGraphExecDestroy"]))
    del context
    engine.contexts.clear()
    session.close()
    assert len(gone) == SLOTS
    assert set(gone) == {SLOTS}


def test_an_error_of_the_gpu(session: TensorRTSession, cuda: FakeCuda) -> None:
    cuda.fail["cudaGraphLaunch"] = FAILURE
    with pytest.raises(BackendError, match=r"cudaGraphLaunch failed \(unknown error\): expected a working GPU"):
        session.run(feeds(0))


class Drawn:
    """An array on the GPU of an owner that names no stream, as torch's (version 2 of the interface)."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        array = self.array
        return {"data": (array.ctypes.data, False), "shape": array.shape, "typestr": array.dtype.str, "version": 2}


def test_an_array_of_an_owner_without_a_stream_is_waited_for(session: TensorRTSession, cuda: FakeCuda) -> None:
    waits = "cudaStreamWaitEvent"
    session.run(feeds(0))
    of_a_frame = cuda.calls[waits]
    session.enqueue({**feeds(1), "pose": Drawn(feeds(1)["pose"])}).wait()
    assert cuda.calls[waits] == 2 * of_a_frame + 1


def test_an_array_on_the_gpu_lives_as_long_as_its_frame(session: TensorRTSession) -> None:
    drawn = Drawn(feeds(0)["pose"])
    alive = weakref.ref(drawn)
    frame = session.enqueue({**feeds(0), "pose": drawn})
    del drawn
    gc.collect()
    assert alive() is not None
    np.testing.assert_array_equal(frame.wait()["image"], compute(feeds(0))["image"])
    gc.collect()
    assert alive() is None


def test_buffers_forget_who_was_in_them(session: TensorRTSession) -> None:
    person, pose = session.keep(feeds(0)["source_kv"]), feeds(1)["pose"]
    for _ in range(2):
        session.run({"pose": pose, "source_kv": person})
    buffer = session.buffers()["source_kv"]
    view(buffer.pointer, buffer.shape, buffer.dtype)[...] = 7
    expected = compute({"pose": pose, "source_kv": feeds(0)["source_kv"]})["image"]
    np.testing.assert_array_equal(session.run({"pose": pose, "source_kv": person})["image"], expected)
