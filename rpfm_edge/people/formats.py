"""Pose files of other tools (OpenPose, COCO, MediaPipe), read into our 18 keypoints and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rpfm_edge.core.errors import InputError
from rpfm_edge.core.files import write_text
from rpfm_edge.people.pose import FRAME, fit_pose, scale_pose, shaped

_FROM_BODY_25 = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]  # without mid-hip and feet
# nose, shoulders … ears of COCO-17 and MediaPipe-33 in OpenPose's order, without the neck, which both lack
_FROM_COCO = [0, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
_FROM_MEDIAPIPE = [0, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7]
_MIN_VISIBILITY = 0.5  # MediaPipe's own default

_FORMATS = (
    'OpenPose ("people" with 18 or 25 points), COCO (17 points), MediaPipe (33 landmarks) '
    'or {"keypoints": [[x, y] or null, … 18 of them], "size": [H, W]}'
)


class NobodyError(InputError):
    """A pose of a picture in which nobody was found."""


def from_openpose(points: ArrayLike) -> np.ndarray:
    """(18, 2) from OpenPose's COCO-18 or BODY-25: (18 or 25, 3) x, y, confidence (0 is missing), or the same flat."""
    triples = _triples(points, (18, 25), "OpenPose")
    return _visible(triples[_FROM_BODY_25] if len(triples) == 25 else triples, 0)


def from_coco(points: ArrayLike) -> np.ndarray:
    """(18, 2) from COCO: (17, 3) x, y, visibility (0 is missing), or the same flat.

    COCO has no neck: it becomes the middle of the shoulders, missing if one of them is.
    """
    return _with_neck(_visible(_triples(points, (17,), "COCO")[_FROM_COCO], 0))


def from_mediapipe(landmarks: ArrayLike, size: tuple[int, int] = FRAME) -> np.ndarray:
    """(18, 2) pixels of ``size`` from MediaPipe: (33, 3) x, y, visibility, all in [0, 1].

    A visibility below 0.5 is missing, and so is a landmark outside the picture (MediaPipe guesses those).
    MediaPipe has no neck: it becomes the middle of the shoulders, missing if one of them is.
    """
    triples = _triples(landmarks, (33,), "MediaPipe")[_FROM_MEDIAPIPE]
    triples[((triples[:, :2] < 0) | (triples[:, :2] > 1)).any(axis=1), 2] = 0
    return scale_pose(_with_neck(_visible(triples, np.nextafter(_MIN_VISIBILITY, 0))), (1, 1), size)


def _triples(points: ArrayLike, counts: tuple[int, ...], name: str) -> np.ndarray:
    try:
        array = np.array(points, np.float64)  # a copy
    except (TypeError, ValueError, OverflowError):
        array = np.empty(0)
    if array.ndim == 1 and array.size % 3 == 0:
        array = array.reshape(-1, 3)
    if array.ndim != 2 or array.shape[1] != 3 or len(array) not in counts:
        raise InputError(
            f"{name} keypoints have shape {list(np.shape(array))}",
            expected=" or ".join(f"{n} × 3 numbers" for n in counts),
            fix="check which model made them",
        )
    return array


def _visible(triples: np.ndarray, above: float) -> np.ndarray:
    """(n, 2) float32 of (n, 3) x, y, score; nan unless the score is above ``above``."""
    return np.where(triples[:, 2:] > above, triples[:, :2], np.nan).astype(np.float32)


def _with_neck(points: np.ndarray) -> np.ndarray:
    """Insert the neck, the middle of the shoulders (nan if one is), into 17 points in OpenPose's order."""
    return np.insert(points, 1, (points[1] + points[4]) / 2, axis=0)


def read_pose(path: str | Path, size: tuple[int, int] = FRAME) -> np.ndarray:
    """Read the first person of a JSON file from OpenPose, COCO, MediaPipe or ``write_pose``.

    Points are fitted to ``size`` (height, width) as ``image.load_image`` fits pictures, if the file gives the size of
    its picture (``"size": [H, W]``, or ``canvas_height`` and ``canvas_width``); otherwise they are pixels of ``size``.

    Returns:
        (18, 2) float32, pixels x, y of ``size``, nan where missing.

    Raises:
        InputError: no such file, no JSON, an unknown format, a wrong number of points.
        NobodyError: nobody is in the picture.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror})", expected="a pose file", fix="check the path"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error})", expected=_FORMATS, fix="export the pose as JSON") from None
    try:
        person = _first(data)
        canvas = _canvas(person)
        points = shaped(_parse(person, canvas or size), "the pose")
    except InputError as error:
        raise type(error)(f"{path}: {error.problem}", expected=error.expected, fix=error.fix) from None
    if np.isnan(points).all():
        raise NobodyError(f"{path} has nobody in the picture", expected="a person", fix="detect the pose again")
    return fit_pose(points, canvas, size) if canvas else points


def _first(data: Any) -> Any:
    """The first frame or person of a list of them."""
    if isinstance(data, list) and data and isinstance(data[0], dict) and {"people", "keypoints"} & data[0].keys():
        return data[0]
    return data


def _canvas(data: Any) -> tuple[int, int] | None:
    """(height, width) of the picture that the points belong to, if the file tells."""
    if not isinstance(data, dict):
        return None
    given = data.get("size", [data.get("canvas_height"), data.get("canvas_width")])
    if given == [None, None]:
        return None
    whole = (
        isinstance(given, list) and len(given) == 2 and all(isinstance(n, (int, float)) and 0 < n < 1e6 for n in given)
    )
    if not whole:
        raise InputError(f"the size of its picture is {given}", expected="[height, width] in pixels", fix="correct it")
    return given[0], given[1]


def _parse(data: Any, size: tuple[int, int]) -> np.ndarray:
    """(18, 2) pixels of ``size``."""
    if isinstance(data, dict):
        if "people" in data:
            return _parse_openpose(data["people"], size)
        if "keypoints" in data:
            return _parse_keypoints(data["keypoints"])
        for name in ("pose_landmarks", "poseLandmarks", "landmarks", "landmark"):
            if name in data:
                return _parse(data[name], size)
    if isinstance(data, list):
        if not data:
            raise NobodyError("nobody is in the picture", expected="a person", fix="detect the pose again")
        if isinstance(data[0], list) and data[0] and isinstance(data[0][0], dict):
            return _parse(data[0], size)
        if isinstance(data[0], dict) and {"x", "y"} <= data[0].keys():
            return from_mediapipe([[p.get("x"), p.get("y"), p.get("visibility", 1)] for p in data], size)
        if isinstance(data[0], (list, int, float)):
            return _parse_keypoints(data)
    raise InputError("it is in no known pose format", expected=_FORMATS, fix="export it in one of these")


def _parse_openpose(people: Any, size: tuple[int, int]) -> np.ndarray:
    person = people[0] if isinstance(people, list) and people else {}
    points = person.get("pose_keypoints_2d") if isinstance(person, dict) else None
    if not points:
        raise NobodyError("nobody is in the picture", expected="a person", fix="detect the pose again")
    keypoints = from_openpose(points)
    # Some writers of ControlNet give shares of the canvas.
    return scale_pose(keypoints, (1, 1), size) if np.nanmax(np.abs(keypoints), initial=0) <= 1 else keypoints


def _parse_keypoints(points: Any) -> np.ndarray:
    """Our own 18 pairs, or COCO."""
    if isinstance(points, list) and len(points) in (17, 51):
        return from_coco(points)
    if isinstance(points, list) and len(points) == 18:
        return shaped([[np.nan, np.nan] if point is None else point for point in points], "the pose")
    count = f"{len(points)} entries" if isinstance(points, list) else f"a {type(points).__name__}"
    raise InputError(f"its keypoints are {count}", expected=_FORMATS, fix="check which model made them")


def write_pose(path: str | Path, keypoints: ArrayLike, size: tuple[int, int] = FRAME) -> None:
    """Write a pose, pixels x, y of ``size`` (height, width), as JSON that ``read_pose`` gives back exactly."""
    points = shaped(keypoints, "the pose")
    # str gives the shortest decimal that float32 reads back
    rows = [None if np.isnan(x) else [float(str(x)), float(str(y))] for x, y in points]
    write_text(Path(path), json.dumps({"keypoints": rows, "size": list(size)}))
