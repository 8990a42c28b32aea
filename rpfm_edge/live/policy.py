"""Which poses are drawn how: fewer steps when late, the last image when nothing moved, joints without jitter.

Pure state machines over numbers; they know neither engines nor clocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.extras import import_extra

LATE_FRAMES, ROOM_FRAMES, ROOM, ROOM_LOST = 5, 60, 0.85, 10


@dataclass(frozen=True, slots=True)
class Level:
    """Where the deadline policy stands: index into the steps (0 is the most), and how long it has been late or not."""

    index: int = 0
    late: int = 0
    room: int = 0


def next_level(level: Level, steps: Sequence[int], frame_ms: float, deadline_ms: float) -> Level:
    """The level after a frame that took ``frame_ms`` from its pose's arrival to its image.

    One level down after ``LATE_FRAMES`` late frames in a row. One up after ``ROOM_FRAMES`` that would have met ``ROOM``
    of the deadline with the steps of the level above, if time grew as fast as steps; one that would not undoes
    ``ROOM_LOST`` of them, so that rare slow frames do not hold it down. Time grows more slowly, because decoding does
    not repeat: so a steady load never goes up to come down again.

    Args:
        steps: of the levels, falling.
    """
    above = steps[max(level.index - 1, 0)] / steps[level.index]
    late = level.late + 1 if frame_ms > deadline_ms else 0
    room = level.room + 1 if frame_ms * above <= ROOM * deadline_ms else max(level.room - ROOM_LOST, 0)
    if late >= LATE_FRAMES and level.index + 1 < len(steps):
        return Level(level.index + 1)
    if level.index and room >= ROOM_FRAMES:
        return Level(level.index - 1)
    return Level(level.index, late, room)


@dataclass(slots=True)
class StillFilter:
    """Tells when the last image can be shown again: no joint is more than ``eps_px`` from where that image drew it.

    It compares with the pose that was drawn, not with the one before, so a slow drift is not missed; and after ``run``
    reuses an image is drawn in any case.
    """

    eps_px: float
    run: int = 30
    _drawn: np.ndarray | None = field(default=None, init=False)
    _reused: int = field(default=0, init=False)

    def still(self, points: np.ndarray) -> bool:
        """Whether ``points`` (18, 2) need no new image; counts the reuse if so."""
        if self._drawn is None or self._reused >= self.run or not _near(points, self._drawn, self.eps_px):
            return False
        self._reused += 1
        return True

    def drew(self, points: np.ndarray) -> None:
        """An image of ``points`` was made."""
        self._drawn, self._reused = points, 0

    def reset(self) -> None:
        """The last image is of no use any more."""
        self._drawn = None


def _near(a: np.ndarray, b: np.ndarray, eps_px: float) -> bool:
    missing = np.isnan(a[:, 0])
    if not np.array_equal(missing, np.isnan(b[:, 0])):
        return False
    moved = np.hypot(*(a - b)[~missing].T)
    return bool((moved <= eps_px).all())


class Smoother:
    """One-Euro filters (Casiez et al. 2012) on the joints, by the library OneEuroFilter.

    Args:
        cutoff_hz: of a joint at rest; lower is smoother and later.
        beta: how fast the cutoff rises with speed (Hz per pixel/s).

    Raises:
        ConfigError: ``cutoff_hz`` is not above 0.
        BackendError: the library is not installed.
    """

    def __init__(self, cutoff_hz: float, beta: float = 0.02) -> None:
        if not cutoff_hz > 0:
            raise ConfigError(f"the cutoff is {cutoff_hz:g} Hz", expected="a frequency above 0", fix="raise --smooth")
        self._make = import_extra("OneEuroFilter", "live").OneEuroFilter
        self._options = {"freq": 30.0, "mincutoff": cutoff_hz, "beta": beta}
        self._filters: dict[int, tuple[Any, Any]] = {}

    def __call__(self, points: np.ndarray, time_s: float) -> np.ndarray:
        """(18, 2) smoothed; a joint that comes back after it was missing starts anew where it is."""
        smooth = points.copy()
        for joint, (x, y) in enumerate(points.tolist()):
            if x != x:
                self._filters.pop(joint, None)
                continue
            pair = self._filters.setdefault(joint, (self._make(**self._options), self._make(**self._options)))
            smooth[joint] = pair[0](x, time_s), pair[1](y, time_s)
        return smooth
