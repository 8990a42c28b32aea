"""Speed of a frame: every case, the engine against eager torch, and what the pipeline adds to the engine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest

from benchmarks.roofline import graph_flops, peak_flops
from rpfm_edge.bundle.pipeline import Person, Pipeline
from rpfm_edge.core import artifact
from rpfm_edge.core.errors import BackendError
from rpfm_edge.measure import device_state, machine
from rpfm_edge.measure.clock import Latency, steady
from rpfm_edge.people.splits import open_splits
from runtimes import ov

SPEEDUP, OVERHEAD = 3.0, 0.05  # at least, at most
WARMUP = 5
ARITHMETIC = {"fp16": "fp16", "int8": "int8"}  # of the products of a graph; others compute in fp32


def peak_memory_bytes(bundle: Path, backend: str, data: str) -> int:
    """Peak resident memory of a process of its own that renders a few frames."""
    command = [sys.executable, "-m", "benchmarks.memory", str(bundle), backend, data]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return int(done.stdout.split()[-1])


def roofline(bundle: Path, backend: str, precision: str, p50_s: float) -> dict[str, float]:
    """Operations of a frame, of the machine's best second, and the share of it that the frame reaches."""
    options = artifact.load(bundle, "bundle", verify=False).config["backends"][backend]
    flops = graph_flops(onnx.load(bundle / "frame.onnx"))
    peak = peak_flops(backend, ARITHMETIC.get(precision, "fp32"), options)
    return {"frame_flops": flops, "peak_flops_per_s": peak, "share_of_peak": flops / p50_s / peak}


def test_frame(benchmark: Any, case: Any, chosen: Any, request: pytest.FixtureRequest) -> None:
    """``Pipeline.render`` of one case; raw rounds in ``data``, the rest in ``extra_info``."""
    try:
        bundle = case.bundle or request.getfixturevalue("builder").bundle(case.precision, case.steps, [case.backend])
        with ExitStack() as stack:
            pipe, person, pose = opened(stack, bundle, case.backend, chosen.data)
            for _ in range(WARMUP):  # before the reading: the energy is that of the counted frames
                pipe.render(person, pose)
            before = device_state.read()
            benchmark.pedantic(pipe.render, (person, pose), rounds=chosen.rounds)
            state = device_state.around(before, chosen.rounds)
    except BackendError as error:
        pytest.skip(str(error))
    times = Latency(tuple(benchmark.stats.stats.data))
    figures = {name: value for name, value in times.to_json().items() if name != "values_s"}
    benchmark.extra_info |= {
        "case": {**vars(case), "bundle": str(bundle)},
        **figures,
        "peak_memory_bytes": peak_memory_bytes(bundle, case.backend, chosen.data),
        **roofline(bundle, case.backend, case.precision, times.p50_s),
        "state": state,
        "machine": machine.where(artifact.tool_versions("torch", "openvino", "onnxruntime", "numpy")),
    }


def opened(stack: ExitStack, bundle: Path, backend: str, data: str) -> tuple[Pipeline, Person, np.ndarray]:
    """A pipeline, the person of the first held-out pair, and the pose of its target."""
    pipe = stack.enter_context(Pipeline.open(bundle, backend))
    test = open_splits(data).test
    source, target = (int(index) for index in test.pairs[0])
    return pipe, pipe.prepare(test.image(source, pipe.size)), test.pose(target, pipe.size)


def rows(times: Mapping[str, Latency]) -> list[list[str]]:
    """Percentiles in ms, frames per second, and whether the times had settled."""
    return [
        [name, *(f"{1e3 * value:.2f}" for value in (t.p50_s, t.p95_s, t.p99_s)), f"{t.fps:.1f}", str(t.stable)]
        for name, t in times.items()
    ]


HEADER = ("call", "p50 ms", "p95 ms", "p99 ms", "per second", "stable")


def test_engine_against_eager_torch(benchmark: Any, conclude: Any, bundles: dict[str, Path], chosen: Any) -> None:
    """``Pipeline.render`` of the same student in OpenVINO and in torch, in turns."""
    cases = {"torch fp32, eager": ("fp32", "torch"), "openvino fp32": ("fp32", "openvino")}
    cases["openvino int8"] = ("int8", "openvino")
    with ExitStack() as stack:
        calls: dict[str, Callable[[], object]] = {}
        for name, (precision, backend) in cases.items():
            pipe, person, pose = opened(stack, bundles[precision], backend, chosen.data)
            calls[name] = lambda pipe=pipe, person=person, pose=pose: pipe.render(person, pose)  # type: ignore[misc]
        times = benchmark.pedantic(steady, (calls, chosen.rounds, WARMUP), rounds=1)
    torch_s = times["torch fp32, eager"].p50_s
    ratios = {name: torch_s / t.p50_s for name, t in times.items() if name.startswith("openvino")}
    conclude(
        f"frame at 1 step, {chosen.rounds} rounds in turns",
        (*HEADER, "× torch"),
        [[*row, f"{torch_s / times[row[0]].p50_s:.2f}"] for row in rows(times)],
        {f"{name} at least {SPEEDUP:g} × as fast as torch": ratio >= SPEEDUP for name, ratio in ratios.items()},
        ratios=ratios,
        times={name: t.to_json() for name, t in times.items()},
    )


def bare_engine(bundle: Path, feeds: dict[str, np.ndarray]) -> tuple[Callable[[], object], np.ndarray]:
    """OpenVINO's own call with its tensors set beforehand, and the memory that its image comes out in."""
    loaded = artifact.load(bundle, "bundle")
    core = openvino.Core()
    device, settings = ov.compile_settings(core, loaded.config["backends"]["openvino"])
    compiled = core.compile_model(bundle / "engines" / "openvino" / "frame" / ov.MODEL, device, settings)
    request = compiled.create_infer_request()
    image = np.empty(loaded.signatures["frame"].outputs[0].shape, np.uint8)
    for name, array in {**feeds, "image": image}.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
    return lambda: request.infer(share_outputs=True), image


def test_python_around_the_engine(benchmark: Any, conclude: Any, bundles: dict[str, Path], chosen: Any) -> None:
    """``Pipeline.render`` against the bare engine, in turns; in between, without the drawing of the pose."""
    with ExitStack() as stack:
        pipe, person, pose = opened(stack, bundles["int8"], "openvino", chosen.data)
        drawn = pipe.pose_input(pose)
        feeds = pipe.feeds(person, drawn)
        bare, image = bare_engine(bundles["int8"], feeds)
        calls = {
            "bare engine": bare,
            "Pipeline.render_input": lambda: pipe.render_input(person, drawn),
            "Pipeline.render": lambda: pipe.render(person, pose),
        }
        times = benchmark.pedantic(steady, (calls, chosen.rounds, WARMUP), rounds=1)
        np.testing.assert_array_equal(image[0], pipe.render(person, pose))  # both did the same work
    bare_s = np.array(times["bare engine"].values_s)
    shares = {name: float(np.median(np.array(t.values_s) - bare_s)) / t.p50_s for name, t in times.items()}
    share = shares["Pipeline.render"]
    conclude(
        f"openvino int8, frame at 1 step, {chosen.rounds} rounds in turns",
        (*HEADER, "beside the engine"),
        [[*row, f"{shares[row[0]]:.1%}"] for row in rows(times)],
        {f"Pipeline.render spends {share:.1%} beside the engine, at most {OVERHEAD:.0%}": share <= OVERHEAD},
        overhead_shares=shares,
        times={name: t.to_json() for name, t in times.items()},
    )
