"""Flicker against closed forms, and the clips of the sample."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.measure.flicker import flicker_levels, motion_ratio, steadiness
from rpfm_edge.people.data import Split, sample_root
from rpfm_edge.people.deepfashion import open_split
from rpfm_edge.people.held_out import ClipConfig, missing_clips, open_clips
from rpfm_edge.people.splits import open_splits

SIZE, SHAPE = (64, 48), (8, 8, 6)


def still(level: int = 128, frames: int = 9) -> np.ndarray:
    return np.full((frames, 64, 48, 3), level, np.uint8)


def noisy(video: np.ndarray, deviation: float) -> np.ndarray:
    return np.rint(video + np.random.default_rng(0).normal(0, deviation, video.shape)).astype(np.uint8)


def moving(step: int) -> np.ndarray:
    """The left half jumps by ``step`` levels and back; the right half stands still."""
    video = still(100).astype(int)
    video[1::2, :, :24] += step
    return video.astype(np.uint8)


def test_a_still_video_does_not_flicker() -> None:
    assert flicker_levels(still(30), still()) == 0
    assert flicker_levels(still(30), moving(50)) == 0
    assert motion_ratio(still(30), moving(50)) == 0


@pytest.mark.parametrize("deviation", [2.0, 8.0])
def test_white_noise_gives_its_closed_form(deviation: float) -> None:
    total = math.sqrt(deviation**2 + 1 / 12)  # and that of rounding
    assert flicker_levels(noisy(still(), deviation), still()) == pytest.approx(2 * total / math.sqrt(math.pi), rel=0.02)
    # half of the pixels change by 50 levels: 1250 on average, and noise adds 2 σ² everywhere
    ratio = motion_ratio(noisy(moving(50), deviation), moving(50))
    assert ratio == pytest.approx(1 + 2 * total**2 / 1250, rel=0.02)


def test_only_what_stands_still_in_the_truth_counts() -> None:
    video = moving(50)
    assert flicker_levels(video, moving(5)) == 0
    assert flicker_levels(video, moving(4)) == pytest.approx(25)  # 4 levels count as still: both halves do
    assert math.isnan(flicker_levels(still(), np.array([still(10)[0], still(200)[0]] * 5)[:9]))
    one_channel = still().astype(int)
    one_channel[1::2, ..., 2] += 30
    assert math.isnan(flicker_levels(still(), one_channel.astype(np.uint8)))


def test_truth_against_itself_is_the_baseline() -> None:
    truth = moving(3)
    assert flicker_levels(truth, truth) == pytest.approx(1.5)
    assert motion_ratio(truth, truth) == 1
    assert motion_ratio(moving(80), moving(40)) == pytest.approx(4)
    assert math.isnan(motion_ratio(moving(80), still()))


def test_dark_after_bright_does_not_wrap() -> None:
    video = np.stack([still(250)[0], still(5)[0]])
    assert flicker_levels(video, still()[:2]) == 245


def test_videos_that_do_not_pair_are_refused() -> None:
    with pytest.raises(InputError, match=r"videos of \[9, 64, 48, 3\] and \[8, 64, 48, 3\] differ"):
        flicker_levels(still(), still()[:8])
    with pytest.raises(InputError, match=r"a video is uint8\[1, 64, 48, 3\]: expected uint8 \[n, H, W, 3\]"):
        motion_ratio(still()[:1], still()[:1])
    with pytest.raises(InputError, match=r"a video is float32"):
        motion_ratio(still(), still().astype(np.float32))


@pytest.fixture(scope="module")
def split() -> Split:
    """All of the sample, the person of its clip included."""
    return open_split(sample_root(), "test")


def test_a_clip_of_the_sample(split: Split) -> None:
    (clip,) = open_clips(split, ClipConfig(frames=5), SIZE, SHAPE, seed=3)
    folder = sample_root() / "clips" / "p00999"
    assert clip.name == "p00999"
    np.testing.assert_array_equal(clip.source, split.image(split.names.index("p00999_0.jpg"), SIZE))
    assert (clip.truth.shape, clip.poses.shape) == ((5, *SIZE, 3), (5, 18, 2))
    frame = cv2.resize(cv2.imread(str(folder / "004.jpg")), (48, 64), interpolation=cv2.INTER_AREA)[..., ::-1]
    np.testing.assert_array_equal(clip.truth[4], frame)
    name, y, x = (folder / "annotation.csv").read_text().splitlines()[3].split(":")
    pose = np.array([[float(n) for n in axis.strip(" []").split(",")] for axis in (x, y)]).T
    pose = np.where(pose == -1, np.nan, pose) * (48 / 176, 64 / 256)
    assert name == "002.jpg"
    np.testing.assert_allclose(clip.poses[2], pose, atol=1e-4)
    np.testing.assert_array_equal(clip.source_pose, split.pose(split.names.index("p00999_0.jpg"), SIZE))
    assert clip.noise.shape == (1, *SHAPE)
    assert clip.noise.dtype == np.float32
    again, other = (open_clips(split, ClipConfig(frames=5), SIZE, SHAPE, seed)[0].noise for seed in (3, 4))
    np.testing.assert_array_equal(clip.noise, again)
    assert np.abs(other - again).max() > 0.1
    assert missing_clips(split, ClipConfig()) is None


def test_steadiness_is_a_figure_for_each_clip(split: Split) -> None:
    (clip,) = open_clips(split, ClipConfig(frames=4), SIZE, SHAPE)
    twice = [clip, clip]
    frozen = np.repeat(clip.truth[:1], 4, axis=0)
    found = steadiness([clip.truth, frozen], twice)["flicker"]
    assert found["flicker"]["values"] == [flicker_levels(clip.truth, clip.truth), 0]
    assert found["motion"]["values"] == [1, 0]
    assert steadiness([], twice) == steadiness([], []) == {}


def test_clips_of_people_that_trained_are_left_out(split: Split) -> None:
    held_out = open_splits("sample").test
    assert not [name for name in held_out.names if name.startswith("p00999")]
    assert open_clips(held_out, ClipConfig(), SIZE, SHAPE) == []
    assert missing_clips(held_out, ClipConfig()) == f"{sample_root() / 'clips'} shows none of the held-out people"


def test_data_without_clips(split: Split, tmp_path: Path) -> None:
    elsewhere = replace(split, root=tmp_path)
    assert open_clips(elsewhere, ClipConfig(), SIZE, SHAPE) == []
    assert missing_clips(elsewhere, ClipConfig()) == f"{tmp_path} has no clips"
    assert open_clips(split, ClipConfig(count=0), SIZE, SHAPE) == []
    assert missing_clips(split, ClipConfig(count=0)) == "no clips were asked for"


def test_clips_that_cannot_be_used(split: Split, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clips of 1 frames: expected at least 2"):
        open_clips(split, ClipConfig(frames=1), SIZE, SHAPE)
    folder = tmp_path / "clips" / "p00999"
    shutil.copytree(sample_root() / "clips" / "p00999", folder)
    broken = replace(split, root=tmp_path)
    (folder / "001.jpg").unlink()
    with pytest.raises(InputError, match=r"there is no image file .*001\.jpg"):
        open_clips(broken, ClipConfig(), SIZE, SHAPE)
    lines = (folder / "annotation.csv").read_text().splitlines()
    (folder / "annotation.csv").write_text("\n".join(lines[:2]) + "\n")
    with pytest.raises(InputError, match=r"p00999 has 1 frames: expected at least 2; copy the clip again"):
        open_clips(broken, ClipConfig(), SIZE, SHAPE)
