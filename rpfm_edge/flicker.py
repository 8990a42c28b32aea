"""Temporal flicker: how steady a rendered video is where the true video stands still, at one noise for all frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.data import Split, read_clip
from rpfm_edge.errors import ConfigError, InputError
from rpfm_edge.image import load_image, resize
from rpfm_edge.metrics import Summary, statistics
from rpfm_edge.pose import FRAME, scale_pose

# Levels of 255. JPEG alone changes a pixel that stands still by so much, beside others that move.
UNCHANGED_LEVELS = 4


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """``count`` clips (0: none) of at most ``frames`` frames each.

    ``teacher``: render them with the teacher's reference solver too, at 32 network evaluations a frame."""

    count: int = 2
    frames: int = 30
    teacher: bool = False


@dataclass(frozen=True, slots=True)
class Clip:
    """A held-out person in motion: a source (H, W, 3) and the true video (n, H, W, 3), both uint8, their poses (18, 2)
    and (n, 18, 2) float32 pixels, nan where missing, and one noise (1, C, h, w) float32 for all frames."""

    name: str
    source: np.ndarray
    source_pose: np.ndarray
    poses: np.ndarray
    truth: np.ndarray
    noise: np.ndarray


def open_clips(
    split: Split, config: ClipConfig, size: tuple[int, int], latent_shape: Sequence[int], seed: int = 0
) -> list[Clip]:
    """The first clips of ``ROOT/clips`` whose person is in ``split``, in the order of their names.

    A clip belongs to the person whose pictures' names begin with its own (clip ``p7`` to ``p7_0.jpg``). The first of
    these pictures is the source. So no clip is taken of a person that something was trained on.

    Raises:
        ConfigError: less than two frames.
        InputError: a clip with less than two frames, or with a missing picture.
    """
    if config.frames < 2:
        raise ConfigError(f"clips of {config.frames} frames", expected="at least 2", fix="ask for more, such as 30")
    rng = np.random.default_rng(seed)
    sources = {folder: source for folder in _folders(split.root) if (source := _source(split, folder.name)) is not None}
    return [
        _open(
            folder,
            config.frames,
            split.image(source, size),
            split.pose(source, size),
            rng.standard_normal((1, *latent_shape), np.float32),
        )
        for folder, source in list(sources.items())[: config.count]
    ]


def missing_clips(split: Split, config: ClipConfig) -> str | None:
    """Why there is no clip to measure flicker on, in words; None if there is."""
    folders = _folders(split.root)
    if not folders:
        return f"{split.root} has no clips"
    if config.count < 1:
        return "no clips were asked for"
    if all(_source(split, folder.name) is None for folder in folders):
        return f"{split.root / 'clips'} shows none of the held-out people"
    return None


def _folders(root: Path) -> list[Path]:
    return sorted(file.parent for file in (root / "clips").glob("*/annotation.csv"))


def _source(split: Split, person: str) -> int | None:
    names = sorted(name for name in split.names if name.startswith(f"{person}_"))
    return split.names.index(names[0]) if names else None


def _open(folder: Path, frames: int, source: np.ndarray, source_pose: np.ndarray, noise: np.ndarray) -> Clip:
    names, keypoints = read_clip(folder)
    if len(names) < 2:
        raise InputError(f"{folder} has {len(names)} frames", expected="at least 2", fix="copy the clip again")
    size = (source.shape[0], source.shape[1])
    return Clip(
        name=folder.name,
        source=source,
        source_pose=source_pose,
        poses=np.stack([scale_pose(pose, FRAME, size) for pose in keypoints[:frames]]),
        truth=np.stack([resize(load_image(folder / name), size) for name in names[:frames]]),
        noise=noise,
    )


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
