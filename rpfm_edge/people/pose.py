"""Poses: 18 OpenPose keypoints in pixels x, y; drawing, checking, mirroring, reading and writing them.

A missing keypoint is nan, and ``MISSING`` at the boundary of a graph. "Left" and "right" are the person's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import ArrayLike

from rpfm_edge.core.errors import InputError, SignatureError
from rpfm_edge.core.signature import GIVEN_JOINTS, PoseKind, Signature, TensorSpec
from rpfm_edge.people.image import Image, letterbox


def prepare_feeds(boundary: Signature, source: Image, keypoints: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The inputs of ``prepare``: a picture of its size, and (18, 2) keypoints, nan where missing, if it takes any."""
    feeds = {"source": source[None]}
    if any(spec.name == GIVEN_JOINTS for spec in boundary.inputs):
        given = np.full((18, 2), MISSING, np.float32) if keypoints is None else to_graph(keypoints)
        feeds[GIVEN_JOINTS] = given[None]
    return feeds


def passed(boundary: Signature, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of the tensors of ``prepare`` that ``frame`` takes."""
    return {name: tensors[name] for spec in boundary.inputs if (name := spec.name) in tensors}


FRAME = (256, 176)  # the default (height, width) in pixels, DeepFashion's
MISSING = -1e4  # both coordinates of a missing joint in a graph: finite, since not every backend keeps nan; fits FP16

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
# fmt: on

_THICKNESS = 4 / 256  # radius of joints and half width of bones, as a share of the height
_STARTS, _ENDS = np.array(BONES).T
_SHADES = [tuple(0.6 * channel for channel in colour) for colour in COLOURS]  # of bones
_SHIFT = 4  # fractional bits of the coordinates that OpenCV draws at: a slow motion does not jump from pixel to pixel
_ANGLES = np.linspace(0, 2 * np.pi, 36, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


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
    points = shaped(pose, name)
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


def shaped(pose: ArrayLike, name: str) -> np.ndarray:
    """(18, 2) float32 without inf and with nan in pairs."""
    fix = "see rpfm_edge.people.pose.KEYPOINTS for the order"
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
