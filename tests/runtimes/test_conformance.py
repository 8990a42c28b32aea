"""One suite for every backend: what a session computes, what it accepts and what it refuses."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtimes
from rpfm_edge.chain.build import record
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.backends import BACKENDS
from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError, SignatureError
from rpfm_edge.core.files import file_digest
from rpfm_edge.core.runtime import Runtime, Session
from runtimes.session import guarded

ON_GPU = ("tensorrt", "torch-tensorrt")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu if name in ON_GPU else ()) for name in BACKENDS])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    if reason := runtimes.available()[request.param]:
        pytest.skip(reason)
    if request.param in ON_GPU:
        try:
            import_module("runtimes.trt.cuda").device()
        except BackendError as error:
            pytest.skip(str(error))
    return runtimes.load(request.param)


@pytest.fixture
def number(runtime: Runtime) -> str:
    """An option of the backend that is an integer."""
    return "workspace_mib" if runtime.name in ON_GPU else "threads"


@pytest.fixture
def options(number: str) -> dict[str, int]:
    return {number: 1024 if number == "workspace_mib" else 1}


@pytest.fixture
def built(runtime: Runtime, graph: Artifact, engine: Path, options: dict[str, int]) -> Path:
    """An engine whose graph is gone and which has been moved: it must need neither."""
    runtime.build(graph, "frame", engine, options)
    shutil.rmtree(graph.path)
    return engine.rename(engine.with_name("moved"))


@pytest.fixture
def session(runtime: Runtime, built: Path, tiny: Any, options: dict[str, int]) -> Iterator[Session]:
    with runtime.open(built, tiny.SIGNATURE, options) as opened:
        yield opened


def expected(tiny: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tiny model by its formulas, in double precision."""
    w = {name: value.astype(np.float64) for name, value in tiny.weights().items()}
    pose = np.pad(feeds["pose"][0] / 127.5 - 1, ((1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(pose, (3, 3), axis=(0, 1))  # (H, W, 3, 3, 3)
    latent = np.einsum("hwcij,ocij->hwo", windows, w["conv"]) + feeds["noise"][0].transpose(1, 2, 0)
    x = latent.reshape(-1, tiny.CHANNELS)
    normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    key, value = feeds["source_kv"].astype(np.float64)
    scores = np.exp((normal * w["scale"] + w["shift"]) @ key.T / np.sqrt(tiny.CHANNELS))
    x = x + scores / scores.sum(1, keepdims=True) @ value
    image = (x @ w["linear"] + w["bias"] + 1) * 127.5
    return {"tokens": x[None], "image": np.clip(image, 0, 255).reshape(tiny.IMAGE)}


def check(tiny: Any, outputs: dict[str, np.ndarray], feeds: dict[str, np.ndarray]) -> None:
    want = expected(tiny, feeds)
    assert {name: (array.shape, array.dtype.name) for name, array in outputs.items()} == {
        spec.name: (spec.shape, spec.dtype) for spec in tiny.SIGNATURE.outputs
    }
    np.testing.assert_allclose(outputs["tokens"], want["tokens"], atol=1e-5)
    assert np.abs(outputs["image"] - want["image"]).max() <= 0.5 + 1e-3  # rounded to the nearest level


def test_the_model_uses_its_whole_range(tiny: Any) -> None:
    image = expected(tiny, tiny.feeds(0))["image"]
    assert image.std() > 20
    assert 0 < np.mean((image > 0) & (image < 255)) < 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_computes_the_model(session: Session, tiny: Any, seed: int) -> None:
    check(tiny, session.run(tiny.feeds(seed)), tiny.feeds(seed))


def test_is_deterministic(session: Session, tiny: Any) -> None:
    first, second = session.run(tiny.feeds(0)), session.run(tiny.feeds(0))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_outputs_belong_to_the_caller(session: Session, tiny: Any) -> None:
    first = session.run(tiny.feeds(0))
    kept = {name: array.copy() for name, array in first.items()}
    session.run(tiny.feeds(1))
    assert all(np.array_equal(first[name], kept[name]) for name in first)
    for array in first.values():
        array[...] = 0
    check(tiny, session.run(tiny.feeds(0)), tiny.feeds(0))


def test_feeds_are_left_alone(session: Session, tiny: Any) -> None:
    feeds = tiny.feeds(0)
    session.run(feeds)
    assert all(np.array_equal(array, tiny.feeds(0)[name]) for name, array in feeds.items())


def test_sees_arrays_that_were_edited_in_place(session: Session, tiny: Any) -> None:
    feeds = tiny.feeds(0)
    session.run(feeds)
    for name, array in feeds.items():
        array[...] = tiny.feeds(1)[name]
    check(tiny, session.run(feeds), tiny.feeds(1))


def test_sees_what_lies_under_a_read_only_view(session: Session, tiny: Any) -> None:
    arrays = tiny.feeds(0)
    views = {name: array.view() for name, array in arrays.items()}
    for view in views.values():
        view.flags.writeable = False
    check(tiny, session.run(views), tiny.feeds(0))
    for name, array in arrays.items():
        array[...] = tiny.feeds(1)[name]
    check(tiny, session.run(views), tiny.feeds(1))


def test_takes_arrays_of_any_layout(session: Session, tiny: Any) -> None:
    feeds = tiny.feeds(0)
    strided = {name: np.repeat(array, 2, axis=-1)[..., ::2] for name, array in feeds.items()}
    fortran = {name: np.asfortranarray(array) for name, array in feeds.items()}
    for variant in (strided, fortran, feeds):
        check(tiny, session.run(variant), feeds)


def test_an_input_that_stays_while_the_others_change(session: Session, tiny: Any) -> None:
    person = tiny.feeds(0)["source_kv"]
    for seed in (1, 2, 3):
        feeds = tiny.feeds(seed) | {"source_kv": person}
        check(tiny, session.run(feeds), feeds)


def test_two_sessions_do_not_mix(
    runtime: Runtime, built: Path, session: Session, tiny: Any, options: dict[str, int]
) -> None:
    with runtime.open(built, tiny.SIGNATURE, options) as other:
        results = [(one.run(tiny.feeds(seed)), seed) for seed, one in enumerate((session, other, session, other))]
    for outputs, seed in results:
        check(tiny, outputs, tiny.feeds(seed))
    check(tiny, session.run(tiny.feeds(9)), tiny.feeds(9))


def test_runs_from_other_threads(session: Session, tiny: Any) -> None:
    check(tiny, session.run(tiny.feeds(0)), tiny.feeds(0))
    with ThreadPoolExecutor(1) as pool:
        check(tiny, pool.submit(session.run, tiny.feeds(1)).result(), tiny.feeds(1))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(session.run, [tiny.feeds(seed) for seed in range(16)]))
    for seed, outputs in enumerate(results):
        check(tiny, outputs, tiny.feeds(seed))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda feeds: feeds.pop("noise"), r"got inputs \['pose', 'source_kv'\]: expected exactly \['noise', 'pose'"),
        (lambda feeds: feeds.update(mask=feeds["noise"]), r"got inputs \['mask', 'noise', 'pose', 'source_kv'\]"),
        (
            lambda feeds: feeds.update(noise=feeds["noise"].astype(np.float64)),
            r"input 'noise' is float64\[1, 4, 8, 6\]: expected float32\[1, 4, 8, 6\]",
        ),
        (
            lambda feeds: feeds.update(pose=feeds["pose"][0]),
            r"input 'pose' is uint8\[8, 6, 3\]: expected uint8\[1, 8, 6, 3\]",
        ),
        (lambda feeds: feeds.update(noise=feeds["noise"].byteswap().view(">f4")), r"input 'noise' is >f4"),
    ],
    ids=["missing", "extra", "dtype", "shape", "byte order"],
)
def test_refuses_feeds_that_do_not_fit(
    session: Session, tiny: Any, edit: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    feeds = tiny.feeds(0)
    edit(feeds)
    with pytest.raises(SignatureError, match=message):
        session.run(feeds)
    check(tiny, session.run(tiny.feeds(0)), tiny.feeds(0))


def test_a_closed_session_refuses(runtime: Runtime, built: Path, tiny: Any, options: dict[str, int]) -> None:
    with runtime.open(built, tiny.SIGNATURE, options) as session:
        session.run(tiny.feeds(0))
    with pytest.raises(BackendError, match=f"this {runtime.name.removeprefix('torch-')} session is closed"):
        session.run(tiny.feeds(0))


class Fail(Exception):
    """As ONNX Runtime's: of no base class that tells it from a fault of the program."""


@pytest.mark.parametrize("error", [Fail("no memory\nat line 1"), RuntimeError("no memory"), MemoryError("no memory")])
def test_a_library_that_fails_while_it_runs(tiny: Any, error: Exception) -> None:
    def call(feeds: object) -> Any:
        raise error

    message = rf"^some failed while it ran \({type(error).__name__}: no memory\): expected .*; free some memory, or"
    with guarded("some", tiny.SIGNATURE, call) as session, pytest.raises(BackendError, match=message) as caught:
        session.run(tiny.feeds(0))
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, r"option {} is -1: expected an integer, 0 to "),
        ("2", r"option {} is '2': expected an integer, 0 to "),
        (True, r"option {} is True: expected an integer, 0 to "),
        (10**20, r"option {} is 1[0]{20}: expected an integer, 0 to "),
        (None, r"option 'no_{}': expected one of \[.*'{}'"),
    ],
)
def test_refuses_options(
    runtime: Runtime, graph: Artifact, engine: Path, tiny: Any, number: str, value: Any, message: str
) -> None:
    message = message.replace("{}", number)
    options = {f"no_{number}": 1} if value is None else {number: value}
    with pytest.raises(ConfigError, match=message):
        runtime.build(graph, "frame", engine, options)
    assert not list(engine.iterdir())
    with pytest.raises(ConfigError, match=message), runtime.open(engine, tiny.SIGNATURE, options):
        pass


def test_builds_and_opens_without_options(runtime: Runtime, graph: Artifact, engine: Path, tiny: Any) -> None:
    runtime.build(graph, "frame", engine, {})
    with runtime.open(engine, tiny.SIGNATURE, {}) as session:
        assert session.signature == tiny.SIGNATURE
        check(tiny, session.run(tiny.feeds(0)), tiny.feeds(0))


def test_weights_beside_the_graph(
    runtime: Runtime, make_graph: Callable[..., Artifact], engine: Path, tiny: Any, options: dict[str, int]
) -> None:
    graph = make_graph(external=True)
    assert "frame.onnx.data" in graph.files
    runtime.build(graph, "frame", engine, options)
    shutil.rmtree(graph.path)
    with runtime.open(engine, tiny.SIGNATURE, options) as session:
        check(tiny, session.run(tiny.feeds(0)), tiny.feeds(0))


def test_refuses_a_graph_that_is_not_there(
    runtime: Runtime, graph: Artifact, engine: Path, options: dict[str, int]
) -> None:
    with pytest.raises(ArtifactError, match=r"has no prepare\.onnx"):
        runtime.build(graph, "prepare", engine, options)


def test_refuses_an_empty_engine(runtime: Runtime, engine: Path, tiny: Any, options: dict[str, int]) -> None:
    with (
        pytest.raises(ArtifactError, match=r"missing or damaged .*build the engine again"),
        runtime.open(engine, tiny.SIGNATURE, options),
    ):
        pass


def test_opening_and_running_leave_the_engine_as_it_was(
    runtime: Runtime, built: Path, tiny: Any, options: dict[str, int]
) -> None:
    def digests() -> dict[Path, str]:
        return {path: file_digest(path) for path in built.rglob("*") if path.is_file()}

    before = digests()
    with runtime.open(built, tiny.SIGNATURE, options) as session:
        session.run(tiny.feeds(0))
    assert digests() == before


def test_versions(runtime: Runtime) -> None:
    ((distribution, version),) = runtime.versions().items()
    assert version.startswith(metadata.version(distribution))


def test_unknown_backend() -> None:
    known = re.escape(str(sorted(BACKENDS)))
    with pytest.raises(BackendError, match=f"unknown backend 'tflite': expected one of {known}"):
        runtimes.load("tflite")


def test_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "openvino", replace(BACKENDS["openvino"], libraries=("no_such_library",)))
    message = r"backend openvino is not installed: .* run: pip install 'rpfm-edge\[openvino\]'\."
    with pytest.raises(BackendError, match=message):
        runtimes.load("openvino")
    assert "is not installed" in str(runtimes.available()["openvino"])


def test_backend_whose_library_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_backend.py").write_text("raise ImportError('libmissing.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(
        BACKENDS,
        "openvino",
        replace(
            BACKENDS["openvino"],
            module="broken_backend",
            libraries=(
                "no_such_library",
                "cv2",
            ),
        ),
    )
    fix = r"reinstall it: pip install --force-reinstall opencv-python-headless\.$"  # which rpfm-edge itself is not
    with pytest.raises(BackendError, match=rf"cannot be imported \(libmissing\.so: .*working package cv2; {fix}"):
        runtimes.load("openvino")
    assert set(runtimes.available()) == set(BACKENDS)


def test_importing_runtimes_is_light() -> None:
    heavy = {one for backend in BACKENDS.values() for one in backend.libraries} | {"onnx", "nncf"}
    code = f"import sys; sys.path = {sys.path!r}; import runtimes; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# A graph that aligns the source with keypoints: what is special about it ---------------------------------------------


@pytest.fixture(params=["prepare", "frame"])
def aligned(
    request: pytest.FixtureRequest, runtime: Runtime, aligned_graph: Artifact, engine: Path, options: dict[str, int]
) -> Iterator[tuple[Session, dict[str, np.ndarray], Callable[..., dict[str, np.ndarray]]]]:
    """A session of one of its graphs, feeds that show a person, and the float student in torch."""
    from distill.export import reference

    name, known = request.param, record(aligned_graph)
    assert known is not None
    runtime.build(aligned_graph, name, engine, options)
    signature = aligned_graph.signatures[name]
    feeds = {spec.name: known[spec.name].astype(spec.dtype) for spec in signature.inputs}
    with runtime.open(engine.rename(engine.with_name("moved")), signature, options) as opened:
        yield opened, feeds, reference(aligned_graph.path / "student")[name]


def check_near(found: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert {name: (array.shape, array.dtype) for name, array in found.items()} == {
        name: (array.shape, array.dtype) for name, array in want.items()
    }
    for name, array in found.items():
        if array.dtype == np.uint8:
            assert np.abs(array.astype(int) - want[name]).max() <= 1  # a tie may be rounded either way
        else:
            np.testing.assert_allclose(array, want[name], atol=2e-3, rtol=1e-3)


def test_a_graph_that_aligns_computes_the_student(aligned: Any) -> None:
    session, feeds, student = aligned
    before = {name: array.copy() for name, array in feeds.items()}
    first = session.run(feeds)
    check_near(first, student(feeds))
    assert all(np.array_equal(feeds[name], before[name]) for name in feeds)
    again = session.run(feeds)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_a_graph_that_aligns_sees_joints_move_and_go(aligned: Any) -> None:
    """One input moves while all others stay, down to no joint at all."""
    session, feeds, student = aligned
    name = "pose" if "pose" in feeds else "keypoints"
    for points in (feeds[name] + 2.5, np.where(np.arange(18)[None, :, None] < 9, feeds[name], np.float32(-1e4))):
        moved = feeds | {name: np.ascontiguousarray(points.astype(np.float32))}
        check_near(session.run(moved), student(moved))
    nobody = feeds | {name: np.full_like(feeds[name], -1e4)}
    check_near(session.run(nobody), student(nobody))


def test_a_graph_that_aligns_takes_arrays_of_any_layout(aligned: Any) -> None:
    session, feeds, student = aligned
    want = student(feeds)
    check_near(session.run({name: np.asfortranarray(array) for name, array in feeds.items()}), want)
    views = {name: array.view() for name, array in feeds.items()}
    for view in views.values():
        view.flags.writeable = False
    check_near(session.run(views), want)
