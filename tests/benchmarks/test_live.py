"""What the benchmark of the live service concludes from what it measured."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

pytest.importorskip("websockets")
psutil = pytest.importorskip("psutil")
from benchmarks import live  # noqa: E402

GOOD: dict[str, Any] = {
    "speed": {
        "engine_fps": 100.0,
        "served_fps": 97.0,
        "served_share": 0.97,
        "engine_busy_share": 0.95,
        "overhead_ms_p95": 2.0,
    },
    "overload": {
        "seconds": 10,
        "first_p99_ms": 20.0,
        "last_p99_ms": 21.0,
        "growth": 1.05,
        "first_mib": 200.0,
        "last_mib": 201.0,
        "counters": {"poses": 100, "dropped": 50},
        "uncounted": 0,
    },
    "churn": {
        "frames": 100,
        "people_seen": 21,
        "older_after_swap": 0,
        "wrong_pictures": 0,
        "leaked_files": 0,
        "leaked_threads": 0,
    },
}


def test_a_good_run_keeps_every_limit() -> None:
    assert all(kept for *_, kept in live.lines(GOOD))


@pytest.mark.parametrize(
    ("part", "name", "value", "line"),
    [
        ("speed", "served_share", 0.94, 0),
        ("speed", "overhead_ms_p95", 6.1, 1),
        ("overload", "growth", 1.2, 2),
        ("overload", "last_mib", 220.0, 3),
        ("overload", "uncounted", 5, 4),
        ("overload", "uncounted", -1, 4),
        ("churn", "older_after_swap", 1, 5),
        ("churn", "wrong_pictures", 1, 5),
        ("churn", "people_seen", 1, 5),
        ("churn", "leaked_files", 2, 6),
    ],
)
def test_each_fault_breaks_its_own_limit(part: str, name: str, value: float, line: int) -> None:
    bad = deepcopy(GOOD)
    bad[part][name] = value
    assert [k for k, (*_, kept) in enumerate(live.lines(bad)) if not kept] == [line]


def test_the_overhead_is_what_is_left_without_the_engine() -> None:
    times = {"pose_in": 100.0, "drawn": 101.0, "rendered": 111.0, "encoded": 113.0, "sent": 113.5}
    assert live.overhead_ms([{"times_ms": times}]).tolist() == [3.5]


def test_the_motion_never_rests_and_stays_in_the_picture() -> None:
    poses = live.moving((256, 176))
    steps = np.linalg.norm(np.roll(poses, -1, axis=0) - poses, axis=2).max(axis=1)
    assert len(poses) >= 40
    assert steps.min() > 0.25  # px, from where on a picture is not reused
    assert np.isfinite(poses).all()
