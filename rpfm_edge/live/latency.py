"""Pose to photon, estimated: where the time of a frame goes, from stamps that are matched by frame, never by order.

The last stamp is when a client says that it put the frame on screen; the photon itself would need a sensor. Memory is
bounded: each ring keeps the latest ``KEPT`` frames, and percentiles are exact over those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

KEPT = 32_768  # eighteen minutes at 30 frames a second
QUANTILES = {"p50": 50.0, "p95": 95.0, "p99": 99.0, "p99_9": 99.9}
SERVER = ("drawn", "rendered", "encoded", "sent", "server")
DISPLAY = ("network_and_display", "network", "display", "pose_to_photon")
TITLES = {
    "drawn": "wait and skeleton",
    "rendered": "engine",
    "encoded": "wait and JPEG",
    "sent": "hand-over to the network",
    "server": "pose in → sent",
    "network_and_display": "network and display (what is left over)",
    "network": "sent → received",
    "display": "received → shown",
    "pose_to_photon": "pose-to-photon (estimated)",
}


class Ring:
    """The latest rows of fixed width, in order of arrival."""

    def __init__(self, names: Sequence[str], kept: int = KEPT) -> None:
        self.names, self.total = tuple(names), 0
        self._rows = np.full((kept, len(self.names)), np.nan, np.float32)

    def add(self, values: Sequence[float]) -> None:
        """Keep one row, perhaps in place of the oldest; nan is not known."""
        self._rows[self.total % len(self._rows)] = values
        self.total += 1

    def rows(self, last: int | None = None) -> np.ndarray:
        """(n, names) float32, oldest first, at most the ``last`` ones."""
        kept = min(self.total, len(self._rows))
        start = self.total - min(kept, last or kept)
        return self._rows[np.arange(start, self.total) % len(self._rows)]


def quantiles(values: np.ndarray) -> dict[str, float]:
    """p50 … p99.9, mean and count of what is known; empty if nothing is."""
    known = values[np.isfinite(values)].astype(np.float64)
    if not known.size:
        return {}
    found = np.percentile(known, list(QUANTILES.values()))
    return {**dict(zip(QUANTILES, found.tolist(), strict=True)), "mean": float(known.mean()), "count": int(known.size)}


class Latency:
    """What became of frames: one ring for what the server knows, one for what clients say."""

    def __init__(self, kept: int = KEPT) -> None:
        self.server, self.display = Ring(SERVER, kept), Ring(DISPLAY, kept)

    def sent(self, times_ms: Mapping[str, float], sent_ms: float) -> None:
        """A frame left for one client. ``times_ms``: the server's clock at pose_in, drawn, rendered and encoded."""
        stamps = [times_ms[name] for name in ("pose_in", "drawn", "rendered", "encoded")] + [sent_ms]
        self.server.add([*np.diff(stamps).tolist(), sent_ms - stamps[0]])

    def shown(
        self,
        times_ms: Mapping[str, float],
        posed_client_ms: float | None,
        shown_client_ms: float,
        received_client_ms: float | None,
        offset_ms: float | None,
    ) -> None:
        """A client showed a frame.

        Args:
            times_ms: the server's clock at pose_in and sent.
            posed_client_ms: the client's clock when it sent the pose, if it did: then no clocks need comparing.
            shown_client_ms, received_client_ms: the client's clock.
            offset_ms: the server's clock minus the client's, as the client found by ping; None if it did not.
        """
        nan, sent = float("nan"), times_ms["sent"]
        offset = nan if offset_ms is None else offset_ms
        received = nan if received_client_ms is None else received_client_ms
        if posed_client_ms is not None:
            total = shown_client_ms - posed_client_ms
        else:
            total = shown_client_ms + offset - times_ms["pose_in"]
        left = total - (sent - times_ms["pose_in"])
        self.display.add([left, received + offset - sent, shown_client_ms - received, total])

    def split(self, last: int | None = None) -> dict[str, dict[str, float]]:
        """Quantiles in ms by stage, and of ``jitter``: how much the whole differs from one frame to the next."""
        found: dict[str, dict[str, float]] = {}
        for ring in (self.server, self.display):
            rows = ring.rows(last)
            found |= {name: quantiles(rows[:, k]) for k, name in enumerate(ring.names)}
        whole = self.display.rows(last)[:, -1] if self.display.total else self.server.rows(last)[:, -1]
        found["jitter"] = quantiles(np.abs(np.diff(whole)))
        return {name: values for name, values in found.items() if values}

    def raw_s(self) -> dict[str, list[float]]:
        """Seconds by stage, of all that is kept and known: for histograms."""
        found: dict[str, list[float]] = {}
        for ring in (self.server, self.display):
            rows = ring.rows().astype(np.float64) / 1e3
            found |= {name: rows[np.isfinite(rows[:, k]), k].tolist() for k, name in enumerate(ring.names)}
        return {name: values for name, values in found.items() if values}


def summary(latency: Latency, counters: Mapping[str, int], elapsed_s: float) -> dict[str, Any]:
    """A session in numbers: the split, the counters, and the shares and rates that follow from them."""
    poses, rendered = counters["poses"], counters["rendered"]
    shares = {name: counters[name] / poses if poses else 0.0 for name in ("dropped", "reused", "failed")}
    return {
        "seconds": elapsed_s,
        "frames_per_second": counters["frames"] / elapsed_s if elapsed_s > 0 else 0.0,
        "counters": dict(counters),
        "shares_of_poses": shares,
        "deadline_miss_share": counters["late"] / rendered if rendered else 0.0,
        "split_ms": latency.split(),
        "titles": TITLES,
    }
