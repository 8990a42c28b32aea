"""Every loop opened, checked to make the same picture, and timed in turns."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.peers import loops
from benchmarks.peers.loops import Draw, Subject
from rpfm_edge.core.artifact import tool_versions
from rpfm_edge.core.errors import BackendError, ConfigError, ParityError
from rpfm_edge.measure import clock, device_state
from rpfm_edge.measure.clock import steady
from rpfm_edge.measure.machine import where
from rpfm_edge.measure.metrics import psnr_db
from rpfm_edge.people.pose import draw_skeleton

LIBRARIES = ("torch", "diffusers", "onnxruntime", "openvino", "numpy")
SAME_DB = {"fp32": 50.0, "int8": 25.0}  # at least, to eager torch: the same work was done
SLOW_ROUNDS = 12  # fast rounds for each one of the teacher


@dataclass(frozen=True)
class Peer:
    """A row: how its loop is built, what it computes in, and whether it is the teacher."""

    name: str
    build: Callable[[Subject], Draw]
    precision: str = "fp32"
    teacher: bool = False


PEERS = (
    Peer("rpfm-edge, OpenVINO INT8", partial(loops.ours, "int8", "openvino"), "int8"),
    Peer("OpenVINO's own loop INT8", partial(loops.openvino_loop, "int8"), "int8"),
    Peer("rpfm-edge, OpenVINO FP32", partial(loops.ours, "fp32", "openvino")),
    Peer("OpenVINO's own loop FP32", partial(loops.openvino_loop, "fp32")),
    Peer("rpfm-edge, ONNX Runtime FP32", partial(loops.ours, "fp32", "onnxruntime")),
    Peer("ONNX Runtime's own loop FP32", partial(loops.onnxruntime_loop, "fp32")),
    Peer("torch.compile FP32", loops.compiled),
    Peer("torch FP32, eager", loops.eager),
    Peer("diffusers pipeline FP32, source kept", partial(loops.diffusers_pipeline, False)),
    Peer("diffusers pipeline FP32", partial(loops.diffusers_pipeline, True)),
    Peer("torch, CUDA graph, on the GPU", loops.cuda_graph),
    Peer("torch.compile, on the GPU", loops.compiled_gpu),
    Peer("teacher, 25 steps, torch FP32", partial(loops.teacher, 25), teacher=True),
    Peer("teacher, 50 steps, torch FP32", partial(loops.teacher, 50), teacher=True),
)
ANCHOR = PEERS[0].name


def measure_peers(
    given: Subject, pose: np.ndarray, rounds: int, only: Sequence[str] | None, cache: str
) -> dict[str, Any]:
    """Rows with times, the machine and its state; a peer that this machine cannot run has its ``reason``.

    A frame is timed twice: with the drawing of the pose (``frame``) and without (``bare``).
    """
    if unknown := set(only or ()) - {peer.name for peer in PEERS}:
        raise ConfigError(
            f"no peer is called {min(unknown)!r}",
            expected=f"one of {[peer.name for peer in PEERS]}",
            fix="check the spelling",
        )
    os.environ["RPFM_EDGE_CACHE"] = cache  # engines are compiled anew, as OpenVINO's own loop compiles them
    chosen = [peer for peer in PEERS if not only or peer.name in only]
    before_threads = torch.get_num_threads()
    size = given.person.shape[:2]
    torch.set_num_threads(given.threads)
    try:
        draws, facts = _built(chosen, given, draw_skeleton(pose, size))
        before = device_state.read()
        times = _times(chosen, draws, pose, size, rounds)
        state = device_state.around(before)
    finally:
        torch.set_num_threads(before_threads)
    rows = [
        {"name": p.name, "precision": p.precision, "teacher": p.teacher} | facts.get(p.name, {}) | times.get(p.name, {})
        for p in chosen
    ]
    machine = where(tool_versions(*LIBRARIES))
    known = {"rounds": rounds, "threads": given.threads, "size": list(size), "machine": machine}
    return known | {"state": state, "rows": rows}


def _built(
    chosen: Sequence[Peer], subject: Subject, skeleton: np.ndarray
) -> tuple[dict[str, Draw], dict[str, dict[str, Any]]]:
    """Loops that run, and for the others why not; what runs must draw what eager torch draws."""
    expected = loops.eager(subject)(skeleton)
    draws: dict[str, Draw] = {}
    facts: dict[str, dict[str, Any]] = {}
    for peer in chosen:
        try:
            draw = peer.build(subject)
            near = psnr_db(expected, draw(skeleton))
        except BackendError as error:
            facts[peer.name] = {"reason": str(error)}
            continue
        if not peer.teacher and near < SAME_DB[peer.precision]:
            raise ParityError(
                f"{peer.name} is {near:.1f} dB from eager torch",
                expected=f"at least {SAME_DB[peer.precision]:g}",
                fix="check its loop",
            )
        draws[peer.name], facts[peer.name] = draw, {"psnr_to_eager_db": min(near, 100.0)}
    return draws, facts


def _times(
    chosen: Sequence[Peer], draws: dict[str, Draw], pose: np.ndarray, size: tuple[int, int], rounds: int
) -> dict[str, dict[str, Any]]:
    """Students in turns; then the teachers, which take long, in turns with the first student."""
    skeleton = draw_skeleton(pose, size)
    with_pose: dict[str, clock.Call] = {n: lambda d=d: d(draw_skeleton(pose, size)) for n, d in draws.items()}  # type: ignore[misc]
    without: dict[str, clock.Call] = {n: lambda d=d: d(skeleton) for n, d in draws.items()}  # type: ignore[misc]
    slow = [peer.name for peer in chosen if peer.teacher and peer.name in draws]
    fast = [name for name in draws if name not in slow]
    calls = {f"{name}|frame": with_pose[name] for name in fast} | {f"{name}|bare": without[name] for name in fast}
    times: dict[str, dict[str, Any]] = {}
    for key, latency in steady(calls, rounds, warmup=3).items() if calls else ():
        name, what = key.split("|")
        times.setdefault(name, {})[what] = latency.to_json()
    if slow:
        anchor = {ANCHOR: with_pose[ANCHOR]} if ANCHOR in draws else {}
        found = clock.interleaved({**anchor, **{n: with_pose[n] for n in slow}}, max(3, rounds // SLOW_ROUNDS), 1)
        for name in slow:
            times[name] = {"frame": found[name].to_json()}
            if anchor:
                times[name]["anchor_s"] = found[ANCHOR].p50_s
    return times
