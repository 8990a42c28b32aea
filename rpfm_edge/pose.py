"""Poses: 18 OpenPose keypoints in pixels x, y; drawing, checking, mirroring, reading and writing them.

A missing keypoint is nan, and ``MISSING`` at the boundary of a graph. "Left" and "right" are the person's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import ArrayLike

from rpfm_edge.artifact import write_text
from rpfm_edge.errors import InputError, SignatureError
from rpfm_edge.image import letterbox
from rpfm_edge.signature import TensorSpec

FRAME = (256, 176)  # the default (height, width) in pixels, DeepFashion's
MISSING = -1e4  # both coordinates of a missing joint in a graph: finite, since not every backend keeps nan; fits FP16
PoseKind = Literal["skeleton", "keypoints"]  # a drawn picture, or the keypoints themselves

# fmt: off
KEYPOINTS = (
    "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
    "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
    "right_eye", "left_eye", "right_ear", "left_ear",
)
BONES = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)
# OpenPose's rainbow: joint i has colour i, bone i has colour i, darkened.
COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
    (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
    (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)
_MIRROR = [0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16]
_FROM_BODY_25 = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]  # without mid-hip and feet
# nose, shoulders … ears of COCO-17 and MediaPipe-33 in OpenPose's order, without the neck, which both lack
_FROM_COCO = [0, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3]
_FROM_MEDIAPIPE = [0, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7]
# fmt: on

_THICKNESS = 4 / 256  # radius of joints and half width of bones, as a share of the height
_STARTS, _ENDS = np.array(BONES).T
_SHADES = [tuple(0.6 * channel for channel in colour) for colour in COLOURS]  # of bones
_SHIFT = 4  # fractional bits of the coordinates that OpenCV draws at: a slow motion does not jump from pixel to pixel
_ANGLES = np.linspace(0, 2 * np.pi, 36, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
_MIN_VISIBILITY = 0.5  # MediaPipe's own default

_FORMATS = (
    'OpenPose ("people" with 18 or 25 points), COCO (17 points), MediaPipe (33 landmarks) '
    'or {"keypoints": [[x, y] or null, … 18 of them], "size": [H, W]}'
)


class NobodyError(InputError):
    """A pose of a picture in which nobody was found."""


def draw_skeleton(keypoints: ArrayLike, size: tuple[int, int] = FRAME) -> np.ndarray:
    """Draw a pose on black, in X-MDPT's proportions: bones as ellipses of half width 4, joints as discs of radius 4.

    Args:
        keypoints: (18, 2) pixels x, y of ``size``. One that is not finite leaves out its disc and its bones; one
            outside the picture is drawn as far as it reaches in.
        size: (height, width); the thickness is 4 pixels at a height of 256 and grows with it.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    given = np.asarray(keypoints, np.float64)
    points = np.clip(given, -1e5, 1e5)  # beyond that OpenCV's integers overflow
    visible = np.asarray(np.isfinite(given).all(axis=1))
    canvas, radius = np.zeros((*size, 3), np.uint8), _THICKNESS * size[0]
    bones = np.flatnonzero(visible[_STARTS] & visible[_ENDS])
    outlines = _fixed(_ellipses(points[_STARTS[bones]], points[_ENDS[bones]], radius))
    for bone, outline in zip(bones.tolist(), outlines, strict=True):
        cv2.fillConvexPoly(canvas, outline, _SHADES[bone], shift=_SHIFT)
    centres, disc = _fixed(np.where(visible[:, None], points, 0)).tolist(), round(radius * 2**_SHIFT)
    for joint in np.flatnonzero(visible).tolist():
        cv2.circle(canvas, centres[joint], disc, COLOURS[joint], cv2.FILLED, shift=_SHIFT)
    return canvas


def _ellipses(starts: np.ndarray, ends: np.ndarray, half_width: float) -> np.ndarray:
    """(n, 36, 2) points of the ellipses whose long axes are the bones, (n, 2) to (n, 2): all at once, for speed."""
    axes = (ends - starts) / 2
    lengths = np.hypot(axes[:, 0], axes[:, 1])[:, None]
    along = np.where(lengths > 0, axes / np.where(lengths > 0, lengths, 1), [1.0, 0.0])
    across = np.stack([-along[:, 1], along[:, 0]], axis=1)
    half_axes = np.stack([along * lengths, across * half_width], axis=1)
    outlines: np.ndarray = ((starts + ends) / 2)[:, None] + _CIRCLE @ half_axes
    return outlines


def _fixed(points: np.ndarray) -> np.ndarray:
    fixed: np.ndarray = np.rint(points * 2**_SHIFT).astype(np.int32)
    return fixed


def pose_kind(spec: TensorSpec) -> PoseKind:
    """Which kind a graph's input takes: uint8 (1, H, W, 3) "skeleton", float32 (1, 18, 2) "keypoints".

    Raises:
        SignatureError: it takes neither.
    """
    if spec.dtype == "uint8" and len(spec.shape) == 4:
        return "skeleton"
    if spec.dtype == "float32" and spec.shape == (1, 18, 2):
        return "keypoints"
    raise SignatureError(
        f"input {spec.name!r} is {spec}",
        expected="uint8[1, H, W, 3], a drawn skeleton, or float32[1, 18, 2], keypoints",
        fix="export the student again",
    )


def pose_input(keypoints: np.ndarray, kind: PoseKind, size: tuple[int, int] = FRAME) -> np.ndarray:
    """What a graph takes of a pose: (1, H, W, 3) uint8, drawn, or (1, 18, 2) float32 with ``MISSING``.

    Args:
        keypoints: (18, 2) pixels x, y of ``size`` (height, width); nan where missing. Not checked.
    """
    return draw_skeleton(keypoints, size)[None] if kind == "skeleton" else to_graph(keypoints)[None]


def to_graph(keypoints: np.ndarray) -> np.ndarray:
    """(…, 18, 2) float32 keypoints with ``MISSING`` in both coordinates of a joint where one is nan."""
    points = np.asarray(keypoints, np.float32)
    return np.where(np.isnan(points).any(axis=-1, keepdims=True), np.float32(MISSING), points)


def from_graph(points: np.ndarray) -> np.ndarray:
    """The inverse of ``to_graph``: nan where missing."""
    missing = (points <= MISSING / 2).all(axis=-1, keepdims=True)
    return np.where(missing, np.float32(np.nan), np.asarray(points, np.float32))


def check_pose(pose: ArrayLike, size: tuple[int, int] = FRAME, name: str = "the pose") -> np.ndarray:
    """Return a pose, called ``name``, as (18, 2) float32, or say what is wrong with it.

    Args:
        pose: (18, 2) pixels x, y of ``size`` (height, width); (nan, nan) where missing. The picture reaches
            from -0.5 to W (or H), so that both habits of counting pixels, centres and edges, fit.

    Raises:
        InputError: another shape, inf, half a nan, a keypoint outside the picture, no visible keypoint.
    """
    points = _shaped(pose, name)
    low, high = -0.5, np.array([size[1], size[0]])
    outside = np.flatnonzero(((points < low) | (points > high)).any(axis=1))  # nan compares false
    if outside.size:
        first = int(outside[0])
        x, y = points[first].tolist()
        raise InputError(
            f"keypoint {first} ({KEYPOINTS[first]}) lies at x {x:g}, y {y:g}, outside the picture",
            expected=f"0 ≤ x ≤ {size[1]} and 0 ≤ y ≤ {size[0]}, or nan (null in JSON) where missing",
            fix=f"scale {name} to the picture, or set what lies outside to nan (null in JSON)",
        )
    if np.isnan(points).all():
        raise InputError(f"{name} has no visible keypoint", expected="at least one of 18", fix="detect the pose again")
    return points


def _shaped(pose: ArrayLike, name: str) -> np.ndarray:
    """(18, 2) float32 without inf and with nan in pairs."""
    fix = "see rpfm_edge.pose.KEYPOINTS for the order"
    try:
        points = np.asarray(pose, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name} is no array of numbers", expected="18 pairs x, y", fix=fix) from None
    if points.shape != (18, 2):
        raise InputError(f"{name} has shape {list(points.shape)}", expected="[18, 2], 18 pairs x, y", fix=fix)
    missing = np.isnan(points)
    wrong = np.flatnonzero(np.isinf(points).any(axis=1) | (missing[:, 0] != missing[:, 1]))
    if wrong.size:
        first = int(wrong[0])
        raise InputError(
            f"keypoint {first} ({KEYPOINTS[first]}) of {name} is {points[first].tolist()}",
            expected="two finite numbers, or nan for both",
            fix="where the keypoint is missing, set both x and y to nan (null for the pair in JSON)",
        )
    return points


def flip(keypoints: np.ndarray, width: int) -> np.ndarray:
    """Mirror (…, 18, 2) keypoints of a picture ``width`` pixels wide: x → width - 1 - x, left and right swapped."""
    mirrored = keypoints[..., _MIRROR, :].copy()
    mirrored[..., 0] = width - 1 - mirrored[..., 0]
    return mirrored


def fit_pose(keypoints: np.ndarray, from_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Move keypoints of a picture of ``from_size`` (height, width) to where ``image.fit_image`` moves the picture."""
    box = letterbox(from_size, size)
    scaled = scale_pose(keypoints, from_size, (box.height, box.width))
    return scaled + np.array([box.left, box.top], np.float32)


def scale_pose(keypoints: np.ndarray, from_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Stretch keypoints of a picture of ``from_size`` (height, width) to ``size``, as ``image.resize`` stretches it."""
    factors = np.array([size[1] / from_size[1], size[0] / from_size[0]])
    return np.asarray(keypoints * factors, np.float32)


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
        points = _shaped(_parse(person, canvas or size), "the pose")
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
        return _shaped([[np.nan, np.nan] if point is None else point for point in points], "the pose")
    count = f"{len(points)} entries" if isinstance(points, list) else f"a {type(points).__name__}"
    raise InputError(f"its keypoints are {count}", expected=_FORMATS, fix="check which model made them")


def write_pose(path: str | Path, keypoints: ArrayLike, size: tuple[int, int] = FRAME) -> None:
    """Write a pose, pixels x, y of ``size`` (height, width), as JSON that ``read_pose`` gives back exactly."""
    points = _shaped(keypoints, "the pose")
    # str gives the shortest decimal that float32 reads back
    rows = [None if np.isnan(x) else [float(str(x)), float(str(y))] for x, y in points]
    write_text(Path(path), json.dumps({"keypoints": rows, "size": list(size)}))
