"""The measured peers as they are read: a table, a plot, and the targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from rich.table import Table

from rpfm_edge.measure.verdict import resampled_medians
from rpfm_edge.report.page import format_number
from rpfm_edge.report.plots import bars_png

BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"
COLUMNS = ("Loop", "Frames per second", "p50 (ms)", "p95 (ms)", "Without pose drawing, p50 (ms)", "Frame time, × ours")
OWN, OURS = "OpenVINO's own loop", "rpfm-edge, OpenVINO"
DIFFUSERS, FIRST = "diffusers pipeline FP32, source kept", f"{OURS} INT8"
OVERHEAD, SPEEDUP = 1.05, 2.0  # at most, at least
Row = Mapping[str, Any]


def ratio(rows: Mapping[str, Row], name: str, to: str, what: str = "frame", to_what: str = "") -> float:
    """Median over the rounds of the frame time of ``name`` in multiples of that of ``to``, round by round."""
    return float(np.median(np.divide(rows[name][what]["values_s"], rows[to][to_what or what]["values_s"])))


def interval(rows: Mapping[str, Row], name: str, to: str) -> tuple[float, float]:
    """95 % interval of ``ratio``, by the gate's bootstrap: in blocks, since successive rounds resemble each other."""
    ratios = np.divide(rows[name]["frame"]["values_s"], rows[to]["frame"]["values_s"])
    low, high = np.percentile(resampled_medians(ratios, 0), [2.5, 97.5])
    return float(low), float(high)


def verdicts(result: Mapping[str, Any]) -> dict[str, bool]:
    """Target in words → whether it is met, by the estimate; only of what was measured. An interval that holds the
    target asks for more rounds."""
    rows = {row["name"]: row for row in result["rows"] if "frame" in row}
    found: dict[str, bool] = {}
    for precision in ("INT8", "FP32"):
        ours, own = f"{OURS} {precision}", f"{OWN} {precision}"
        if ours in rows and own in rows:
            whole, bare = ratio(rows, ours, own), ratio(rows, ours, own, "bare")
            end_to_end = ratio(rows, ours, own, "frame", "bare")
            span = "{:.3f} … {:.3f}".format(*interval(rows, ours, own))
            others = f"{bare:.3f} × both without; ours with, OpenVINO's without: {end_to_end:.3f} ×"
            text = f"{precision}: our loop takes {whole:.3f} × OpenVINO's own ({span}), both with drawing"
            found[f"{text} ({others}), at most {OVERHEAD:g} ×"] = whole <= OVERHEAD
    if DIFFUSERS in rows:
        for ours in (name for name in rows if name.startswith(OURS)):
            speed = ratio(rows, DIFFUSERS, ours)
            found[f"{ours} is {speed:.1f} × as fast as diffusers' loop, at least {SPEEDUP:g} ×"] = speed >= SPEEDUP
    return found


def cells(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The rows as text, fastest first; then what could not run."""
    timed = sorted((row for row in result["rows"] if "frame" in row), key=lambda row: row["frame"]["p50_s"])
    rows = {row["name"]: row for row in timed}
    for row in timed:
        times, bare = row["frame"], row.get("bare")
        if "anchor_s" in row:
            against = f"{times['p50_s'] / row['anchor_s']:.0f}"
        else:
            against = f"{ratio(rows, row['name'], FIRST):.2f}" if FIRST in rows else "–"
        middle = tuple(map(format_number, (times["fps"], 1e3 * times["p50_s"], 1e3 * times["p95_s"])))
        yield (row["name"], *middle, format_number(1e3 * bare["p50_s"]) if bare else "–", against)
    for row in result["rows"]:
        if "reason" in row:
            yield (row["name"], *("–",) * (len(COLUMNS) - 1))


def caption(result: Mapping[str, Any]) -> str:
    """How and where it was measured, in words."""
    machine, before, after = result["machine"], result["state"]["before"], result["state"]["after"]
    versions = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in machine["versions"].items())
    load = " and ".join(f"{state['cpu']['load_average']:.1f}" for state in (before, after))
    how = f"steps: {result['steps']}, {result['threads']} threads, {result['rounds']} rounds in turns"
    return (
        f"One run on {machine['cpu']}, {how}, {versions}; load average {load} before and after. All loops draw the "
        "pose, and make the same picture at the same noise (checked); ours is Pipeline.render. × ours: median of the "
        "ratios, round by round, to the first row of ours. The teachers take turns with that row."
    )


def markdown(result: Mapping[str, Any]) -> str:
    """Caption, table, and the reasons of what could not run."""
    table = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    table += ["| " + " | ".join(row) + " |" for row in cells(result)]
    reasons = [f"- {row['name']}: {row['reason']}" for row in result["rows"] if "reason" in row]
    met = [f"- {text}: {'met' if yes else '**missed**'}" for text, yes in verdicts(result).items()]
    lines = [fill(caption(result), 120), "", *table, "", *(met or ["- no target was measured"])]
    return "\n".join([*lines, *(["", "Not run:", "", *reasons] if reasons else [])]) + "\n"


def rich_table(result: Mapping[str, Any]) -> Table:
    """The table for a terminal."""
    table = Table(*COLUMNS, title=caption(result), box=None, title_justify="left")
    for row in cells(result):
        table.add_row(*row)
    return table


def picture(result: Mapping[str, Any]) -> bytes:
    """Frames per second as bars, ours marked."""
    rows: Sequence[Row] = sorted((r for r in result["rows"] if "frame" in r), key=lambda r: r["frame"]["p50_s"])
    marked = [row["name"] for row in rows if row["name"].startswith("rpfm-edge")]
    return bars_png(
        {row["name"]: row["frame"]["fps"] for row in rows}, "frames per second, pose drawing included", marked
    )
