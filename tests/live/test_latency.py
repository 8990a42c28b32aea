from __future__ import annotations

import numpy as np
import pytest

from rpfm_edge.live.latency import Latency, Ring, quantiles, summary


def test_a_frames_time_is_split_without_remainder() -> None:
    latency = Latency(16)
    times = {"pose_in": 100.0, "drawn": 101.0, "rendered": 111.0, "encoded": 113.0, "sent": 113.0}
    latency.sent(times, 114.0)
    latency.shown(
        times, posed_client_ms=5_000.0, shown_client_ms=5_030.0, received_client_ms=5_020.0, offset_ms=-4_902.0
    )
    split = {name: values["p50"] for name, values in latency.split().items()}
    assert split["drawn"] + split["rendered"] + split["encoded"] + split["sent"] == split["server"] == 14
    assert split["pose_to_photon"] == 30
    assert split["network_and_display"] == 30 - 13
    assert (split["network"], split["display"]) == (5, 10)


def test_a_viewer_needs_the_offset_and_is_left_out_without() -> None:
    times, latency = {"pose_in": 100.0, "sent": 113.0}, Latency(16)
    latency.shown(times, None, 5_030.0, None, None)
    assert "pose_to_photon" not in latency.split()
    latency.shown(times, None, 5_030.0, None, -4_900.0)
    found = latency.split()["pose_to_photon"]
    assert (found["p50"], found["p99_9"], found["count"]) == (30, 30, 1)


def test_a_ring_keeps_the_latest_in_order() -> None:
    ring = Ring(("a",), kept=4)
    for value in range(6):
        ring.add([value])
    assert ring.rows()[:, 0].tolist() == [2, 3, 4, 5]
    assert ring.rows(2)[:, 0].tolist() == [4, 5]


def test_quantiles_are_those_of_a_known_series() -> None:
    found = quantiles(np.append(np.arange(1001.0), np.nan))
    known = {"p50": 500, "p95": 950, "p99": 990, "p99_9": 999, "mean": 500, "count": 1001}
    assert found == pytest.approx(known)
    assert quantiles(np.array([np.nan])) == {}


def test_jitter_is_the_change_from_frame_to_frame() -> None:
    latency = Latency(16)
    for total in (10.0, 14.0, 12.0):
        latency.sent({"pose_in": 0.0, "drawn": 0.0, "rendered": 0.0, "encoded": 0.0}, total)
    assert latency.split()["jitter"]["p50"] == 3


def test_a_summary_counts_every_pose() -> None:
    counters = {"poses": 10, "frames": 8, "rendered": 5, "reused": 3, "dropped": 2, "failed": 0, "late": 1}
    found = summary(Latency(4), counters, 2.0)
    assert found["frames_per_second"] == 4
    assert found["shares_of_poses"] == {"dropped": 0.2, "reused": 0.3, "failed": 0.0}
    assert found["deadline_miss_share"] == 0.2
