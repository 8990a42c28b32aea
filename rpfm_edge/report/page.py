"""The evidence as one self-contained HTML page, and pictures that show errors side by side.

The caller fills ``Evidence``; every section is optional and a missing one is left out. This module measures nothing.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any, Literal, NamedTuple, TypedDict

import cv2
import numpy as np

from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.core.files import write_text
from rpfm_edge.measure.budget import beside_distances
from rpfm_edge.measure.clock import Latency
from rpfm_edge.measure.flicker import over_truth
from rpfm_edge.measure.metrics import METRICS, Summary, statistics
from rpfm_edge.people.image import check_image, check_pair
from rpfm_edge.report.frontier import COLUMNS, caption, lines, points
from rpfm_edge.report.plan import COLUMNS as PLAN_COLUMNS
from rpfm_edge.report.plan import plan_caption, plan_lines, psnr_db
from rpfm_edge.report.plots import (
    Layer,
    frontier_plot,
    histogram,
    loss_plot,
    plan_plot,
    sensitivity_plot,
    validation_plot,
)

ERROR_SCALE = 64  # of 255: the mean absolute error over the channels that gets the brightest colour
Picture = np.ndarray | str | Path  # uint8 (H, W, 3) RGB, or a PNG or JPEG file, relative to the folder of the page


class Column(NamedTuple):
    """A column of a drift table. ``higher_is_better``: None where the truth's own value is best."""

    title: str
    higher_is_better: bool | None
    average: Literal["median", "mean"] = "median"


DRIFT_COLUMNS = {name: Column(metric.title, metric.higher_is_better) for name, metric in METRICS.items()}
MOTION_COLUMNS = {
    "pck": Column("PCK", True, "mean"),  # most pictures have all joints right, so a median is soon 1
    "pck_unsided": Column("unsided", True, "mean"),
    "detail": Column("Detail", True),
    "flicker": Column("Flicker", False, "mean"),
    "flicker_ratio": Column("Flicker × truth", None, "mean"),
    "motion": Column("Motion", None, "mean"),
}


class Figure(TypedDict):
    """A headline figure. Numbers are printed with three digits; ``note`` says against what, or where."""

    group: Literal["quality", "speed", "size"]
    label: str
    value: float | str
    unit: str
    note: str


class PictureRow(TypedDict, total=False):
    """Pictures side by side, in order, by title. ``error_of`` adds the error map of two of the titles at the end."""

    title: str
    images: Mapping[str, Picture]
    error_of: tuple[str, str]


class DriftStage(TypedDict, total=False):
    """A stage (``student, 2 steps``, ``int8``, …) against the teacher at the same noise, and the ground truth.

    ``pose`` (``pck``, ``pck_unsided``), ``detail`` (``detail``) and ``flicker`` (``flicker``, ``motion``) stand in a
    table of their own.
    """

    stage: str
    against_teacher: Summary
    against_truth: Summary
    pose: Summary
    detail: Summary
    flicker: Summary


class Drift(TypedDict, total=False):
    """``stages`` in the order of the pipeline; ``missing`` (``missing_metrics()``) is printed as it is."""

    stages: Sequence[DriftStage]
    missing: Mapping[str, str]
    note: str


class Curve(TypedDict):
    """A loss over steps."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


class Times(TypedDict, total=False):
    """Raw times in seconds of ``call`` (``prepare``, ``frame``) under ``name`` (``openvino int8``)."""

    call: str
    name: str
    values_s: Sequence[float]


class StageRecord(TypedDict, total=False):
    """A stage of the lineage, as manifests hold it, and the digest of what it made."""

    stage: str
    config: Mapping[str, Any]
    tools: Mapping[str, str]
    inputs: Mapping[str, str]
    digest: str


class Method(TypedDict, total=False):
    """How it was measured: command lines, counts, seeds, and remarks."""

    commands: Sequence[str]
    counts: Mapping[str, Any]
    seeds: Mapping[str, Any]
    notes: Sequence[str]


class Evidence(TypedDict, total=False):
    """What a report can show.

    ``machine`` is ``measure.where()``; ``frontier`` is what ``frontier.measure_frontier`` returns, ``plan`` what
    ``planner.plan_precision`` does. ``losses`` are
    curves, and ``validation`` are points (elapsed s, step, loss on held-out data), by the title of their plot.
    """

    title: str
    subtitle: str
    machine: Mapping[str, Any]
    headline: Sequence[Figure]
    pictures: Sequence[PictureRow]
    drift: Drift
    frontier: Mapping[str, Any]
    plan: Mapping[str, Any]
    latency: Sequence[Times]
    losses: Mapping[str, Sequence[Curve]]
    validation: Mapping[str, Sequence[Sequence[float]]]
    lineage: Sequence[StageRecord]
    method: Method


def write_report(path_html: Path, evidence: Evidence) -> None:
    """Render ``evidence`` to one page that needs no other file and no network.

    Raises:
        ConfigError: an unknown section.
        InputError: a picture that is missing or cannot be shown.
        BackendError: jinja2 or matplotlib is not installed.
    """
    if unknown := sorted(set(evidence) - set(Evidence.__annotations__)):
        raise ConfigError(
            f"unknown section {unknown[0]!r} of the evidence",
            expected=f"some of {list(Evidence.__annotations__)}",
            fix="check the spelling",
        )
    template, safe = _template()
    page = template.render(
        evidence=evidence,
        machine=_machine(evidence.get("machine", {})),
        rows=[_picture_row(row, path_html.parent) for row in evidence.get("pictures", ())],
        error_scale=ERROR_SCALE,
        error_bar=_data_uri(_colour(np.arange(256, dtype=np.uint8)[None])),
        drift=_drift_tables(evidence.get("drift", {})),
        frontier=_frontier(evidence.get("frontier"), safe),
        plan=_plan(evidence.get("plan"), safe),
        latency=_latency_groups(evidence.get("latency", ()), safe),
        training=_training(evidence.get("losses", {}), evidence.get("validation", {}), safe),
    )
    write_text(path_html, page)


def _template() -> tuple[Any, type[str]]:
    """The page, and the type of text that it takes as markup: the plots, which are made here; all else is escaped."""
    jinja2 = import_extra("jinja2", "validate")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined
    )
    environment.filters |= {
        "number": format_number,
        "ms": lambda seconds: format_number(seconds * 1e3),
        "plain": _plain,
    }
    text = Path(__file__).with_name("templates").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text), jinja2.utils.markupsafe.Markup


def format_number(value: float | str | None) -> str:
    """Three significant digits, without an exponent between 0.001 and 10 million; words as they are, ``—`` for None."""
    if value is None or isinstance(value, str):
        return value or "—"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-3 else f"{value:.3g}"


def error_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where two uint8 (H, W, 3) images differ: the mean absolute error over the channels, in the colours of inferno.

    Black is 0, the brightest yellow ``ERROR_SCALE`` = 64 (of 255) or more. Returns uint8 (H, W, 3) RGB.
    """
    check_pair(a, b)
    error = np.abs(a.astype(np.float32) - b).mean(axis=2)
    return _colour(np.rint(np.minimum(error / ERROR_SCALE, 1) * 255).astype(np.uint8))


def _colour(level: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(cv2.applyColorMap(level, cv2.COLORMAP_INFERNO)[:, :, ::-1])


def _plain(value: Any) -> str:
    """Words as they are, a table as a line for each key, what is inside it indented, and anything else as JSON."""
    if isinstance(value, Mapping) and value:
        return "\n".join(_entry(str(key), entry) for key, entry in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _entry(key: str, value: Any) -> str:
    text = _plain(value)
    return f"{key}:\n{indent(text, '  ')}" if isinstance(value, Mapping) and value else f"{key}: {text}"


def _machine(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of ``measure.where()`` in words."""
    words = {key: value for key, value in facts.items() if key not in ("versions", "memory_bytes")}
    if "usable_cores" in words and "cores" in words:
        words["cores"] = f"{words.pop('usable_cores')} of {words['cores']} usable"
    if "memory_bytes" in facts:
        words["memory"] = f"{format_number(facts['memory_bytes'] / 2**30)} GiB"
    return words | dict(facts.get("versions", {}))


def _picture_row(row: PictureRow, folder: Path) -> dict[str, Any]:
    pictures = dict(row["images"])
    cells = [{"title": title, "uri": _data_uri(image, folder)} for title, image in pictures.items()]
    if pair := row.get("error_of"):
        if missing := [title for title in pair if title not in pictures]:
            raise InputError(f"no picture {missing[0]!r}", expected=f"one of {list(pictures)}", fix="correct error_of")
        a, b = (_pixels(pictures[title], folder) for title in pair)
        cells.append({"title": f"error: {pair[0]} − {pair[1]}", "uri": _data_uri(error_map(a, b))})
    return {"title": row.get("title", ""), "cells": cells, "has_error": bool(pair)}


def _data_uri(picture: Picture, folder: Path = Path()) -> str:
    """A picture file as it is, or an array as PNG, in base64."""
    if isinstance(picture, np.ndarray):
        check_image(picture)
        data, kind = bytes(cv2.imencode(".png", picture[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])[1]), "png"
    else:
        data = _read_picture(folder / picture)
        kind = "jpeg" if data.startswith(b"\xff\xd8\xff") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _read_picture(path: Path) -> bytes:
    data = path.read_bytes() if path.is_file() else b""
    if not data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n")):
        raise InputError(f"{path} is no picture", expected="a PNG or JPEG file", fix="write it again")
    return data


def _pixels(picture: Picture, folder: Path) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        return picture
    pixels = cv2.imdecode(np.frombuffer(_read_picture(folder / picture), np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise InputError(f"{folder / picture} cannot be decoded", expected="a whole PNG or JPEG", fix="write it again")
    return np.ascontiguousarray(pixels[:, :, ::-1])


def _drift_tables(drift: Drift) -> list[dict[str, Any]]:
    """One table per reference, and one of poses, detail and flicker."""
    stages = drift.get("stages", ())
    ratios = {stage: {"flicker_ratio": statistics([ratio])} for stage, ratio in over_truth(stages).items()}
    teacher = [(stage["stage"], stage.get("against_teacher", {})) for stage in stages]
    truth = [(stage["stage"], stage.get("against_truth", {})) for stage in stages]
    motion = [(s["stage"], {**beside_distances(s), **ratios.get(s["stage"], {})}) for s in stages]
    return [
        _drift_table(title, [(stage, summary) for stage, summary in found if summary], columns)
        for title, found, columns in (
            ("Against the teacher, same noise", teacher, DRIFT_COLUMNS),
            ("Against the ground truth", truth, DRIFT_COLUMNS),
            ("Poses, detail and flicker", motion, MOTION_COLUMNS),
        )
        if any(summary for _, summary in found)
    ]


def _drift_table(title: str, stages: Sequence[tuple[str, Summary]], columns: Mapping[str, Column]) -> dict[str, Any]:
    """Metrics as columns, and per stage the average and the worse tail of each."""
    shown = {name: column for name, column in columns.items() if any(name in summary for _, summary in stages)}
    rows = [(stage, [_cell(summary.get(name), column) for name, column in shown.items()]) for stage, summary in stages]
    return {"title": title, "columns": list(shown.values()), "rows": rows, "motion": columns is MOTION_COLUMNS}


def _cell(statistics: Mapping[str, Any] | None, column: Column) -> dict[str, Any]:
    if statistics is None:
        return {"average": None, "tail": None, "count": 0}
    tail = {True: statistics["p05"], False: statistics["p95"], None: None}[column.higher_is_better]
    return {"average": statistics[column.average], "tail": tail, "count": len(statistics["values"])}


def _latency_groups(entries: Sequence[Times], safe: type[str]) -> list[dict[str, Any]]:
    """Per call: the percentiles of each name, and one histogram."""
    groups: dict[str, dict[str, Latency]] = {}
    for entry in entries:
        groups.setdefault(entry["call"], {})[entry["name"]] = Latency(tuple(entry["values_s"]))
    return [
        {
            "call": call,
            "rows": list(rows.items()),
            "plot": safe(histogram(f"times of {call}", {name: times.values_s for name, times in rows.items()})),
        }
        for call, rows in groups.items()
    ]


def _frontier(result: Mapping[str, Any] | None, safe: type[str]) -> dict[str, Any] | None:
    """The plot and the table of a measured frontier."""
    if not result:
        return None
    plot = safe(frontier_plot("quality against speed", points(result["rows"])))
    return {"plot": plot, "columns": COLUMNS, "lines": lines(result["rows"]), "caption": caption(result)}


def _plan(result: Mapping[str, Any] | None, safe: type[str]) -> dict[str, Any] | None:
    """The plots and the tables of a plan of precisions."""
    if not result:
        return None
    layers = [
        Layer(unit["name"], unit["mse"], 1e3 * unit["saved_s"], unit["precision"] == "int8") for unit in result["units"]
    ]
    candidates = [
        (1e3 * row["frame"]["p50_s"], psnr_db(row), row["name"] == result["chosen"]) for row in result["frontier"]
    ]
    return {
        "caption": f"{plan_caption(result)}{_unmeasured(result)}",
        "columns": PLAN_COLUMNS,
        "lines": plan_lines(result),
        "frontier": safe(plan_plot("drift against frame time", candidates, result["budget"].get("psnr_db_min"))),
        "sensitivity": safe(sensitivity_plot("error and time saved of every unit", layers)),
        "units": sorted(result["units"], key=lambda unit: -unit["mse"]),
    }


def _unmeasured(result: Mapping[str, Any]) -> str:
    """What stands in the place of the time saved, where that could not be measured."""
    if not (reason := result.get("unmeasured")):
        return ""
    return (
        f" The time that units save was not measured ({reason.rstrip('.')}); shares of the frame by work stand for it."
    )


def _training(
    losses: Mapping[str, Sequence[Curve]], validation: Mapping[str, Sequence[Sequence[float]]], safe: type[str]
) -> list[tuple[str, str]]:
    """Title and plot: the losses of a training, and beside them its validation curve."""
    figures = []
    for title in dict.fromkeys((*losses, *validation)):
        if title in losses:
            curves = {curve["name"]: (curve["steps"], curve["values"]) for curve in losses[title]}
            figures.append((title, safe(loss_plot(f"loss curves: {title}", curves))))
        if validation.get(title):
            figures.append((f"{title}: validation", safe(validation_plot(f"validation: {title}", validation[title]))))
    return figures
