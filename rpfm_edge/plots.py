"""Plots as inline SVG that takes its colours from the page: ``currentColor`` for ink, ``var(--series-0)`` … for data.

So one plot fits a light and a dark page. The page owns the fonts and these variables: ``--series-0`` to ``--series-5``.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rpfm_edge.metrics import import_extra

# Colours that stand for a variable until the SVG is written; matplotlib knows only real ones.
_INK = "#01fe00"
_SERIES = tuple(f"#01fe1{k}" for k in range(6))
_MAX_POINTS = 400  # per curve: more cannot be seen, and they bloat the page


def histogram(label: str, times_s: Mapping[str, Sequence[float]]) -> str:
    """Shares of runs over milliseconds, one outline and one dashed median per name.

    Times above the highest p99 are counted in the last bin, so one outlier does not flatten the rest; the axis is
    logarithmic where the names differ by more than a factor of eight.
    """
    times_ms = {name: np.asarray(values, np.float64) * 1e3 for name, values in times_s.items()}
    low = min(float(values.min()) for values in times_ms.values())
    high = max(float(np.percentile(values, 99)) for values in times_ms.values())
    high = high if high > low else low + max(0.01 * low, 1e-3)
    wide = low > 0 and high > 8 * low
    edges = np.geomspace(low, high, 49) if wide else np.linspace(low, high, 49)

    def draw(axes: Any) -> None:
        for index, (name, values) in enumerate(times_ms.items()):
            colour = _SERIES[index % len(_SERIES)]
            counts, _ = np.histogram(np.clip(values, low, high), edges)
            axes.stairs(100 * counts / values.size, edges, fill=True, alpha=0.25, color=colour)
            axes.stairs(100 * counts / values.size, edges, linewidth=1.4, color=colour, label=name)
            axes.axvline(float(np.median(values)), linestyle="--", linewidth=1, color=colour)
        if wide:
            _log_axis(axes, "x")
        axes.set_xlabel("ms")
        axes.set_ylabel("% of runs")
        axes.set_ylim(bottom=0)

    return _svg(label, draw, len(times_ms))


def loss_plot(label: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Curves (steps, values) by name: raw ones faint, smoothed ones strong; logarithmic unless a value is 0 or less."""
    series = {name: _thinned(np.asarray(s, np.float64), np.asarray(v, np.float64)) for name, (s, v) in curves.items()}
    positive = all((values[np.isfinite(values)] > 0).all() for _, values in series.values())

    def draw(axes: Any) -> None:
        for index, (name, (steps, values)) in enumerate(series.items()):
            colour = _SERIES[index % len(_SERIES)]
            axes.plot(steps, values, linewidth=0.8, alpha=0.35, color=colour)
            axes.plot(steps, smoothed(values), linewidth=1.6, color=colour, label=name)
        if positive:
            _log_axis(axes, "y")
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")

    return _svg(label, draw, len(series))


def smoothed(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Centred moving average over ``share`` of the series, over what there is at the ends; nan and inf are skipped."""
    width = max(1, round(share * len(values))) | 1
    finite = np.isfinite(values)
    sums, counts = (np.convolve(x, np.ones(width), "full") for x in (np.where(finite, values, 0), finite.astype(float)))
    middle = slice(width // 2, width // 2 + len(values))
    return np.where(counts[middle] > 0.5, sums[middle] / np.maximum(counts[middle], 1), np.nan)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of equal blocks, at most ``_MAX_POINTS`` of them."""
    block = -(-len(values) // _MAX_POINTS)
    if block <= 1:
        return steps, values
    starts = np.arange(0, len(values), block)
    counts = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def _log_axis(axes: Any, which: str) -> None:
    ticker = import_extra("matplotlib.ticker", "validate")
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = getattr(axes, f"get_{which}lim")()
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _svg(label: str, draw: Callable[[Any], None], names: int) -> str:
    matplotlib = import_extra("matplotlib", "validate")
    figure_module = import_extra("matplotlib.figure", "validate")
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,  # ids stay the same from run to run, and differ from plot to plot
        "text.parse_math": False,  # a dollar in a name is a dollar
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "axes.axisbelow": True,
        **{f"{part}.color": _INK for part in ("text", "xtick", "ytick", "grid")},
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
    }
    with matplotlib.rc_context(style):
        figure = figure_module.Figure(figsize=(5.4, 3.0), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        figure.legend(loc="outside upper left", ncols=min(names, 2), frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """Only what an HTML page needs: no prologue, metadata, namespaces, fixed size or unused ids; the page's colours."""
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, rest = body.split(">", 1)
    view = re.search(r'viewBox="([^"]*)"', head)
    used = set(re.findall(r"#([\w-]+)", rest))
    rest = re.sub(r' id="([^"]*)"', lambda match: match.group(0) if match.group(1) in used else "", rest)
    for colour, value in ((_INK, "currentColor"), *((c, f"var(--series-{k})") for k, c in enumerate(_SERIES))):
        rest = rest.replace(colour, value)
    viewbox = view.group(1) if view else "0 0 388.8 216"
    return f'<svg viewBox="{viewbox}" role="img" aria-label="{html.escape(label, quote=True)}">{rest}'
