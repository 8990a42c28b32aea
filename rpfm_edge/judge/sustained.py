"""A long run, to see what heat does: frames per second in windows of ten seconds, the device's state beside each."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.files import write_bytes, write_text
from rpfm_edge.measure import device_state
from rpfm_edge.measure.clock import Call
from rpfm_edge.measure.device_state import State
from rpfm_edge.report.plots import Panel, curves_png

WINDOW_S = 10.0
Window = dict[str, Any]


def watch(
    call: Call,
    minutes: float,
    window_s: float = WINDOW_S,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
    read: Callable[[], State] = device_state.read,
) -> dict[str, Any]:
    """Call ``call`` without a pause for ``minutes``.

    Args:
        keep: is given the result so far after every window, so that what was measured outlives a failure.

    Returns:
        ``windows``: start (``start_s`` after the first frame), ``frames``, ``fps`` (frames over the window's length),
        ``p50_s``, ``p99_s``, and the ``state`` at its end; ``throttling``; ``frames_per_joule`` where power is known;
        and ``held``: the frame rate of the last fifth of the windows in multiples of the first fifth's.

    Raises:
        ConfigError: less than two windows, or a time that is not finite.
    """
    if not math.isfinite(minutes) or round(60 * minutes / window_s) < 2:
        raise ConfigError(
            f"a sustained run of {minutes:g} minutes",
            expected=f"at least {2 * window_s:g} s, two windows, and finite",
            fix="correct the minutes",
        )
    count = round(60 * minutes / window_s)
    call()
    first, start = read(), time.perf_counter()
    windows: list[Window] = []
    while len(windows) < count:
        windows.append(_window(call, window_s, start) | {"state": read()})
        result = _result(windows, first)
        keep(result)
    return result


def _window(call: Call, window_s: float, start: float) -> Window:
    times: list[float] = []
    begin = now = time.perf_counter()
    while now - begin < window_s:
        call()
        times.append(time.perf_counter() - now)
        now = time.perf_counter()
    p50, p99 = np.percentile(times, [50, 99])
    rate = len(times) / (now - begin)
    return {"start_s": begin - start, "frames": len(times), "fps": rate, "p50_s": float(p50), "p99_s": float(p99)}


def _result(windows: Sequence[Window], first: State) -> dict[str, Any]:
    states = [first, *(window["state"] for window in windows)]
    rates, part = [window["fps"] for window in windows], max(1, len(windows) // 5)
    frames = sum(window["frames"] for window in windows)
    return {
        "before": first,
        "windows": list(windows),
        "held": float(np.median(rates[-part:]) / np.median(rates[:part])),
        "throttling": sorted({text for state in states[1:] for text in device_state.throttling(first, state)}),
        "frames_per_joule": device_state.frames_per_joule(frames, states),
    }


def write(result: Mapping[str, Any], out: Path) -> None:
    """``sustained.json`` in the folder ``out``. A plot beside it is of other windows, and goes."""
    write_text(out / "sustained.json", json.dumps(result, indent=1))
    (out / "sustained.png").unlink(missing_ok=True)


def draw(result: Mapping[str, Any], out: Path) -> None:
    """``sustained.png`` in the folder ``out``; raises ``BackendError`` without matplotlib."""
    write_bytes(out / "sustained.png", curves_png(panels(result["windows"])))


def panels(windows: Sequence[Window]) -> list[Panel]:
    """Frame rate over time, and each part of the state that changed from window to window or has several values."""
    x = [window["start_s"] / 60 for window in windows]
    found = [Panel("minutes", "frames per second", {"fps": (x, [w["fps"] for w in windows])})]
    for label, curves in _series(windows).items():
        whole = {name: (x, values) for name, values in curves.items() if None not in values}
        if whole:
            found.append(Panel("minutes", label, whole))
    return found


def _series(windows: Sequence[Window]) -> dict[str, dict[str, list[Any]]]:
    states = [window["state"] for window in windows]
    gpus = range(len(states[0]["gpus"]))
    clock = {f"GPU {k}": [s["gpus"][k]["clock_hz"] for s in states] for k in gpus}
    heat = {f"GPU {k}": [s["gpus"][k]["temperature_c"] for s in states] for k in gpus}
    clock["CPU"] = [s["cpu"]["frequency_hz"] for s in states]
    sensors = [(s["jetson"] or {}).get("temperatures_c") or s["cpu"]["temperatures_c"] for s in states]
    heat |= {name: [sensor.get(name) for sensor in sensors] for name in sensors[0]}
    gigahertz = {name: [value and value / 1e9 for value in values] for name, values in clock.items()}
    power = {name: [s["power_w"].get(name) for s in states] for name in states[0]["power_w"]}
    load = {"load": [s["cpu"]["load_average"] for s in states]}
    return {"clock (GHz)": gigahertz, "temperature (°C)": heat, "power (W)": power, "load average": load}
