"""Temporal flicker: how steady a rendered video is where the true video stands still, at one noise for all frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rpfm_edge.core.errors import InputError
from rpfm_edge.measure.metrics import Summary, statistics
from rpfm_edge.people.held_out import Clip

# Levels of 255. JPEG alone changes a pixel that stands still by so much, beside others that move.
UNCHANGED_LEVELS = 4


def flicker_levels(video: np.ndarray, truth: np.ndarray) -> float:
    """Mean absolute change from frame to frame, in 8-bit levels, where the true video does not change.

    A pixel does not change between two frames if none of its channels does by more than 4 levels in ``truth``. 0 for a
    still video; white noise of deviation σ on it gives 2 σ / √π; nan if everything moves. ``flicker_levels(truth,
    truth)`` is what the recording itself has.

    Args:
        video, truth: (n, H, W, 3) uint8, n at least 2.
    """
    change, true_change = _changes(video, truth)
    still = (true_change <= UNCHANGED_LEVELS).all(axis=3)
    return float(change[still].mean()) if still.any() else float("nan")


def motion_ratio(video: np.ndarray, truth: np.ndarray) -> float:
    """Energy of the changes from frame to frame over that of the true video, ``Σ Δ² / Σ Δ_true²``, all pixels.

    1 for a video that moves as much as the true one; above, it flickers; below, it lags or smears. nan if the true
    video stands still. Arguments as ``flicker_levels``.
    """
    change, true_change = (np.sum(array.astype(np.float64) ** 2) for array in _changes(video, truth))
    return float(change / true_change) if true_change else float("nan")


def _changes(video: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n - 1, H, W, 3) int16 absolute differences of successive frames."""
    for frames in (video, truth):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) < 2:
            raise InputError(
                f"a video is {frames.dtype}{list(frames.shape)}",
                expected="uint8 [n, H, W, 3], n at least 2",
                fix="stack 8-bit RGB frames",
            )
    if video.shape != truth.shape:
        raise InputError(
            f"videos of {list(video.shape)} and {list(truth.shape)} differ",
            expected="the same shape",
            fix="render the frames of the true video",
        )
    first, second = (np.abs(np.diff(frames.astype(np.int16), axis=0)) for frames in (video, truth))
    return first, second


def steadiness(videos: Sequence[np.ndarray], clips: Sequence[Clip]) -> dict[str, Summary]:
    """``{"flicker": {"flicker": …, "motion": …}}``: ``flicker_levels`` and ``motion_ratio`` of each clip's video.

    Empty without videos."""
    if not videos:
        return {}
    pairs = [(video, clip.truth) for video, clip in zip(videos, clips, strict=True)]
    measures = {"flicker": flicker_levels, "motion": motion_ratio}
    return {"flicker": {name: statistics([measure(*pair) for pair in pairs]) for name, measure in measures.items()}}


def over_truth(stages: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Stage → its mean flicker in multiples of the stage ``ground truth``'s own, where both were measured."""
    means = {stage["stage"]: stage["flicker"]["flicker"]["mean"] for stage in stages if "flicker" in stage}
    own = means.get("ground truth")
    return {name: mean / own for name, mean in means.items()} if own else {}
