"""Plots as inline SVG that takes its colours from the page: ``currentColor`` for ink, ``var(--series-0)`` … for data.

So one plot fits a light and a dark page. The page owns the fonts and these variables: ``--paper``, ``--series-0`` to
``--series-5``. The frontier is also drawn as PNG, in the colours of a light page.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from rpfm_edge.core.extras import import_extra

FIRST, COLOURS = "#1f6feb", ("#1f6feb", "#c2410c", "#15803d", "#9333ea", "#a16207", "#0e7490")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves by name over a common axis. ``log``: both axes are logarithmic."""

    xlabel: str
    ylabel: str
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    log: bool = False


def bars_png(values: Mapping[str, float], xlabel: str, marked: Sequence[str] = ()) -> bytes:
    """One horizontal bar a name, in the given order from the top, logarithmic, with its value; ``marked`` stand out."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        colours = [FIRST if name in marked else "#9aa4b2" for name in values]
        drawn = axes.barh(list(values), list(values.values()), color=colours)
        axes.bar_label(drawn, [f"{value:.3g}" for value in values.values()], padding=3)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(0.5 * min(values.values()), 2 * max(values.values()))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(xlabel)

    return _png(draw, (7.2, 0.6 + 0.3 * len(values)))


def curves_png(panels: Sequence[Panel]) -> bytes:
    """Panels from the left to the right, four in a row."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)

    def draw(figure: Any) -> None:
        for place, panel in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, place)
            for index, (name, (x, y)) in enumerate(panel.curves.items()):
                axes.plot(x, y, marker="o", markersize=3, label=name, color=COLOURS[index % len(COLOURS)])
            _scale(axes, panel)
            axes.set_xlabel(panel.xlabel)
            axes.set_ylabel(panel.ylabel)
            axes.grid(alpha=0.15)
            if len(panel.curves) > 1:
                axes.legend(frameon=False)

    return _png(draw, (3.0 * columns if columns > 1 else 6.4, 2.7 * rows))


def _scale(axes: Any, panel: Panel) -> None:
    if not panel.log:
        axes.set_ylim(0, 1.1 * max(value for _, y in panel.curves.values() for value in y) or 1)
        return
    ticker = import_extra("matplotlib.ticker", "validate")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({value for x, _ in panel.curves.values() for value in x})
    axes.set_xticks(ticks, [f"{value:.3g}" for value in ticks])
    low, high = axes.get_ylim()
    if high < 2 * low:  # a flat curve is to look flat
        axes.set_ylim(low / 2**0.5, high * 2**0.5)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _png(draw: Any, size: tuple[float, float]) -> bytes:
    matplotlib = import_extra("matplotlib", "validate")
    figure_module = import_extra("matplotlib.figure", "validate")
    with matplotlib.rc_context(STYLE):
        figure = figure_module.Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


class _Palette(NamedTuple):
    ink: str
    paper: str
    series: tuple[str, ...]


# Colours that stand for a variable until the SVG is written; matplotlib knows only real ones.
_PAGE = _Palette("#01fe00", "#01fe01", tuple(f"#01fe1{k}" for k in range(6)))
_SERIES = _PAGE.series
# The light page of templates/report.html.j2, for a PNG.
_LIGHT = _Palette("#1b1f24", "#ffffff", ("#1f6feb", "#c2410c", "#15803d", "#9333ea", "#a16207", "#0e7490"))
_MARKERS = ("o", "s", "D", "^", "v")  # with room for a digit
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

    return _svg(label, draw, min(len(times_ms), 2))


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

    return _svg(label, draw, min(len(series), 2))


def validation_plot(label: str, points: Sequence[Sequence[float]]) -> str:
    """Losses on held-out data over training time, from (elapsed s, step, loss); a dashed line marks the lowest."""
    seconds, _, losses = np.asarray(points, np.float64).T
    unit, name = next((u, n) for u, n in ((3600, "h"), (60, "min"), (1, "s")) if seconds.max() >= 3 * u or u == 1)

    def draw(axes: Any) -> None:
        axes.plot(seconds / unit, losses, linewidth=1.6, marker="o", markersize=3, color=_SERIES[0], label="held out")
        if np.isfinite(losses).any():
            axes.axhline(np.nanmin(losses), linestyle="--", linewidth=1, color=_SERIES[0])
        if (losses[np.isfinite(losses)] > 0).all():
            _log_axis(axes, "y")
        axes.set_xlabel(f"trained for ({name})")
        axes.set_ylabel("loss")

    return _svg(label, draw, 1)


class Point(NamedTuple):
    """An engine of the frontier. ``best``: no other is both faster and closer to the teacher."""

    fps: float
    psnr_db: float
    backend: str
    precision: str
    steps: int
    best: bool


def frontier_plot(label: str, found: Sequence[Point]) -> str:
    """Frames per second against PSNR to the teacher: colour is the backend, shape the precision, number the steps.

    The line joins the points that are ``best``.
    """
    return _svg(label, lambda axes: _frontier(axes, found, _PAGE), max(map(len, _kinds(found))), (6.4, 4.2))


def frontier_png(found: Sequence[Point]) -> bytes:
    """``frontier_plot`` as PNG."""
    columns, save = max(map(len, _kinds(found))), {"format": "png", "dpi": 160}
    return _drawn(lambda axes: _frontier(axes, found, _LIGHT), columns, (6.4, 4.2), _LIGHT, save)


class Layer(NamedTuple):
    """A unit of a plan: its error alone (mean squared, in grey levels), the time it saves, whether it is INT8."""

    name: str
    mse: float
    saved_ms: float
    int8: bool


def sensitivity_plot(label: str, layers: Sequence[Layer]) -> str:
    """Time saved against the error of every unit by itself; filled marks are INT8 in the plan, open ones float.

    The name stands beside the units with the largest errors and savings.
    """

    def draw(axes: Any) -> None:
        for int8, word in ((True, "INT8"), (False, "float")):
            found = [layer for layer in layers if layer.int8 == int8]
            look = {"color": _SERIES[0]} if int8 else {"facecolors": "none", "edgecolors": _SERIES[1]}
            axes.scatter([x.mse for x in found], [x.saved_ms for x in found], s=30, label=word, **look)
        for layer in _outstanding(layers):
            place = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(layer.name, (layer.mse, layer.saved_ms), **place)
        if all(layer.mse > 0 for layer in layers):
            _log_axis(axes, "x")
        axes.set_xlabel("squared error of the picture (grey levels²)")
        axes.set_ylabel("time saved in a frame (ms)")

    return _svg(label, draw, 2, (6.4, 4.2))


def _outstanding(layers: Sequence[Layer], count: int = 4) -> set[Layer]:
    by_error, by_time = (sorted(layers, key=key)[-count:] for key in (lambda x: x.mse, lambda x: x.saved_ms))
    return {*by_error, *by_time}


def plan_plot(label: str, candidates: Sequence[tuple[float, float, bool]], limit_db: float | None) -> str:
    """Frame time (ms) against PSNR to the float graph, (ms, dB, chosen) each; a dashed line is the budget's limit."""

    def draw(axes: Any) -> None:
        finite = [(ms, db) for ms, db, _ in candidates if np.isfinite(db)]
        axes.scatter([ms for ms, _ in finite], [db for _, db in finite], s=25, color=_SERIES[0], label="candidate")
        for ms, db, chosen in candidates:
            if chosen and np.isfinite(db):
                axes.scatter([ms], [db], s=140, facecolors="none", edgecolors=_SERIES[1], label="chosen")
            if not np.isfinite(db):
                axes.axvline(ms, linestyle=":", linewidth=1.2, color=_SERIES[2], label="no difference")
        if limit_db is not None:
            axes.axhline(limit_db, linestyle="--", linewidth=1, color=_SERIES[1], label="budget")
        axes.set_xlabel("frame (ms)")
        axes.set_ylabel("PSNR to the float graph (dB)")

    return _svg(label, draw, 4, (6.4, 4.2))


def _kinds(found: Sequence[Point]) -> tuple[list[str], list[str]]:
    """The backends and the precisions, in the order in which they come."""
    return list(dict.fromkeys(p.backend for p in found)), list(dict.fromkeys(p.precision for p in found))


def _frontier(axes: Any, found: Sequence[Point], palette: _Palette) -> None:
    backends, precisions = _kinds(found)
    colours = {name: palette.series[k % len(palette.series)] for k, name in enumerate(backends)}
    markers = {name: _MARKERS[k % len(_MARKERS)] for k, name in enumerate(precisions)}
    best = sorted((p.fps, p.psnr_db) for p in found if p.best)
    axes.plot(*zip(*best, strict=True), color=palette.ink, linewidth=1, alpha=0.5, zorder=1)
    text = {"color": palette.paper, "fontsize": 7, "fontweight": "bold", "ha": "center", "va": "center_baseline"}
    for order, point in enumerate(found, 2):  # a mark and its number lie above those of the points before
        place, style = (point.fps, point.psnr_db), {"marker": markers[point.precision], "zorder": order}
        axes.scatter(*place, s=110, linewidths=0.8, edgecolors=palette.paper, color=colours[point.backend], **style)
        axes.annotate(str(point.steps), place, zorder=order, **text)
    _frontier_legend(axes, colours, markers, palette.ink)
    _log_axis(axes, "x")
    axes.set_xlabel("frames per second (in the marks: steps)")
    axes.set_ylabel("PSNR to the teacher (dB)")


def _frontier_legend(axes: Any, colours: Mapping[str, str], markers: Mapping[str, str], ink: str) -> None:
    """Backends in the first row, precisions in the second; a legend is filled by columns."""
    for backend, precision in zip_longest(colours, markers):
        axes.scatter([], [], s=50, color=colours.get(backend, "none"), label=backend or " ")
        look = {"marker": markers.get(precision), "edgecolors": ink if precision else "none"}
        axes.scatter([], [], s=50, facecolors="none", label=(precision or " ").upper(), **look)


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


def _svg(label: str, draw: Callable[[Any], None], columns: int, size: tuple[float, float] = (5.4, 3.0)) -> str:
    salt = {"svg.hashsalt": label}  # ids stay the same from run to run, and differ from plot to plot
    svg = _drawn(draw, columns, size, _PAGE, {"format": "svg", "transparent": True, "metadata": {"Date": None}}, salt)
    return _inline(svg.decode(), label)


def _drawn(
    draw: Callable[[Any], None],
    columns: int,
    size: tuple[float, float],
    palette: _Palette,
    save: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> bytes:
    """A plot of ``size`` inches as a file; ``columns`` of the legend, ``save`` are options of matplotlib's savefig."""
    matplotlib = import_extra("matplotlib", "validate")
    figure_module = import_extra("matplotlib.figure", "validate")
    style = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # a dollar in a name is a dollar
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "axes.axisbelow": True,
        **{f"{part}.color": palette.ink for part in ("text", "xtick", "ytick", "grid")},
        "axes.edgecolor": palette.ink,
        "axes.labelcolor": palette.ink,
        **(settings or {}),
    }
    with matplotlib.rc_context(style):
        figure = figure_module.Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        figure.legend(loc="outside upper left", ncols=columns, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, **save)
    return buffer.getvalue()


def _inline(svg: str, label: str) -> str:
    """Only what an HTML page needs: no prologue, metadata, namespaces, fixed size or unused ids; the page's colours."""
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, rest = body.split(">", 1)
    view = re.search(r'viewBox="([^"]*)"', head)
    used = set(re.findall(r"#([\w-]+)", rest))
    rest = re.sub(r' id="([^"]*)"', lambda match: match.group(0) if match.group(1) in used else "", rest)
    named = {_PAGE.ink: "currentColor", _PAGE.paper: "var(--paper)"}
    for colour, value in (named | {colour: f"var(--series-{k})" for k, colour in enumerate(_SERIES)}).items():
        rest = rest.replace(colour, value)
    viewbox = view.group(1) if view else "0 0 388.8 216"
    return f'<svg viewBox="{viewbox}" role="img" aria-label="{html.escape(label, quote=True)}">{rest}'
