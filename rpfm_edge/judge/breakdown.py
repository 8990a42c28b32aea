"""Where the time of a frame goes: pose drawing, alignment, pose encoder, each step, decoder, and what lies around the
engine.

Layers come from the backend's own profiler (``Runtime.profile``) and are put into stages by where their ONNX nodes
stand in the frame graph, never by the exporter's names.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rpfm_edge.bundle.engines import engine_versions, require_engine
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, ConfigError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.core.runtime import LayerTime
from rpfm_edge.core.source_map import fetches, map_nodes
from rpfm_edge.measure import clock, device_state, machine
from rpfm_edge.measure.clock import steady

SAME = ("Cast", "QuantizeLinear", "DequantizeLinear", "Identity")  # what these make is still the noise, or the state
ALIGNMENT, POSE, SOURCE, DECODER = "alignment", "pose encoder", "source's keys and values", "decoder"
DRAWING, AROUND, UNKNOWN = "pose drawing", "calls and copies", "layers of no known node"
TURNS = 3  # of profiler and clock, since the speed of a machine drifts


@dataclass(frozen=True, slots=True)
class StageTime:
    """Seconds of one stage of a frame, and its share of the whole frame."""

    stage: str
    seconds: float
    share: float


def stages(model: Any) -> dict[str, str]:
    """Node → stage of a "frame" graph (``onnx.ModelProto``), for each node that depends on an input.

    The pose encoder is what the pose reaches and the noise does not, if it reaches a step; what only the decoder sees
    belongs to that. The alignment, where there is one, is the map (``source_map``), what fetches the source by it, and
    what is made of the map alone. The state of the flow is the noise, also scaled and moved by what it does not reach,
    and then what an addition makes of the state and of something that was computed from it: as many updates as there
    are steps. What depends on k updates belongs to step k + 1, and after the last one to the decoder.

    Raises:
        ArtifactError: the graph has no input ``pose`` or ``noise``, or never updates the noise.
    """
    require_inputs(model)
    reach: dict[str, set[str]] = {tensor.name: {tensor.name} for tensor in model.graph.input}
    updates, states = {"noise": 0}, {"noise"}  # tensor → updates behind it; the tensors that are the state
    placed: dict[str, tuple[set[str], int]] = {}
    for node in model.graph.node:  # in topological order
        inputs = [tensor for tensor in node.input if tensor in reach]
        if not inputs:
            continue
        found = set().union(*(reach[tensor] for tensor in inputs))
        count = max(updates.get(tensor, 0) for tensor in inputs)
        placed[node.name] = found, count
        if is_update(node, reach, states):
            states, count = set(node.output), count + 1
        elif states & set(inputs) and (node.op_type in SAME or is_start(node, reach)):
            states |= set(node.output)
        reach |= dict.fromkeys(node.output, found)
        updates |= dict.fromkeys(node.output, count)
    last = max(updates.values())
    if not last:
        raise ArtifactError(
            "the graph never adds to its noise", expected="a frame graph of a student", fix="export the student again"
        )
    stage = {name: _stage(found, count, last) for name, (found, count) in placed.items()}
    return stage | _before_the_noise(model, stage)


def _before_the_noise(model: Any, stage: Mapping[str, str]) -> dict[str, str]:
    """Those of the pose encoder's nodes and of the source's that belong to the alignment or to the decoder."""
    mapped, fetching = map_nodes(model), fetches(model)
    varying = {tensor for node in model.graph.node if node.name in stage for tensor in node.output}
    made, alone = set[str](), set[str]()  # tensors of the map, and the nodes that see nothing else
    for node in model.graph.node:
        seen = varying.intersection(node.input)
        if node.name in mapped or (seen and seen <= made and node.name not in fetching and stage[node.name] == POSE):
            alone.add(node.name)
            made.update(node.output)
    steps = {
        tensor for node in model.graph.node if stage.get(node.name, "").startswith("step ") for tensor in node.input
    }
    found: dict[str, str] = {}
    for node in reversed(model.graph.node):
        if stage.get(node.name) in (POSE, SOURCE):
            if node.name in alone | fetching:
                found[node.name] = ALIGNMENT
            elif not steps.intersection(node.output):
                found[node.name] = DECODER
            steps.update(node.input if steps.intersection(node.output) else ())
    return found


def require_inputs(model: Any) -> None:
    """Raise ``ArtifactError`` unless the graph has a pose and a noise."""
    inputs = sorted(tensor.name for tensor in model.graph.input)
    if not {"pose", "noise"} <= set(inputs):
        raise ArtifactError(f"the graph has the inputs {inputs}", expected="pose and noise", fix="give a frame graph")


def is_update(node: Any, reach: Mapping[str, set[str]], states: set[str]) -> bool:
    """Whether ``node`` adds to the state something that was computed from it."""
    others = [tensor for tensor in node.input if tensor not in states]
    return node.op_type == "Add" and len(others) == 1 and "noise" in reach.get(others[0], ())


def is_start(node: Any, reach: Mapping[str, set[str]]) -> bool:
    """Whether ``node``, one of whose inputs is the state, scales or moves it by what the noise does not reach."""
    return node.op_type in ("Add", "Mul") and sum("noise" in reach.get(tensor, ()) for tensor in node.input) == 1


def _stage(reach: set[str], updates: int, steps: int) -> str:
    if "noise" in reach:
        return DECODER if updates == steps else f"step {updates + 1}"
    return POSE if "pose" in reach else SOURCE


def by_stage(layers: Sequence[LayerTime], where: Mapping[str, str]) -> dict[str, float]:
    """Stage → seconds, in the order of the frame.

    A fused kernel counts for the stage of most of its nodes. A kernel of no known node (a reorder, say) counts for the
    stage of the kernels around it, if they agree.
    """
    votes = [Counter(where[name] for name in layer.names if name in where) for layer in layers]
    known = [vote.most_common(1)[0][0] if vote else None for vote in votes]
    seconds: dict[str, float] = defaultdict(float)
    for index, layer in enumerate(layers):
        before = next((stage for stage in reversed(known[:index]) if stage), None)
        after = next((stage for stage in known[index + 1 :] if stage), None)
        around = before if before == after or after is None else after if before is None else None
        seconds[known[index] or around or UNKNOWN] += layer.seconds
    order = (
        ALIGNMENT,
        POSE,
        SOURCE,
        *sorted({s for s in seconds if s.startswith("step ")}, key=_number),
        DECODER,
        UNKNOWN,
    )
    return {stage: seconds[stage] for stage in order if stage in seconds}


def breakdown(bundle: Artifact, backend: str, source: Any, pose: np.ndarray, rounds: int = 30) -> dict[str, Any]:
    """The stages of a frame of ``bundle`` on ``backend``, measured now in at least ``rounds`` rounds.

    ``Pipeline.render`` and its parts are timed in turns, and the profiler runs between the turns. So the layers are as
    slow as the profiler makes them, and "calls and copies" is what remains of the engine's call without it: feeds
    checked, tensors in and out, the library's own call, Python. It is negative where the profiler costs more than that.

    Returns:
        backend, precision, steps, ``frame_s``, ``stages`` (of ``StageTime``), ``state``, ``machine``.

    Raises:
        BackendError: the library cannot say what each layer costs, or the package onnx is missing.
        ConfigError: less than one round.
    """
    if rounds < 1:
        raise ConfigError(f"{rounds} rounds", expected="at least 1", fix="ask for more")
    onnx = import_extra("onnx", "profile")
    where = stages(onnx.load(bundle.file("frame.onnx"), load_external_data=False))
    before = device_state.read()
    layers: dict[str, list[float]] = defaultdict(list)
    parts: dict[str, list[float]] = defaultdict(list)
    for _ in range(TURNS):
        timed, found = _turn(bundle, backend, source, pose, math.ceil(rounds / TURNS))
        for name, latency in timed.items():
            parts[name] += latency.values_s
        for stage, seconds in by_stage(found, where).items():
            layers[stage].append(seconds)
    times = {DRAWING: parts[DRAWING], **layers}
    medians = {stage: float(np.median(values)) for stage, values in times.items()}
    frame_s, engine_s = (float(np.median(parts[name])) for name in ("frame", "engine"))
    medians[AROUND] = engine_s - sum(medians[stage] for stage in layers)
    return {
        "backend": backend,
        "precision": bundle.config["precision"],
        "steps": bundle.config["steps"],
        "frame_s": frame_s,
        "stages": [StageTime(stage, seconds, seconds / frame_s) for stage, seconds in medians.items()],
        "state": device_state.around(before),
        "machine": machine.where(engine_versions(bundle, backend)),
    }


def _turn(
    bundle: Artifact, backend: str, source: Any, pose: np.ndarray, runs: int
) -> tuple[dict[str, clock.Latency], list[LayerTime]]:
    """Times of the frame and its parts, and the profiler's layers."""
    with Pipeline.open(bundle, backend) as pipe:
        person, drawn = pipe.prepare(source), pipe.pose_input(pose)
        feeds = {name: np.array(array) for name, array in pipe.feeds(person, drawn).items()}
        calls: dict[str, clock.Call] = {
            DRAWING: lambda: pipe.pose_input(pose),
            "engine": lambda: pipe.render_input(person, drawn),
            "frame": lambda: pipe.render(person, pose),
        }
        timed = steady(calls, runs, warmup=2)
    engine, options = bundle.path / "engines" / backend / "frame", bundle.config["backends"][backend]
    runtime = require_engine(bundle, backend)
    return timed, runtime.profile(engine, bundle.signatures["frame"], options, feeds, runs)


def _number(stage: str) -> int:
    return int(stage.rpartition(" ")[2])
