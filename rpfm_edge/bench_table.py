"""``rpfm-edge bench --stages`` and ``--sustained``: a bundle with the packaged sample as input, and what is printed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpfm_edge.bench import stages, sustained
from rpfm_edge.tables import console, say, table


def show_bench(
    bundle: str | Path, backend: str | None, with_stages: bool, rounds: int, minutes: float, out: Path
) -> dict[str, Any]:
    """What was asked for, measured and printed; ``minutes`` 0: no sustained run."""
    found: dict[str, Any] = {}
    if with_stages:
        found["stages"] = stages(bundle, backend, rounds)
        print_stages(found["stages"])
    if minutes:
        found["sustained"] = sustained(bundle, minutes, out, backend)
        print_sustained(found["sustained"])
        missing = found["sustained"].get("no_plot")
        plot = f"; no plot: {missing}" if missing else f" and {out / 'sustained.png'}"
        say(f"wrote {out / 'sustained.json'}{plot}")
    return found


def print_stages(evidence: Mapping[str, Any]) -> None:
    """A table for each backend, then what cannot tell."""
    for result in evidence["backends"]:
        say(f"{result['backend']}, {result['precision']}: a frame takes {1e3 * result['frame_s']:.2f} ms")
        shown = table("stage", "ms", "share")
        for stage in result["stages"]:
            shown.add_row(stage["stage"], f"{1e3 * stage['seconds']:.2f}", f"{stage['share']:.1%}")
        console.print(shown)
    for name, reason in evidence["failures"].items():
        say(f"{name}: {reason}")


def print_sustained(result: Mapping[str, Any]) -> None:
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
