"""Recorded motions: a clip of the data set, pose files, or a ``.pose`` file of pose-format (extra ``motion``)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.core.errors import InputError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.people.deepfashion import read_clip
from rpfm_edge.people.formats import NobodyError, from_coco, from_mediapipe, from_openpose, read_pose
from rpfm_edge.people.pose import FRAME, check_pose, fit_pose

CLIP_FPS = 30.0
Reader = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


def read_motion(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, float]:
    """The poses of a recorded motion, fitted to ``size``, and their rate.

    Args:
        path: a clip of the data set (a folder with ``annotation.csv``, in pixels of 256 × 176), a folder of JSON
            files in order of their names, one pose each (OpenPose writes such), one JSON file, or a ``.pose`` file.

    Returns:
        (n, 18, 2) float32, without frames in which nobody is seen; poses a second, ``CLIP_FPS`` if the file does not
        tell.

    Raises:
        InputError: nothing there that can be read, or no pose in it.
        BackendError: a ``.pose`` file, and no library for it.
    """
    fps = CLIP_FPS
    if path.suffix == ".pose":
        poses, fps = _read_pose_format(path, size)
    elif (path / "annotation.csv").is_file():
        poses = list(fit_pose(read_clip(path)[1], FRAME, size))
    elif path.is_dir():
        poses = _read_folder(path, size)
    else:
        poses = [read_pose(path, size)]
    usable = [check_pose(pose, size) for pose in poses if np.isfinite(pose).any()]
    if not usable:
        raise InputError(
            f"{path} has no pose", expected="a clip, a folder of pose files, or one", fix="check what is in it"
        )
    return np.stack(usable), fps


def _read_folder(path: Path, size: tuple[int, int]) -> list[np.ndarray]:
    poses = []
    for file in sorted(path.glob("*.json")):
        with suppress(NobodyError):  # OpenPose writes such files
            poses.append(read_pose(file, size))
    return poses


# Bodies by the name of their component: how many of its points are read, and (n, 3) x, y, score and the size → (18, 2).
_BODIES: dict[str, tuple[int, Reader]] = {
    "pose_keypoints_2d": (25, lambda triples, _: from_openpose(triples)),  # OpenPose's BODY-25
    "BODY_135": (17, lambda triples, _: from_coco(triples)),  # OpenPose, AlphaPose and MMPose begin with COCO's 17
    "BODY_133": (17, lambda triples, _: from_coco(triples)),
    "BODY_136": (17, lambda triples, _: from_coco(triples)),
    "BODY": (17, lambda triples, _: from_coco(triples)),
    "POSE_LANDMARKS": (33, lambda triples, size: from_mediapipe(triples / [size[1], size[0], 1], size)),
}


def _read_pose_format(path: Path, size: tuple[int, int]) -> tuple[list[np.ndarray], float]:
    """The first person's poses and the rate of a ``.pose`` file; what lies outside its picture is missing."""
    library = import_extra("pose_format", "motion")
    try:
        found = library.Pose.read(path.read_bytes())
        frame, fps = (found.header.dimensions.height, found.header.dimensions.width), float(found.body.fps)
        start, count, convert = _body(found.header.components)
        points = np.ma.getdata(found.body.data)[:, 0, start : start + count, :2].astype(np.float64)
        scores = np.asarray(found.body.confidence)[:, 0, start : start + count, None].astype(np.float64)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror})", expected="a .pose file", fix="check the path"
        ) from None
    except Exception as error:  # the library tells a damaged file in many ways
        raise InputError(
            f"{path} is no .pose file of a body ({type(error).__name__}: {error!s:.200})",
            expected=f"one that pose-format wrote, with one of {list(_BODIES)} whole",
            fix="record the whole body, or export it again",
        ) from None
    if not (min(frame) > 0 and 0 < fps < 1000):
        raise InputError(
            f"{path} says {frame[1]} × {frame[0]} pixels at {fps:g} frames per second",
            expected="a size, and a rate above 0 and below 1000",
            fix="export it again",
        )
    inside = ((points >= 0) & (points <= [frame[1], frame[0]])).all(axis=2, keepdims=True)
    triples = np.concatenate([np.where(inside, points, 0), np.where(inside, scores, 0)], axis=2)
    return [fit_pose(convert(pose, frame), frame, size) for pose in triples], fps


def _body(components: list[Any]) -> tuple[int, int, Reader]:
    """Where the points of the first component that is a whole body start, how many are read, and what reads them."""
    start = 0
    for component in components:
        if component.name in _BODIES and len(component.points) >= _BODIES[component.name][0]:
            return start, *_BODIES[component.name]
        start += len(component.points)
    raise ValueError(f"it has {[f'{one.name} of {len(one.points)} points' for one in components]}")
