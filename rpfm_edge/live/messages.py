"""The messages of the live service, version 1: JSON poses in, frames out as a length, a JSON header and a JPEG.

Nothing here knows a network or an engine. Each message stands alone: a bad one is refused with a sentence, and the
next is read as if it had never been.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rpfm_edge.core.errors import InputError
from rpfm_edge.people.formats import from_coco, from_mediapipe, from_openpose
from rpfm_edge.people.pose import check_pose, fit_pose

VERSION = 1
MAX_BYTES = 16_384  # of a text message: 33 landmarks with long decimals take a third of it
MAX_ID = 2**53  # what a number in JavaScript holds exactly
MATTES = ("none", "stacked")
COUNTS = {"openpose18": 18, "coco17": 17, "mediapipe33": 33}
_LIMIT = 1e6  # a coordinate or size beyond it is nonsense, and float32 would round it
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Pose:
    """A pose that was accepted: (18, 2) float32 pixels x, y of the bundle's size, nan where missing."""

    id: int
    points: np.ndarray
    pose_in_ms: float  # the server's clock
    client_ms: float | None = None  # the sender's clock
    owner: int = 0  # the number of the client that sent it; 0 is the server's own source


def decode(text: str | bytes) -> dict[str, Any]:
    """A client's message as a dictionary with a known version and a type; raises ``InputError``."""
    if len(text) > MAX_BYTES:
        raise _bad(f"a message has {len(text)} bytes", f"at most {MAX_BYTES}", "send one pose a message")
    try:
        message = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        why = "too deep" if isinstance(error, RecursionError) else str(error)
        raise _bad(f"a message is no JSON ({why})", "a JSON object", "send one JSON object a message") from None
    if not isinstance(message, dict):
        raise _bad(f"a message is a {type(message).__name__}", "a JSON object", "send one JSON object a message")
    if message.get("v", VERSION) != VERSION:
        raise _bad(f"a message has version {message['v']!r:.20}", f'"v": {VERSION}', "update the client")
    if not isinstance(message.get("type"), str):
        raise _bad("a message has no type", '"type": "pose", "shown", "ping", "options" or "video"', "name its type")
    return message


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def read_pose(message: Mapping[str, Any], size: tuple[int, int], now_ms: float, owner: int = 0) -> Pose:
    """The pose of a message of type ``pose``.

    Args:
        message: from ``decode``.
        size: (height, width) of the bundle, which keypoints of another ``"size"`` are fitted to.
        now_ms: the server's clock, when the message came.
        owner: the number of the client that sent it.

    Raises:
        InputError: a wrong id, time, format, count, keypoint or size; a keypoint outside the picture (MediaPipe's
            are missing there, because it guesses them); MediaPipe's in [0, 1]; no visible keypoint.
    """
    number, client_ms = pose_id(message), _time(message.get("t_ms"))
    kind = message.get("format", "openpose18")
    if not isinstance(kind, str) or kind not in COUNTS:
        raise _bad(f"the pose's format is {kind!r:.40}", f"one of {list(COUNTS)}", "name its format")
    frame = _size(message.get("size"), size)
    triples = _triples(message.get("keypoints"), COUNTS[kind], kind)
    points = _READERS[kind](triples, frame)
    points = check_pose(points, frame)
    fitted = np.asarray(fit_pose(points, frame, size), np.float32)
    return Pose(number, check_pose(fitted, size), now_ms, client_ms, owner)


_READERS: Mapping[str, Callable[[np.ndarray, tuple[int, int]], np.ndarray]] = {
    "openpose18": lambda triples, _: from_openpose(triples),
    "coco17": lambda triples, _: from_coco(triples),
    "mediapipe33": lambda triples, frame: _mediapipe(triples, frame),
}


def _mediapipe(triples: np.ndarray, frame: tuple[int, int]) -> np.ndarray:
    """(18, 2) pixels of ``frame``; refuses MediaPipe's own shares of it, which would all lie within one pixel."""
    points = from_mediapipe(triples / [frame[1], frame[0], 1], frame)
    if np.isfinite(points).any() and np.nanmax(points) <= 1 < min(frame):
        raise _bad(
            "every keypoint lies within 1 pixel of the corner",
            f"pixels of {frame[0]:g} × {frame[1]:g}, not MediaPipe's [0, 1]",
            "multiply x by the width and y by the height",
        )
    return points


def pose_id(message: Mapping[str, Any]) -> int:
    """The id of a message, a whole number from 0 to 2⁵³; raises ``InputError``."""
    number = message.get("id")
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MAX_ID:
        raise _bad(f"the id is {number!r:.30}", "a whole number from 0 to 2⁵³", "count poses from 0")
    return number


def number_or_none(message: Mapping[str, Any], name: str) -> float | None:
    """An optional finite number of a message; raises ``InputError``."""
    value = message.get(name)
    return None if value is None else _time(value, name)


def _time(value: Any, name: str = "t_ms") -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
        raise _bad(f"{name} is {value!r:.30}", "milliseconds", "send the client's clock")
    return float(value)


def _size(given: Any, default: tuple[int, int]) -> tuple[int, int]:
    if given is None:
        return default
    if not isinstance(given, list) or len(given) != 2 or not all(_sound(n) and n >= 1 for n in given):
        raise _bad(f"the size is {given!r:.40}", "[height, width] in pixels", "give the keypoints' frame")
    return given[0], given[1]


def _sound(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LIMIT  # false for nan


def _triples(points: Any, count: int, kind: str) -> np.ndarray:
    """(count, 3) float64 x, y, confidence; null and confidence 0 are missing."""
    if not isinstance(points, list) or len(points) != count:
        found = len(points) if isinstance(points, list) else f"a {type(points).__name__}"
        raise _bad(f"the pose has {found} keypoints", f"{count} of them for {kind}", "check which model made them")
    triples = np.zeros((count, 3))
    for index, point in enumerate(points):
        if point is None:
            continue
        if not isinstance(point, list) or len(point) not in (2, 3) or not all(map(_sound, point)):
            raise _bad(
                f"keypoint {index} is {point!r:.60}",
                "[x, y], [x, y, confidence] with finite numbers, or null",
                "send null where it is missing",
            )
        triples[index] = point if len(point) == 3 else (*point, 1)
    return triples


def _bad(problem: str, expected: str, fix: str) -> InputError:
    return InputError(problem, expected=expected, fix=fix)


def pack(header: Mapping[str, Any], jpeg: bytes) -> bytes:
    """A frame as one binary message: 4 bytes big-endian length of the header, the header as JSON, the JPEG."""
    head = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return _LENGTH.pack(len(head)) + head + jpeg


def unpack(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, JPEG) of a binary message; raises ``InputError`` if it is cut short or has no header."""
    end = _LENGTH.size + (_LENGTH.unpack_from(data)[0] if len(data) >= _LENGTH.size else len(data))
    try:
        header = json.loads(data[_LENGTH.size : end]) if end <= len(data) else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise _bad("a frame is cut short or has no header", "length, JSON header, JPEG", "receive whole messages")
    return header, data[end:]
