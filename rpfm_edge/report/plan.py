"""A plan of precisions (``planner.plan_precision``) as it is read: the table of its candidates, and words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpfm_edge.report.frontier import NAMES, Line

COLUMNS = ("Candidate", "INT8 units", "Frames per second", "× FP32", "p50 (ms)", "PSNR (dB)", "SSIM", "Size (MiB)")


def plan_lines(result: Mapping[str, Any]) -> list[Line]:
    """A line for every candidate, slowest first; ``reason``: what it violates. ``best`` is the one that was chosen."""
    rows = sorted(result["frontier"], key=lambda row: -row["frame"]["p50_s"])
    return [_line(row, len(result["units"]), row["name"] == result["chosen"], result["rest"]) for row in rows]


def _line(row: Mapping[str, Any], count: int, chosen: bool, rest: str) -> Line:
    frame, ssim = row["frame"], row["against_float"].get("ssim")
    return Line(
        (
            row["name"].upper() if not row["units"] else f"INT8 and {rest.upper()}",
            f"{len(row['units'])} of {count}",
            f"{frame['fps']:.1f}",
            f"{row['speedup']:.2f}",
            f"{1e3 * frame['p50_s']:.2f}",
            f"{psnr_db(row):.1f}",
            f"{ssim['median']:.4f}" if ssim else "–",  # not measured without scikit-image
            f"{row['engine_bytes'] / 2**20:.1f}",
        ),
        best=chosen,
        reason="; ".join(row["violations"]),
    )


def psnr_db(row: Mapping[str, Any]) -> float:
    """Of a candidate against the float graph; inf if they are equal, for which JSON has null."""
    value = row["against_float"]["psnr_db"]["median"]
    return float("inf") if value is None else float(value)


def plan_caption(result: Mapping[str, Any]) -> str:
    """On what it was measured, and what came out."""
    machine = result["machine"]
    limits = ", ".join(f"{name} {value:g}" for name, value in result["budget"].items()) or "no limit"
    versions = ", ".join(f"{name} {version.partition('-')[0]}" for name, version in machine["versions"].items())
    return (
        f"{NAMES.get(result['target'], result['target'])} on {machine['cpu']}, {machine['usable_cores']} cores, "
        f"{versions}. Drift from the float graph on {len(result['pairs'])} pairs of validation people at the same "
        f"noise (medians), {result['samples']} calibration samples, ranges by {result['estimator']}; a frame is engine "
        f"and copies, all candidates in turns. Budget: {limits}. {verdict(result)}"
    )


def verdict(result: Mapping[str, Any]) -> str:
    """What was chosen, in a sentence."""
    row = next(row for row in result["frontier"] if row["name"] == result["best"])
    if not result["chosen"]:
        return f"Nothing meets the budget; the nearest is {result['best']}: {'; '.join(row['violations'])}."
    if not row["units"]:
        mixed = [other["frame"]["p50_s"] for other in result["frontier"] if other["units"]]
        faster = bool(mixed) and min(mixed) < row["frame"]["p50_s"]
        reason = "No INT8 graph that is faster meets the budget" if faster else "INT8 is not faster here"
        return f"{reason}, so the graph stays in {result['chosen'].upper()}."
    return f"Chosen: {len(row['units'])} of {len(result['units'])} units in INT8, {row['speedup']:.2f} × FP32."
