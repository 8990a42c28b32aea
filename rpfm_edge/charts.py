"""Plain PNG charts of measurements: bars, and curves in panels. The plots of the report are in ``plots``."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rpfm_edge.metrics import import_extra

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
