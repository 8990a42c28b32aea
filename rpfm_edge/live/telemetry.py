"""A session for others to read: Prometheus text, a JSON file, and a page with histograms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpfm_edge.core.errors import BackendError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.core.files import write_text
from rpfm_edge.live.latency import QUANTILES, TITLES
from rpfm_edge.measure.machine import where
from rpfm_edge.report.page import Evidence, Figure, write_report

if TYPE_CHECKING:
    from rpfm_edge.live.service import Service


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_GAUGES = ("person", "steps", "clients")


def exposition(service: Service) -> bytes:
    """The state in Prometheus' text format: ``rpfm_live_…``."""
    prometheus = import_extra("prometheus_client", "live")
    registry, state = prometheus.CollectorRegistry(), service.state()
    for name, count in state["counters"].items():
        prometheus.Counter(f"rpfm_live_{name}", f"{name} so far", registry=registry).inc(count)
    for name in _GAUGES:
        prometheus.Gauge(f"rpfm_live_{name}_now", f"{name} now", registry=registry).set(state[name])
    text = "milliseconds over the latest frames; pose_to_photon is an estimate"
    gauge = prometheus.Gauge("rpfm_live_latency_ms", text, ["stage", "quantile"], registry=registry)
    for stage, values in state["split_ms"].items():
        for name, percent in QUANTILES.items():
            gauge.labels(stage, f"{percent / 100:g}").set(values[name])
    return bytes(prometheus.generate_latest(registry))


def write_session(folder: Path, service: Service) -> str | None:
    """Write ``live.json`` and ``live.html`` to ``folder``.

    Returns:
        Why there is no page (matplotlib and jinja2 are of the extra ``validate``); None if there is one.
    """
    found = {**service.report(), "machine": where()}
    write_text(folder / "live.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    times = service.latency.raw_s()
    if not times:
        return "no frame was sent"
    evidence: Evidence = {
        "title": "Live session",
        "subtitle": f"{found['bundle']} on {found['backend']}, {found['seconds']:.0f} s",
        "machine": found["machine"],
        "headline": _headline(found),
        "latency": [
            {"call": "live", "name": TITLES[name], "values_s": values} for name, values in times.items() if any(values)
        ],
        "method": {
            "counts": {name: str(count) for name, count in found["counters"].items()},
            "notes": [
                "Stamps are matched by the number of the frame.",
                "Pose-to-photon is an estimate: it ends when the client's page has drawn; a photon needs a sensor.",
            ],
        },
    }
    try:
        write_report(folder / "live.html", evidence)
    except BackendError as error:
        return str(error)
    return None


def _headline(found: Mapping[str, Any]) -> list[Figure]:
    whole = "pose_to_photon" if "pose_to_photon" in found["split_ms"] else "server"
    figures: list[Figure] = [_figure("frames", found["frames_per_second"], "per s", "drawn or shown again")]
    for name in ("p50", "p95", "p99"):
        figures.append(_figure(f"{TITLES[whole]}, {name}", found["split_ms"][whole][name], "ms", "all that is kept"))
    figures.append(_figure("poses dropped", 100 * found["shares_of_poses"]["dropped"], "%", "for a later one"))
    return figures


def _figure(label: str, value: float, unit: str, note: str) -> Figure:
    return {"group": "speed", "label": label, "value": value, "unit": unit, "note": note}
