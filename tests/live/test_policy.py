"""TODO."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpfm_edge.core.errors import ConfigError
from rpfm_edge.live.policy import LATE_FRAMES, ROOM_FRAMES, Level, Smoother, StillFilter, next_level

STEPS = (4, 2, 1)


def run(fixed_ms: float, step_ms: float, deadline_ms: float, frames: int, start: int = 0) -> list[int]:
    """Levels over a run in which a frame takes ``fixed_ms`` and ``step_ms`` a step."""
    level, seen = Level(start), []
    for _ in range(frames):
        level = next_level(level, STEPS, fixed_ms + step_ms * STEPS[level.index], deadline_ms)
        seen.append(level.index)
    return seen


def test_steps_fall_after_so_many_late_frames_and_no_earlier() -> None:
    seen = run(5, 10, deadline_ms=30, frames=2 * LATE_FRAMES)  # 45, 25 and 15 ms
    assert seen == [0] * (LATE_FRAMES - 1) + [1] * (LATE_FRAMES + 1)


def test_steps_rise_when_there_is_room() -> None:
    seen = run(5, 2, deadline_ms=30, frames=2 * ROOM_FRAMES, start=2)  # 13, 9 and 7 ms
    assert seen == [2] * (ROOM_FRAMES - 1) + [1] * ROOM_FRAMES + [0]


def test_one_late_frame_changes_nothing() -> None:
    level = Level()
    for frame_ms in [40.0, 20.0] * 50:
        level = next_level(level, STEPS, frame_ms, 30)
    assert level.index == 0


@pytest.mark.parametrize(("slow", "rises"), [(30, True), (5, False)])
def test_rare_slow_frames_do_not_hold_the_steps_down(slow: int, rises: bool) -> None:
    level = Level(1)
    for number in range(10 * ROOM_FRAMES):  # 2 steps: 10 ms, now and then 25; the deadline is 30
        level = next_level(level, STEPS, 25.0 if number % slow == 0 else 10.0, 30)
    assert (level.index == 0) == rises


def test_at_the_fewest_steps_lateness_has_no_further_effect() -> None:
    assert run(100, 1, deadline_ms=10, frames=100)[-1] == 2


@given(st.floats(0, 50), st.floats(0.1, 50), st.floats(1, 200), st.sampled_from([0, 1, 2]))
def test_a_steady_load_never_goes_up_to_come_down_again(fixed: float, step: float, deadline: float, start: int) -> None:
    changes = np.diff([start, *run(fixed, step, deadline, 400, start)])
    assert not ((changes > 0).any() and (changes < 0).any())


def pose(x: float) -> np.ndarray:
    return np.full((18, 2), x, np.float32)


def test_the_still_filter_compares_with_what_was_drawn() -> None:
    still = StillFilter(1.0, run=100)
    assert not still.still(pose(0))
    still.drew(pose(0))
    assert [still.still(pose(x)) for x in (0.0, 0.3, 0.6)] == [True] * 3
    assert not still.still(pose(0.9))  # √2 · 0.9 > 1, although it moved by 0.3 only


def test_the_still_filter_draws_again_after_a_bounded_run() -> None:
    still = StillFilter(1.0, run=3)
    still.drew(pose(0))
    assert [still.still(pose(0)) for _ in range(5)] == [True] * 3 + [False] * 2
    still.drew(pose(0))
    assert still.still(pose(0))


def test_a_joint_that_vanishes_is_motion_and_negative_eps_is_off() -> None:
    gone = pose(0)
    gone[3] = np.nan
    still = StillFilter(1.0)
    still.drew(pose(0))
    assert not still.still(gone)
    still.drew(gone)
    assert still.still(gone)
    off = StillFilter(-1.0)
    off.drew(pose(0))
    assert not off.still(pose(0))


def test_smoothing_quiets_a_still_joint_and_follows_a_step() -> None:
    rng, smoother = np.random.default_rng(0), Smoother(1.0)
    noisy = 50 + rng.normal(0, 1, (200, 18, 2)).astype(np.float32)
    smooth = np.stack([smoother(points, k / 30) for k, points in enumerate(noisy)])
    assert smooth[50:].std() < 0.5 * noisy[50:].std()
    moved = [smoother(np.full((18, 2), 90, np.float32), (200 + k) / 30) for k in range(60)]
    np.testing.assert_allclose(moved[-1], 90, atol=0.5)


def test_a_joint_that_comes_back_starts_where_it_is() -> None:
    smoother, gone = Smoother(1.0), pose(10)
    gone[4] = np.nan
    smoother(pose(10), 0.0)
    assert np.isnan(smoother(gone, 0.1)[4]).all()
    assert smoother(pose(80), 0.2)[4].tolist() == [80, 80]


def test_a_cutoff_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise --smooth"):
        Smoother(0)
