"""Judge students against their teacher and the ground truth on many held-out pairs: what does distillation lose?

python scripts/judge_students.py runs/s/teacher runs/s/students/flowmap --data ../shared/people --out F.json

``--bundles`` judges what was made of them for devices on the same pairs, and films it. Pictures are measured in chunks,
kept in ``F.json.work`` like the clips: the same command continues after an interruption, and more ``--pairs`` only
measure what is new. A GPU is used if there is one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rpfm_edge.core.errors import ConfigError, RpfmError
from rpfm_edge.core.flow import plural
from rpfm_edge.judge.gain import GainConfig, measure_gain
from rpfm_edge.measure.metrics import METRICS
from rpfm_edge.people.held_out import ClipConfig
from rpfm_edge.report import tables


def named(students: Sequence[str]) -> dict[str, str]:
    """Students, or bundles, by the names of their folders."""
    names = {Path(student).name: student for student in students}
    if len(names) < len(students):
        raise ConfigError(
            "two students or bundles of one name",
            expected="folders of different names",
            fix="rename one, or judge them apart",
        )
    return names


def table(found: Mapping[str, Any]) -> Table:
    """A row for each network and number of steps; errors in multiples of the teacher's reference."""
    count = len(found["pairs"])
    title = f"{count} held-out pairs of {found['data']}; errors against the truth as multiples of the teacher's (95 %)"
    shown = Table("model", "steps", title=title, box=None, pad_edge=False, title_justify="left")
    for heading in ("to the teacher, dB", "to the truth, dB", "squared error", "FLIP", "LPIPS", "target"):
        shown.add_column(heading, justify="right")
    truth = {(row["student"], row["steps"]): row for row in found["truth"]}
    shown.add_row("teacher, reference", "", "", _mean(found["reference"], "against_truth"))
    for name, by_steps in networks(found).items():
        for steps, distances in by_steps.items():
            row = truth.get((name, int(steps)), {})
            cells = [_mean(distances, side) for side in ("against_teacher", "against_truth")]
            ratios = [_ratio(row.get(metric)) for metric in ("mse", "flip", "lpips")]
            shown.add_row(name, steps, *cells, *ratios, _verdict(row))
    return shown


def networks(found: Mapping[str, Any]) -> dict[str, Any]:
    """Teacher, students and bundles: name → steps → what was measured."""
    return {"teacher, Euler": found["teacher"], **found["students"], **found["bundles"]}


def stages(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same as stages of a validation, for its tables."""
    flicker = {name: {"flicker": summary} for name, summary in found["flicker"].items()}
    reference, truth = "teacher, reference", "ground truth"
    shown = [{"stage": reference, **found["reference"], **flicker.get(reference, {})}]
    for name, by_steps in networks(found).items():
        for steps, measured in by_steps.items():
            shown.append({"stage": f"{name}, {plural(int(steps))}", **measured, **flicker.get(name, {})})
    return [*shown, {"stage": truth, **found["ground_truth"], **flicker.get(truth, {})}]


def _mean(distances: Mapping[str, Any], side: str) -> str:
    return f"{distances[side]['psnr_db']['mean']:.2f}" if "psnr_db" in distances[side] else "–"


def _ratio(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    low, high = found["interval"] or (float("nan"), float("nan"))
    return f"{found['ratio']:.4f} ({low:.4f} … {high:.4f})"


def _verdict(row: Mapping[str, Any]) -> str:
    """Whether every error is within the target."""
    if not row.get("target"):
        return ""
    met = all(row[metric]["ratio"] <= row["target"] for metric in ("mse", "flip", "lpips") if metric in row)
    return f"≤ {row['target']:g}: {'met' if met else 'MISSED'}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 after an error, which is said in one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="a path, a shipped name or a factory")
    parser.add_argument("students", nargs="+", help="paths or shipped names")
    parser.add_argument("--bundles", nargs="+", default=[], help="paths, of different names than the students")
    parser.add_argument("--backend", help="of the bundles; default: the first of each that is installed")
    parser.add_argument("--data", required=True, help="the root of a data set, or sample")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with every value")
    parser.add_argument("--pairs", type=int, default=1600)
    parser.add_argument("--clips", type=int, default=2, help="clips to measure flicker on")
    parser.add_argument("--frames", type=int, default=30, help="of each clip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=32, help="pairs in memory")
    parser.add_argument("--batch", type=int, default=32, help="pairs in the network at a time")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the networks")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="default: all that can be computed")
    options = parser.parse_args(arguments)
    metrics = tuple(options.metrics) if options.metrics else None
    filmed = ClipConfig(options.clips, options.frames, teacher=True)
    numbers = (options.pairs, options.seed, options.chunk, options.batch, options.precision)
    config = GainConfig(*numbers, metrics, poses=True, filmed=filmed, backend=options.backend)
    try:
        named([*options.students, *options.bundles])
        students, bundles = named(options.students), named(options.bundles)
        found = measure_gain(options.teacher, students, options.data, options.out, config, bundles)
    except RpfmError as error:
        print(f"judge_students: {error}", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 160).print(table(found))
    tables.drift({**found, "stages": stages(found)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
