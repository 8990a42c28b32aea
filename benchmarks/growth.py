"""``python -m benchmarks.growth``: how the cost of a frame grows with size, steps, batch and threads.

The network is a preset with random weights, since no trained one has other sizes: what it draws means nothing, what it
costs is what a trained one costs. It is exported as every student is and runs in OpenVINO in FP32. The points of a
curve are timed in turns. Graphs are kept in ``--out``, and so are the finished curves of each machine.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.roofline import graph_flops
from distill.autoencoder import SmallAutoencoder, SmallAutoencoderConfig
from distill.export import Frame, example_feeds, signatures
from distill.graphs import write_graph
from distill.rpfm import RPFM, preset
from distill.student import Student
from rpfm_edge.core import artifact, files
from rpfm_edge.core.signature import Signature
from rpfm_edge.measure import device_state
from rpfm_edge.measure.clock import Call, steady
from rpfm_edge.measure.machine import where
from rpfm_edge.report.plots import Panel, curves_png
from runtimes import ov


@dataclass(frozen=True)
class Case:
    """A frame graph, and the threads that run it."""

    size: tuple[int, int] = (256, 176)
    steps: int = 1
    batch: int = 1
    threads: int = 2

    @property
    def graph(self) -> str:
        """The name of its file: threads are no part of a graph."""
        return f"{self.size[0]}x{self.size[1]}-{self.steps}-{self.batch}.onnx"


def axes(base: Case, cores: int) -> dict[str, list[Case]]:
    """Name → the points of a curve, one thing changing. Widths are multiples of 16 pixels, near the aspect of 256 ×
    176; a graph has a fixed batch, so every batch is a graph of its own."""
    sizes = ((128, 96), (192, 128), (256, 176), (384, 256), (512, 352))
    threads = sorted({1, cores} | {n for n in (2, 4, 8, 16) if n < cores})
    return {
        "size": [replace(base, size=size) for size in sizes],
        "steps": [replace(base, steps=steps) for steps in (1, 2, 4, 8)],
        "batch": [replace(base, batch=batch) for batch in (1, 2, 4, 8)],
        "threads": [replace(base, threads=n) for n in threads],
    }


def abscissa(axis: str, case: Case) -> int:
    """What a curve is drawn over: pixels for size."""
    return case.size[0] * case.size[1] if axis == "size" else int(getattr(case, axis))


def random_student(name: str, size: tuple[int, int]) -> Student:
    """A preset for pictures of ``size``, with random weights; none is 0, or the exporter would fold layers away."""
    torch.manual_seed(0)
    network = RPFM(preset(name, latent_size=(size[0] // 8, size[1] // 8), step_embedding=True))
    student = Student(network, SmallAutoencoder(SmallAutoencoderConfig()))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return student.eval().requires_grad_(False)


class BatchFrame(nn.Module):
    """``Frame`` for several poses of one person: (B, H, W, 3) skeletons, (B, C, h, w) noise, one person's tensors."""

    def __init__(self, student: Student, steps: int, batch: int) -> None:
        super().__init__()
        self.frame, self.batch = Frame(student, steps), batch

    def forward(self, pose: Tensor, noise: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return self.frame(pose, noise, *(tensor.expand(self.batch, *tensor.shape[1:]) for tensor in tensors))


def make_graph(name: str, case: Case, path: Path) -> None:
    """Export the graph of ``case``, checked against torch as every graph is."""
    student = random_student(name, case.size)
    single = signatures(student, case.size)
    noise = np.random.default_rng(0).standard_normal(single["frame"].input("noise").shape, dtype=np.float32)
    feeds = example_feeds(student, single, noise)["frame"]
    own = ("pose", "noise")  # of each frame
    batched = {key: np.repeat(value, case.batch, 0) if key in own else value for key, value in feeds.items()}
    boundary = Signature(
        tuple(replace(spec, shape=batched[spec.name].shape) for spec in single["frame"].inputs),
        tuple(replace(spec, shape=(case.batch, *spec.shape[1:])) for spec in single["frame"].outputs),
    )
    module = Frame(student, case.steps) if case.batch == 1 else BatchFrame(student, case.steps, case.batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    write_graph(module, boundary, batched, part)
    part.replace(path)


def frame_call(path: Path, threads: int) -> Call:
    """One run of OpenVINO over the graph; inputs are set once."""
    core = openvino.Core()
    device, settings = ov.compile_settings(core, {"threads": threads})
    request = core.compile_model(path, device, settings).create_infer_request()
    rng = np.random.default_rng(0)
    for port in request.model_inputs:
        tensor, shape = request.get_tensor(port), tuple(port.shape)
        draw: Callable[[], Any] = (
            (lambda shape=shape: rng.integers(0, 256, shape))
            if port.element_type == openvino.Type.u8
            else (lambda shape=shape: rng.standard_normal(shape))
        )
        tensor.data[:] = draw()
    return lambda: request.infer(share_outputs=True)


def measure_axis(name: str, axis: str, cases: Sequence[Case], rounds: int, out: Path) -> dict[str, Any]:
    """The curve of one axis: times of all its points in turns, and their operations."""
    for case in cases:
        if not (out / case.graph).is_file():
            make_graph(name, case, out / case.graph)
    before = device_state.read()
    times = steady({str(k): frame_call(out / case.graph, case.threads) for k, case in enumerate(cases)}, rounds, 2)
    points = [
        {
            "case": asdict(case),
            "x": abscissa(axis, case),
            "flops": graph_flops(onnx.load(out / case.graph)),
            "call": times[str(k)].to_json(),
            "frame_s": times[str(k)].p50_s / case.batch,
        }
        for k, case in enumerate(cases)
    ]
    state = device_state.around(before)
    return {"preset": name, "rounds": rounds, "points": points, "exponent": exponent(points), "state": state}


def same_machine(machine: dict[str, Any]) -> dict[str, Any]:
    """Of ``measure.where`` what has to be the same for two curves to stand in one picture: no temperatures."""
    board = machine.get("jetson") or {}
    names = ("cpu", "board", "usable_cores", "memory_bytes", "python", "platform", "versions")
    return {name: machine.get(name) for name in names} | {k: board.get(k) for k in ("power_mode", "clocks_locked")}


def exponent(points: Sequence[dict[str, Any]]) -> float | None:
    """k of time per frame ~ x^k by least squares over the logarithms; None for a single point."""
    if len(points) < 2:
        return None
    x, y = (np.log([point[key] for point in points]) for key in ("x", "frame_s"))
    return float(np.polyfit(x, y, 1)[0])


def picture(found: dict[str, dict[str, Any]]) -> bytes:
    """A panel for each axis, milliseconds a frame."""
    labels = {"size": "thousands of pixels", "batch": "frames in a call"}
    return curves_png(
        [
            Panel(labels.get(axis, axis), "ms a frame", {axis: _curve(axis, curve["points"])}, log=True)
            for axis, curve in found.items()
        ]
    )


def _curve(axis: str, points: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    unit = 1000 if axis == "size" else 1
    return [point["x"] / unit for point in points], [1e3 * point["frame_s"] for point in points]


def main() -> None:
    """Measure what is not there yet; write growth.json and growth.png."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--preset", default="xs")
    parser.add_argument("--threads", type=int, default=2, help="of all curves but that of threads")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs/growth"))
    given, console = parser.parse_args(), Console(highlight=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    work, found = given.out / given.preset, {}
    machine = where(artifact.tool_versions("openvino", "torch"))
    device = files.json_digest(same_machine(machine))[:12]
    for axis, cases in axes(Case(threads=given.threads), cores).items():
        kept = work / f"{axis}-{given.threads}-{given.rounds}-{device}.json"
        with suppress(OSError, ValueError):
            found[axis] = json.loads(kept.read_text(encoding="utf-8"))
        if axis not in found:
            found[axis] = measure_axis(given.preset, axis, cases, given.rounds, work)
            files.write_text(kept, json.dumps(found[axis], indent=1))
        for point in found[axis]["points"]:
            rate = point["flops"] / point["call"]["p50_s"] / 1e9
            console.print(f"{axis:8} {point['x']:7d}  {1e3 * point['frame_s']:8.2f} ms a frame  {rate:6.1f} GFLOP/s")
        if found[axis]["exponent"] is not None:  # of one point, such as the threads of one core, there is none
            console.print(f"{axis:8} time of a frame ~ {axis}^{found[axis]['exponent']:.2f}")
    result = {"machine": machine, "precision": "fp32", "backend": "openvino", "weights": "random", "axes": found}
    files.write_text(given.out / "growth.json", json.dumps(result, indent=1))
    files.write_bytes(given.out / "growth.png", picture(found))


if __name__ == "__main__":
    main()
