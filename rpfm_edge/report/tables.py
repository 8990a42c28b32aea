"""What commands print, as tables that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rpfm_edge.core.flow import plural
from rpfm_edge.measure.budget import beside_distances
from rpfm_edge.measure.detail import count_scored
from rpfm_edge.measure.flicker import over_truth
from rpfm_edge.report.frontier import lines
from rpfm_edge.report.plan import plan_lines, verdict


def bench(evidence: Mapping[str, Any]) -> None:
    """A row for each backend and call, then what failed or was skipped."""
    shown = table("engine", "call", "p50 ms", "p95 ms", "p99 ms", "per s", "runs")
    for row in rows(evidence):
        shown.add_row(*row)
    console.print(shown)
    for what in ("failures", "skipped"):
        for name, reason in evidence.get(what, {}).items():
            say(f"{name} {what.replace('failures', 'failed')}: {reason}")


def artifact(record: Mapping[str, Any]) -> None:
    """What an artifact is, how it came to be, and its files."""
    say(f"{record['kind']} {record['path']}  digest {record['digest'][:12]}, every sha256 is right")
    for name, signature in record["signatures"].items():
        for side in ("inputs", "outputs"):
            for spec in signature[side]:
                say(f"  {name} {side[:-1]} {spec['name']}: {spec['dtype']}{spec['shape']}")
    for stage in record["lineage"]:
        tools = ", ".join(f"{name} {version}" for name, version in stage["tools"].items())
        say(f"  ← {stage['stage']}  ({tools})")
    for name, file in record["files"].items():
        say(f"  {file['bytes']:>12,} bytes  {name}")
    if record["evidence"]:
        say(f"  evidence: {', '.join(record['evidence'])} (--json shows it)")


def rows(evidence: Mapping[str, Any]) -> Iterator[list[str]]:
    """Engine, call, p50, p95 and p99 in ms, calls per second and number of calls, of what ``api.bench`` measured."""
    for result in evidence["backends"]:
        engine = f"{result['backend']}, {result['precision']}, {plural(result['steps'])}"
        for call in ("prepare", "frame"):
            times = result[call]
            cells = [f"{1e3 * times[p]:.2f}" for p in ("p50_s", "p95_s", "p99_s")]
            yield [engine, call, *cells, f"{times['fps']:.1f}", str(times["runs"])]


def profile(evidence: Mapping[str, Any]) -> None:
    """A table for each backend, then what cannot tell."""
    for result in evidence["backends"]:
        say(f"{result['backend']}, {result['precision']}: a frame takes {1e3 * result['frame_s']:.2f} ms")
        shown = table("stage", "ms", "share")
        for stage in result["stages"]:
            shown.add_row(stage["stage"], f"{1e3 * stage['seconds']:.2f}", f"{stage['share']:.1%}")
        console.print(shown)
    for name, reason in evidence["failures"].items():
        say(f"{name}: {reason}")


def sustained(result: Mapping[str, Any]) -> None:
    """A row for each window, and what it comes to."""
    shown = table("minute", "per s", "p50 ms", "p99 ms", "load", "clock GHz", "°C", "W")
    for window in result["windows"]:
        shown.add_row(*_cells(window))
    console.print(shown)
    say(f"the last fifth ran at {result['held']:.1%} of the first fifth's frames per second")
    for text in result["throttling"]:
        say(f"throttled: {text}")
    for source, ratio in result["frames_per_joule"].items():
        say(f"{ratio:.3g} frames per joule of {source}")


def _cells(window: Mapping[str, Any]) -> list[str]:
    state = window["state"]
    cpu, gpus, board = state["cpu"], state["gpus"], state["jetson"] or {}
    clock = gpus[0]["clock_hz"] if gpus else (board.get("gpu_hz") or {}).get("now") or cpu["frequency_hz"]
    heat = [gpu["temperature_c"] for gpu in gpus if gpu["temperature_c"] is not None]
    heat += [*(board.get("temperatures_c") or {}).values(), *cpu["temperatures_c"].values()]
    return [
        f"{window['start_s'] / 60:.1f}",
        f"{window['fps']:.1f}",
        f"{1e3 * window['p50_s']:.2f}",
        f"{1e3 * window['p99_s']:.2f}",
        f"{cpu['load_average']:.1f}" if cpu["load_average"] is not None else "–",
        f"{clock / 1e9:.2f}" if clock else "–",
        f"{max(heat):.0f}" if heat else "–",
        f"{sum(state['power_w'].values()):.1f}" if state["power_w"] else "–",
    ]


console = Console()


def plan(result: Mapping[str, Any]) -> None:
    """The candidates of a plan of precisions, and the verdict."""
    shown = table("candidate", "INT8", "per s", "× FP32", "p50 ms", "PSNR", "SSIM", "MiB")
    for line in plan_lines(result):
        shown.add_row(*line.cells, style="bold" if line.best else "dim" if line.reason else None)
    console.print(shown)
    say(verdict(result))


def sweep(rows: Sequence[Mapping[str, Any]]) -> None:
    """What a sweep of INT8's options measured."""
    shown = table("ranges", "SmoothQuant", "PSNR dB", "least dB", "SSIM", "MiB", "seconds")
    for row in rows:
        alpha = row["config"]["smooth_quant_alpha"]
        cells = (f"{row['psnr_db']:.1f}", f"{row['psnr_db_min']:.1f}", f"{row['ssim']:.4f}")
        ends = (f"{row['bytes'] / 2**20:.1f}", f"{row['seconds']:.0f}")
        shown.add_row(row["config"]["ranges"], "off" if alpha is None else f"{alpha:g}", *cells, *ends)
    console.print(shown)


def frontier(result: Mapping[str, Any]) -> None:
    """Every engine, and why some have no figures."""
    shown = table("engine", "steps", "per s", "× torch", "p50 ms", "PSNR", "truth")
    shown.title = "PSNR in dB, to the teacher and to the truth; bold: none is both faster and closer to the teacher"
    for line in lines(result["rows"]):
        name, steps, fps, ratio, p50, _, psnr, truth, _ = line.cells
        shown.add_row(name, steps, fps, ratio, p50, psnr, truth, style="bold" if line.best else None)
    console.print(shown)
    for line in lines(result["rows"]):
        if line.reason:
            say(f"{line.cells[0]}, {plural(int(line.cells[1]))}: {line.reason}")


def drift(evidence: Mapping[str, Any]) -> None:
    """Every stage against teacher and truth, then poses, detail and flicker."""
    metrics = {"psnr_db": ".1f", "ssim": ".3f", "flip": ".3f"}
    shown = table("stage", *(title for _ in range(2) for title in ("PSNR", "SSIM", "FLIP")))
    count = len(evidence["pairs"])
    shown.title = f"medians of {count} pairs against the teacher, then against the truth; PSNR in dB"
    for stage in evidence["stages"]:
        cells = [
            _median(stage.get(side, {}).get(metric), digits)
            for side in ("against_teacher", "against_truth")
            for metric, digits in metrics.items()
        ]
        if any(f"against_{side}" in stage for side in ("teacher", "truth")):
            shown.add_row(stage["stage"], *cells)
    console.print(shown)
    _motion(evidence)


def _motion(evidence: Mapping[str, Any]) -> None:
    """Poses, detail and flicker, of the stages that were measured, and why the others were not."""
    shown = table("stage", "PCK", "unsided", "detail", "flicker", "× truth", "motion")
    shown.title = "means, of detail medians; flicker in levels of 255 and over the truth's, as motion is"
    shown.collapse_padding = True
    stages = evidence["stages"]
    ratios = over_truth(stages)
    for stage in stages:
        found = beside_distances(stage)
        cells = {name: one["median" if name == "detail" else "mean"] for name, one in found.items()}
        cells |= {"ratio": ratios[stage["stage"]]} if stage["stage"] in ratios else {}
        if found:
            names = ("pck", "pck_unsided", "detail", "flicker", "ratio", "motion")
            shown.add_row(stage["stage"], *(f"{cells[name]:.3f}" if name in cells else "–" for name in names))
    if shown.row_count:
        console.print(shown)
    if words := count_scored(stages, len(evidence["pairs"])):
        say(words)
    for stage in stages:
        if finder := stage.get("finder"):
            pck, error_px = finder["pck"]["mean"], finder["error_px"]["median"]
            say(f"{stage['stage']}: joints found in the sources, PCK {pck:.3f}, median error {error_px:.1f} px")
    for name in ("pck", "detail", "flicker"):
        if name in evidence["missing"]:
            say(f"{name} was not measured: {evidence['missing'][name]}")


def table(name: str, *figures: str) -> Table:
    """A table that fits 80 columns: where there is no terminal, wider ones would be cut."""
    made = Table(name, box=None, pad_edge=False, title_justify="left")
    for title in figures:
        made.add_column(title, justify="left" if title == "call" else "right", no_wrap=True)
    return made


def _median(statistics: Mapping[str, float] | None, digits: str) -> str:
    return format(statistics["median"], digits) if statistics else "–"


def say(text: str) -> None:
    """Print a line as it is: paths may hold brackets, and are not broken."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def decoder(found: Mapping[str, Any]) -> None:
    """How near a small decoder comes to the one before, and its time."""
    print(
        f"to the decoder before: {found['psnr_db']:.1f} dB, SSIM {found['ssim']:.3f}; "
        f"{found['before_ms']:.1f} → {found['after_ms']:.1f} ms a picture in torch"
    )
