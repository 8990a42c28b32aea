"""Poses that come from elsewhere than a client: a recorded motion at its rate, a camera or video through a network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, cycle
from typing import Any

import cv2
import numpy as np

from rpfm_edge.core.errors import BackendError, ConfigError, InputError
from rpfm_edge.live.messages import Pose
from rpfm_edge.live.motion import CLIP_FPS
from rpfm_edge.live.session import now_ms
from rpfm_edge.measure.joints import FETCH, estimator, missing_pose
from rpfm_edge.people.pose import fit_pose

MAX_FAILURES = 30  # pictures in a row that a camera does not give, until it counts as gone


def replay(poses: np.ndarray, fps: float) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds since the start, pose) for ever, again from the first after the last."""
    for number, pose in zip(count(), cycle(poses)):
        yield number / fps, pose


def watch(camera: str, size: tuple[int, int]) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds since the start, pose) of the person in a camera or video file, as fast as they come.

    The joints are found by the network of ``rpfm_edge.measure.joints``; a picture without a person gives none. A video
    file is played at its own rate, or more slowly if finding the joints takes longer, and again from the start after
    its end. While poses are not taken, pictures are not either.

    Raises:
        BackendError: the network is not at hand.
        InputError: the camera or file cannot be opened; later, if it stops giving pictures.
    """
    if reason := missing_pose():
        raise BackendError(f"poses cannot be found: {reason}", expected="the network", fix=f"run: {FETCH}")
    return _found(open_camera(camera), camera, estimator(), size)


def _found(
    capture: Any, camera: str, joints: Callable[[np.ndarray], np.ndarray], size: tuple[int, int]
) -> Iterator[tuple[float, np.ndarray]]:
    try:
        for time_s, picture in _pictures(capture, camera):
            rgb = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
            points = fit_pose(joints(rgb), rgb.shape[:2], size)
            if np.isfinite(points).any():
                yield time_s, points
    finally:
        capture.release()


def open_camera(camera: str) -> Any:
    """OpenCV's capture of camera number or file ``camera``; raises ``InputError``."""
    capture = cv2.VideoCapture(int(camera) if camera.isdecimal() else camera)
    if not capture.isOpened():
        capture.release()
        raise InputError(
            f"the camera {camera} cannot be opened",
            expected="the number of a camera, or a video file",
            fix="check that it is plugged in, or the path",
        )
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
    return capture


def _pictures(capture: Any, camera: str) -> Iterator[tuple[float, np.ndarray]]:
    live, fps = camera.isdecimal(), capture.get(cv2.CAP_PROP_FPS) or CLIP_FPS
    start, failures, number = time.perf_counter(), 0, 0
    while failures < MAX_FAILURES:
        good, picture = capture.read()
        if not good:
            failures += 1
            if not live:
                capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
            continue
        failures, number = 0, number + 1
        yield (time.perf_counter() - start if live else number / fps), picture
    raise InputError(f"the camera {camera} gives no picture", expected="pictures", fix="check that it is plugged in")


@dataclass(slots=True)
class Feed:
    """A source of poses in a thread of its own; it gives poses while it is ``on``, and an ``error`` if it ended."""

    name: str
    poses: Iterator[tuple[float, np.ndarray]]
    put: Callable[[Pose], None]
    on: threading.Event
    error: str | None = None
    _thread: threading.Thread | None = None
    _closed: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop after the pose in progress."""
        self._closed.set()
        self.on.set()
        if self._thread:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            self._feed()
        except Exception as error:  # a camera that is unplugged must not end the service
            self.error = str(error)

    def _feed(self) -> None:
        start: float | None = None
        self.on.wait()
        for number, (due_s, points) in enumerate(self.poses):
            start = time.perf_counter() - due_s if start is None else start
            ahead_s = start + due_s - time.perf_counter()
            if ahead_s > 0:
                self._closed.wait(ahead_s)
            if not self.on.is_set():
                self.on.wait()
                start = time.perf_counter() - due_s
            if self._closed.is_set():
                return
            self.put(Pose(number, points, now_ms()))


def check_fps(fps: float) -> float:
    """``fps``, or ``ConfigError`` unless it is between 0 and 1000."""
    if not 0 < fps <= 1000:
        raise ConfigError(f"--fps is {fps:g}", expected="above 0 and at most 1000", fix="choose the motion's rate")
    return fps
