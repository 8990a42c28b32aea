"""What was found, as Markdown and as verdicts on the targets. Nothing is judged where no GPU was used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rpfm_edge.core.files import json_digest
from scripts.gpu_parts.timing import ratio

Found = Mapping[str, Mapping[str, Any]]  # part → what it found
EAGER, BEST = "torch eager", "torch.compile + CUDA graph"
COMPILED_RATIO, EAGER_RATIO, TEACHER_RATIO = 1.3, 5.0, 100.0
HOST_S, FRAMES_PER_SECOND = 60e-6, 700.0
DRIFT_DB = {"fp16": 45.0, "int8": 35.0}
WARMUP_ROUNDS, GROWTH_MIB, MEMORY_ROUNDS = 20, 4.0, 1000
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target, what was measured, and whether it is met."""

    target: str
    measured: str
    met: bool


def verdicts(found: Found) -> list[Verdict]:
    """The targets of which something was measured. Engines are TensorRT's."""
    return [*_frames(found), *_drift(found), *_memory(found), *_conformance(found)]


def _frames(found: Found) -> Iterator[Verdict]:
    for name, part in _of(found, "frame"):
        times, half = part["times"], "tensorrt fp16"
        teacher = next((label for label in times if label.startswith("teacher")), "")
        limits = [(BEST, COMPILED_RATIO), (EAGER, EAGER_RATIO), (teacher, TEACHER_RATIO)]
        for slow, least in limits:
            if half in times and slow in times:
                value = ratio(times, slow, half)
                yield Verdict(
                    f"{name}: {half} at least {least:g} × as fast as {slow}", f"{value:.2f} ×", value >= least
                )
        for precision, host in part["host"].items():
            host_us = 1e6 * host["host_s"]
            text = f"{name} {precision}: at most {1e6 * HOST_S:.0f} µs of the CPU per frame outside the copies"
            yield Verdict(text, f"{host_us:.0f} µs", host["host_s"] <= HOST_S)
        drawn = f"{half}, drawing included"
        if name == "s" and drawn in times:
            rate = 1 / times[drawn]["p50_s"]
            text = f"s fp16: at least {FRAMES_PER_SECOND:g} frames per second from keypoints to RGB"
            yield Verdict(text, f"{rate:.0f}", rate >= FRAMES_PER_SECOND)


def _drift(found: Found) -> Iterator[Verdict]:
    for name, part in _of(found, "drift"):
        for stage in part["stages"]:
            least, value = DRIFT_DB[stage["precision"]], stage["against_student"]["psnr_db"]["median"]
            text = f"{name} {stage['precision']}: at least {least:g} dB to torch FP32"
            yield Verdict(text, f"{value:.1f} dB", value >= least)


def _memory(found: Found) -> Iterator[Verdict]:
    for name, part in _of(found, "memory"):
        for place in ("host", "gpu"):
            used = part[f"{place}_bytes"]
            if len(used) > 2 * WARMUP_ROUNDS:
                ends = np.cumsum(part["calls"])[:-1]
                grown = sum(growth_mib(list(one)) for one in np.split(np.array(used), ends))
                enough = len(used) >= MEMORY_ROUNDS
                text = f"{name}: {place} memory grows by at most {GROWTH_MIB:g} MiB in {MEMORY_ROUNDS} rounds"
                yield Verdict(text, f"{grown:.1f} MiB in {len(used)} rounds", enough and grown <= GROWTH_MIB)


def growth_mib(used: list[int]) -> float:
    """Memory at the end less memory at the start, medians of a tenth each, the first rounds left out."""
    settled = np.array(used[WARMUP_ROUNDS:])
    tenth = max(1, len(settled) // 10)
    return float(np.median(settled[-tenth:]) - np.median(settled[:tenth])) / MIB


def _conformance(found: Found) -> Iterator[Verdict]:
    for _, part in _of(found, "conformance"):
        text = f"{part['passed']} passed, {len(part['failed'])} failed, {len(part['skipped'])} skipped"
        yield Verdict("conformance suite passes", text, bool(part["passed"]) and not part["failed"])


def _of(found: Found, kind: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for part, content in found.items():
        if part.partition(" ")[0] == kind:
            yield part.partition(" ")[2], content


def markdown(records: Mapping[str, Mapping[str, Any]], device: str, backend: str, missing: list[str]) -> str:
    """The page: where, frames, drift, engines, targets, and what is missing or failed."""
    found = {name: record["found"] for name, record in records.items() if "found" in record}
    failed = {name: record["failed"] for name, record in records.items() if "failed" in record}
    lines = [*_where(found, device, backend), *_frame_table(found), *_drift_table(found), *_engine_table(found)]
    if device == "gpu":
        rows = [[one.target, one.measured, "met" if one.met else "**missed**"] for one in verdicts(found)]
        lines += _table(("Target", "Measured", ""), rows)
    lines += [f"- Failed: {name}: {reason}" for name, reason in failed.items()]
    lines += [f"- Not measured yet: {', '.join(missing)}"] if missing else []
    return "\n".join(lines) + "\n"


def _where(found: Found, device: str, backend: str) -> list[str]:
    machine = found.get("machine", {})
    sides = [machine[side] for side in ("engine", "torch") if side in machine]
    versions = {name: version for side in sides for name, version in side["machine"]["versions"].items()}
    gpu = next((side["gpu"]["name"] for side in sides if isinstance(side["gpu"], dict)), None)
    cpu = sides[0]["machine"]["cpu"] if sides else "?"
    lines = [f"{gpu or cpu}; {', '.join(f'{name} {version}' for name, version in versions.items())}", ""]
    if device == "cpu":
        lines += [f"**No GPU was used: {backend} stands in for TensorRT, and no target is judged.**", ""]
    return lines


def _frame_table(found: Found) -> list[str]:
    rows = []
    for name, part in _of(found, "frame"):
        times = part["times"]
        for label, one in sorted(times.items(), key=lambda pair: -pair[1]["p50_s"]):
            ratios = [f"{ratio(times, slow, label):.2f}" if slow in times else "–" for slow in (EAGER, BEST)]
            cells = [f"{1e3 * one['p50_s']:.3f}", f"{1e3 * one['p95_s']:.3f}", f"{1 / one['p50_s']:.0f}"]
            distance = part["psnr_db"].get(label)
            kind = part["dtype"] if label.startswith(("torch", "teacher")) else ""
            rows.append(
                [name, f"{label} {kind}".strip(), *cells, *ratios, f"{distance:.1f}" if distance is not None else "–"]
            )
    header = (
        "Case",
        "Frame",
        "p50 (ms)",
        "p95 (ms)",
        "Per second",
        "× eager",
        "× compile + graph",
        "PSNR to FP32 (dB)",
    )
    return _table(header, rows)


def _drift_table(found: Found) -> list[str]:
    rows = []
    for name, part in _of(found, "drift"):
        first = [] if not part["trained"] else found.get(f"reference {name}", {}).get("stages", [])[1:]
        for stage in [*first, *part["stages"]]:
            cells = [
                f"{stage[key]['psnr_db']['median']:.1f}" if key in stage and (part["trained"] or key == MODEL) else "–"
                for key in (MODEL, "against_teacher", "against_truth")
            ]
            rows.append([name, stage["stage"], *cells])
    header = ("Case", "Stage", "PSNR to torch FP32 (dB)", "PSNR to the teacher (dB)", "PSNR to the truth (dB)")
    return _table(header, rows)


MODEL = "against_student"


def _engine_table(found: Found) -> list[str]:
    rows = [[name, f"{part['build_s']:.1f}", f"{part['engine_bytes'] / MIB:.1f}"] for name, part in _of(found, "build")]
    return _table(("Bundle", "Build (s)", "Engines (MiB)"), rows)


def _table(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = [header, ["---"] * len(header), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


def key_of(content: Mapping[str, Any]) -> str:
    """A key in short, to compare."""
    return json_digest(content)
