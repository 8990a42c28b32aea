"""What runs in TensorRT's interpreter, which may have no torch: engines, conformance, pictures, frames, memory.

``backend`` may be another one, such as onnxruntime, so that all of this can be tried without a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

import runtimes
from rpfm_edge import api
from rpfm_edge.bundle.engines import size_bytes
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core import artifact
from rpfm_edge.core.errors import BackendError
from rpfm_edge.core.files import write_bytes
from rpfm_edge.judge.quality import images_of
from rpfm_edge.measure.machine import where
from rpfm_edge.measure.metrics import psnr_db
from rpfm_edge.people.held_out import Pairs
from scripts.gpu_parts import timing
from scripts.gpu_parts.worker import Verb

ROOT = Path(__file__).resolve().parents[2]
ON_GPU = "tensorrt"
HOST_FRAMES = 300
PARTS = ("sources", "source_poses", "poses", "truths", "noise")  # of Pairs, in a file of them


def engine_machine(backend: str) -> dict[str, Any]:
    """The machine, the library, and the GPU (None for a backend on the CPU)."""
    versions = runtimes.load(backend).versions()
    gpu = None
    if backend == ON_GPU:
        from runtimes.trt.cuda import device

        gpu = asdict(device())
    return {"machine": where(versions), "gpu": gpu}


def build(bundle: str, out: str, backend: str, options: dict[str, Any]) -> dict[str, Any]:
    """``rpfm-edge build BUNDLE --target BACKEND --out OUT``, canary included."""
    start = time.perf_counter()
    made = api.build(bundle, out, backend, {backend: options})
    seconds = time.perf_counter() - start
    return {"build_s": seconds, "engine_bytes": size_bytes(made, backend), "digest": made.digest}


def conformance(backend: str, report: str) -> dict[str, Any]:
    """Run the conformance tests that need a GPU, or on a CPU those of ``backend``; see ``read_report``."""
    if not find_spec("pytest"):
        raise BackendError("pytest is not installed", expected="it, to run tests/runtimes", fix="install pytest")
    chosen = ["-m", "gpu"] if backend == ON_GPU else ["-k", backend]
    chosen.append("tests/runtimes/test_conformance.py")  # others import what TensorRT's side need not have
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *chosen]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": _python_path()}, stdout=sys.stderr)
    if not Path(report).is_file():
        raise BackendError(
            f"pytest ended with exit code {done.returncode}", expected="a report", fix="see what it printed in the log"
        )
    return read_report(Path(report))


def read_report(report: Path) -> dict[str, Any]:
    """Counts, and the names and reasons of what failed or was skipped, of a JUnit file."""
    kinds: dict[str, dict[str, str]] = {"passed": {}, "failed": {}, "skipped": {}}
    for test in ElementTree.parse(report).getroot().iter("testcase"):
        marks = {child.tag: child.get("message") or "" for child in test}
        kind = "failed" if marks.keys() & {"failure", "error"} else "skipped" if "skipped" in marks else "passed"
        kinds[kind][str(test.get("name"))] = next(iter(marks.values()), "")[:300]
    return {"passed": len(kinds["passed"]), "failed": kinds["failed"], "skipped": kinds["skipped"]}


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def load_pairs(file: str) -> tuple[Pairs, dict[str, np.ndarray]]:
    """The pairs of a file that ``torch_side.reference`` wrote, and the pictures beside them."""
    with np.load(file, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    names = [(str(a), str(b)) for a, b in arrays.pop("names")]
    parts = {name: arrays.pop(name) for name in PARTS}
    return Pairs(names, **parts), arrays


def images(bundle: str, backend: str, pairs: str, out: str) -> dict[str, Any]:
    """Write what the bundle makes of the pairs: ``images`` (n, H, W, 3) uint8."""
    found = images_of(bundle, backend, load_pairs(pairs)[0])
    stream = BytesIO()
    np.savez(stream, images=found)
    write_bytes(Path(out), stream.getvalue())
    return {"count": len(found)}


def open_engine(label: str, bundle: str, backend: str, pairs: str) -> dict[str, Any]:
    """Time the frame of a bundle: from the drawn pose and, as ``LABEL, drawing included``, from keypoints.

    Returns its distance from torch in FP32, so that it is seen to do the same work.
    """
    drawn, made = load_pairs(pairs)
    pipe = timing.RESOURCES.enter_context(Pipeline.open(bundle, backend))
    person, pose = pipe.prepare(drawn.sources[0]), drawn.poses[0]
    given = pipe.pose_input(pose)
    timing.add(label, lambda: pipe.render_input(person, given))
    timing.add(f"{label}, drawing included", lambda: pipe.render(person, pose))
    return {"psnr_db": psnr_db(made["frame"], pipe.render_input(person, given))}


def host_time(bundle: str, pairs: str) -> dict[str, Any]:
    """Seconds of the CPU per frame outside the copies, TensorRT only: medians over frames.

    ``enqueue_s`` is the start of a frame whose inputs are on the GPU, ``collect_s`` fetching a frame that is done, of
    which ``copy_s`` is the copy of the picture to the caller.
    """
    loaded, (drawn, _) = artifact.load(bundle, "bundle"), load_pairs(pairs)
    with Pipeline.open(bundle, ON_GPU) as pipe:
        feeds = pipe.feeds(pipe.prepare(drawn.sources[0]), pipe.pose_input(drawn.poses[0]))
        feeds = {name: np.array(array) if name != "noise" else array for name, array in feeds.items()}
    runtime, options = runtimes.load(ON_GPU), loaded.config["backends"][ON_GPU]
    engine = loaded.path / "engines" / ON_GPU / "frame"
    with runtime.open(engine, loaded.signatures["frame"], options) as opened:
        session: Any = opened  # with enqueue, buffers and outputs
        kept = {name: array if name in ("pose", "noise") else session.keep(array) for name, array in feeds.items()}
        for _ in range(10):  # every slot's buffers hold these inputs afterwards
            session.run(kept)
        times = np.array([_host_frame(session) for _ in range(HOST_FRAMES)])
    enqueue_s, collect_s, copy_s = (float(value) for value in np.median(times, axis=0))
    return {"host_s": enqueue_s + collect_s - copy_s, "enqueue_s": enqueue_s, "collect_s": collect_s, "copy_s": copy_s}


def _host_frame(session: Any) -> tuple[float, float, float]:
    feeds = session.buffers()
    start = time.perf_counter()
    pending = session.enqueue(feeds)
    started = time.perf_counter()
    session.outputs(pending)  # waits for the GPU
    done = time.perf_counter()
    image = pending.wait()["image"]
    collected = time.perf_counter()
    image.copy()
    return started - start, collected - done, time.perf_counter() - collected


def memory_rounds(bundle: str, backend: str, pairs: str, count: int, seconds: float) -> dict[str, Any]:
    """Open, prepare, render and close up to ``count`` times within ``seconds``: bytes in use after each round."""
    drawn, end = load_pairs(pairs)[0], time.monotonic() + seconds
    host: list[int] = []
    gpu: list[int] = []
    while len(host) < count and time.monotonic() < end:
        with Pipeline.open(bundle, backend) as pipe:
            pipe.render_input(pipe.prepare(drawn.sources[0]), pipe.pose_input(drawn.poses[0]))
        host.append(resident_bytes())
        if backend == ON_GPU:
            from runtimes.trt.cuda import checked_call, runtime_api

            free, total = _memory_info(runtime_api(), checked_call)
            gpu.append(total - free)
    return {"host_bytes": host, "gpu_bytes": gpu}


def _memory_info(api: Any, checked_call: Any) -> tuple[int, int]:
    checked_call(api, "cudaDeviceSynchronize")
    _, free, total = api.cudaMemGetInfo()
    return int(free), int(total)


def resident_bytes() -> int:
    """This process's resident memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


VERBS: dict[str, Verb] = timing.VERBS | {
    "engine_machine": engine_machine,
    "build": build,
    "conformance": conformance,
    "images": images,
    "open_engine": open_engine,
    "host_time": host_time,
    "memory_rounds": memory_rounds,
}
