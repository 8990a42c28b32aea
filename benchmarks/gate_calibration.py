"""How often the gate is right: a frame is slowed by a known share, and the gate judges it, again and again.

    python -m benchmarks.gate_calibration BUNDLE --out runs/gate --runs 50 --seconds 900

Every run is kept below ``--out`` and not measured again, so that the experiment can be stopped and continued. Each
bundle, backend, device and limit has a folder of its own there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rpfm_edge.core import artifact, files
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.files import write_text
from rpfm_edge.judge import baseline, gate
from rpfm_edge.judge.gate import NEW, OLD, GateConfig
from rpfm_edge.measure import machine
from rpfm_edge.measure.clock import Call
from rpfm_edge.measure.rounds import CHUNK_ROUNDS, Chunk, busy_share, joined

SLOWDOWNS = (0.0, 0.05, 0.10, 0.20)
VERDICTS = ("pass", "regression", "unstable")
WAYS = ("a/b", "baseline")


def slowed(call: Call, share: float) -> Call:
    """``call``, then busy work for ``share`` of the time that it has just taken."""

    def run() -> object:
        start = time.perf_counter()
        made = call()
        end = start + (time.perf_counter() - start) * (1 + share)
        while time.perf_counter() < end:
            pass
        return made

    return run


def one_run(bundle: Path, backend: str, way: str, share: float, seed: int, limit_s: float, times: list[float]) -> Any:
    """One verdict of the gate on freshly opened engines; ``times`` are those of the baseline."""
    config, found = GateConfig(limit_s=limit_s, seed=seed), list[Chunk]()
    loaded = artifact.load(bundle, "bundle")
    start = time.perf_counter()
    with ExitStack() as stack:
        new = slowed(gate.frame(stack, loaded, backend), share)
        if way == "a/b":
            calls = {OLD: slowed(gate.frame(stack, loaded, backend), 0.0), NEW: new}
            judgement = gate.compare(calls, config, found)
        else:
            judgement = gate.hold_against(new, times, config, found)
    facts = {"took_s": time.perf_counter() - start, "others": busy_share(found), "load": os.getloadavg()[0]}
    times_s = {name: joined(found, name) for name in found[0].times_s}
    return {
        "way": way,
        "share": share,
        "rounds": len(found) * CHUNK_ROUNDS,
        **judgement.to_json(),
        **facts,
        "times_s": times_s,
    }


def settled_times(bundle: Path, backend: str, limit_s: float, out: Path) -> list[float]:
    """The baseline's times, measured once."""
    if not out.is_file():
        found: list[Chunk] = []
        config = GateConfig(limit_s=limit_s)
        with ExitStack() as stack:
            call = slowed(gate.frame(stack, artifact.load(bundle, "bundle"), backend), 0.0)
            judgement = gate.settle(call, config, found)
        if judgement.reasons:
            raise SystemExit(f"no baseline: {'; '.join(judgement.reasons)}")
        write_text(out, json.dumps(joined(gate.settled_half(found, config), NEW)))
    return list(json.loads(out.read_text(encoding="utf-8")))


def folder_of(out: Path, bundle: Artifact, backend: str, limit_s: float) -> Path:
    """Where the runs of an experiment are kept: no two that are not to be counted together share it."""
    what = [bundle.digest, baseline.fingerprint(bundle, backend), limit_s, artifact.tool_versions()]
    return out / f"{backend}-{files.json_digest(what)[:12]}"


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: verdicts by way and injected slowdown."""
    lines = ["| Way | Injected | Runs | Pass | Regression | Unstable | Estimate, median | Seconds, median |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for way in WAYS:
        for share in SLOWDOWNS:
            mine = [one for one in records if (one["way"], one["share"]) == (way, share)]
            if mine:
                counts = Counter(one["verdict"] for one in mine)
                estimate, took = (sorted(one[key] for one in mine)[len(mine) // 2] for key in ("slowdown", "took_s"))
                cells = [
                    way,
                    f"{share:.0%}",
                    len(mine),
                    *(counts[v] for v in VERDICTS),
                    f"{estimate:+.1%}",
                    f"{took:.0f}",
                ]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure for at most ``--seconds``, then print the table of all runs so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=50, help="of each way and slowdown")
    parser.add_argument("--way", choices=WAYS, action="append", help="default: both")
    parser.add_argument("--seconds", type=float, default=900.0, help="budget; run again to continue")
    parser.add_argument("--limit", type=float, default=60.0, help="of one run, in seconds")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    measured = partial(one_run, given.bundle, given.backend)
    out = folder_of(given.out, artifact.load(given.bundle, "bundle"), given.backend, given.limit)
    for number in range(given.runs):  # all cases in turns, so that quiet and busy hours meet each of them
        for way in given.way or WAYS:
            for share in SLOWDOWNS:
                file = out / f"{way.replace('/', '')}-{share:.2f}-{number:03d}.json"
                if file.is_file() or time.monotonic() > end:
                    continue
                stored = out / "work" / "baseline.json"
                times = settled_times(given.bundle, given.backend, given.limit, stored) if way == "baseline" else []
                write_text(file, json.dumps(measured(way, share, number, given.limit, times)))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    print(table(records))
    where = machine.where()
    print(f"\n{where['cpu']}, {where['usable_cores']} cores; limit {given.limit:g} s a run")


if __name__ == "__main__":
    main()
