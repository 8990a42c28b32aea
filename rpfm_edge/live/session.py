"""The render thread: the latest pose becomes a frame, over one or more opened bundles. It knows no network.

Poses and jobs come in through one condition; frames go out through a function that must not block. All engines are
called from this thread alone. The noise is the bundle's own for every frame, so a video is steady without carrying a
latent from frame to frame (which was tried, and lost the picture: docs/log.md).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rpfm_edge.bundle.pipeline import Person, Pipeline
from rpfm_edge.core.errors import ConfigError, RpfmError
from rpfm_edge.live.messages import Pose
from rpfm_edge.live.policy import Level, Smoother, StillFilter, next_level
from rpfm_edge.people.pose import pose_input

STAGES = ("pose_in", "drawn", "rendered", "encoded", "sent")
_NOBODY = np.full((18, 2), np.nan, np.float32)


def now_ms() -> float:
    """The server's clock: monotonic, in milliseconds."""
    return time.perf_counter() * 1e3


@dataclass(frozen=True, slots=True)
class Options:
    """How poses are drawn.

    Attributes:
        deadline_ms: from a pose's arrival to its image; with several bundles, fewer steps are taken when it is missed.
        still_px: the last image is shown again while no joint moved further; negative never.
        smooth_hz: cutoff of the One-Euro filter on joints; 0 is off.
    """

    deadline_ms: float | None = None
    still_px: float = 0.25
    smooth_hz: float = 0.0


@dataclass(slots=True)
class Frame:
    """An image of a pose. ``times_ms``: the server's clock at each of ``STAGES`` so far."""

    number: int
    pose: Pose
    person: int
    steps: int
    image: np.ndarray
    reused: bool
    times_ms: dict[str, float]
    pictures: dict[str, np.ndarray] = field(default_factory=dict)  # by matte, and encoded; filled where that is done
    jpegs: dict[str, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Counters:
    """What happened to poses: rendered + reused + dropped + failed (+ at most one waiting) = posed."""

    posed: int = 0
    rendered: int = 0
    reused: int = 0
    dropped: int = 0
    failed: int = 0
    late: int = 0
    swaps: int = 0


class Renderer:
    """Draws the latest pose of one person, in a thread of its own between ``start`` and ``close``.

    Args:
        pipelines: bundles of one size, of the same student with falling steps; the first is the best.
        source: (H, W, 3) uint8 RGB of the first person, number 1.
        deliver: takes each frame, in the render thread; must return at once.
        failed: takes what a pose could not be drawn for, likewise.

    Raises:
        ConfigError: bundles of several sizes, or steps that do not fall.
    """

    def __init__(
        self,
        pipelines: Sequence[Pipeline],
        source: np.ndarray,
        deliver: Callable[[Frame], None],
        failed: Callable[[Pose, str], None],
        options: Options,
    ) -> None:
        self.steps = _require_falling(pipelines)
        self.size, self.options, self.counters = pipelines[0].size, options, Counters()
        self.person, self.fixed_steps = 1, 0
        self._pipelines, self._deliver, self._failed = pipelines, deliver, failed
        self._smoother = Smoother(options.smooth_hz) if options.smooth_hz else None
        self._still, self._level = StillFilter(options.still_px), Level()
        self._last: Frame | None = None
        self._people: list[Person] = [pipeline.prepare(source) for pipeline in pipelines]
        self._wake, self._closed = threading.Condition(), False
        self._pose: Pose | None = None
        self._jobs: list[tuple[np.ndarray, Future[int]]] = []
        self._thread = threading.Thread(target=self._run, name="render", daemon=True)

    def start(self) -> None:
        """Warm the engines up, and begin to draw."""
        for pipeline, person in zip(self._pipelines, self._people, strict=True):
            pipeline.render_input(person, pose_input(_NOBODY, pipeline.pose_kind, self.size))
        self._thread.start()

    def close(self) -> None:
        """Stop after the frame in progress; jobs that wait are cancelled."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        for _, future in self._jobs:
            future.cancel()

    def put(self, pose: Pose) -> None:
        """Take a pose in place of one that still waits, which is counted as dropped. From any thread."""
        with self._wake:
            self.counters.posed += 1
            self.counters.dropped += self._pose is not None
            self._pose = pose
            self._wake.notify()

    def swap(self, source: np.ndarray) -> Future[int]:
        """Prepare another person between two frames; the future holds its number. From any thread.

        Every frame that is delivered after the future is done shows the new person.
        """
        future: Future[int] = Future()
        with self._wake:
            self._jobs.append((source, future))
            self._wake.notify()
        return future

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._pose or self._jobs or self._closed)
                if self._closed:
                    return
                jobs, self._jobs = self._jobs, []
                pose, self._pose = (None, self._pose) if jobs else (self._pose, None)
            for source, future in jobs:
                self._exchange(source, future)
            if pose is not None:
                self._draw(pose)

    def _exchange(self, source: np.ndarray, future: Future[int]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            self._people = [pipeline.prepare(source) for pipeline in self._pipelines]
        except Exception as error:  # whatever a picture does to an engine, the stream goes on
            future.set_exception(error)
            return
        self.person += 1
        self.counters.swaps += 1
        self._last = None
        self._still.reset()
        future.set_result(self.person)

    def _draw(self, pose: Pose) -> None:
        try:
            points = self._smoother(pose.points, pose.pose_in_ms / 1e3) if self._smoother else pose.points
            frame = self._reused(pose, points) or self._rendered(pose, points)
        except Exception as error:  # one pose fails, the stream goes on
            self.counters.failed += 1
            self._failed(pose, str(error) if isinstance(error, RpfmError) else f"the pose cannot be drawn ({error}).")
            return
        self._deliver(frame)

    def _reused(self, pose: Pose, points: np.ndarray) -> Frame | None:
        """The last image again, if nothing moved."""
        if self._last is None or not self._still.still(points):
            return None
        self.counters.reused += 1
        last, now = self._last, now_ms()
        times = {"pose_in": pose.pose_in_ms, "drawn": now, "rendered": now}
        return Frame(self._number(), pose, last.person, last.steps, last.image, True, times, last.pictures, last.jpegs)

    def _rendered(self, pose: Pose, points: np.ndarray) -> Frame:
        index = self._index()
        pipeline = self._pipelines[index]
        given = pose_input(points, pipeline.pose_kind, self.size)
        drawn = now_ms()
        image = pipeline.render_input(self._people[index], given)
        done = now_ms()
        self.counters.rendered += 1
        self._still.drew(points)
        self._judge(done - pose.pose_in_ms)
        times = {"pose_in": pose.pose_in_ms, "drawn": drawn, "rendered": done}
        self._last = Frame(self._number(), pose, self.person, self.steps[index], image, False, times)
        return self._last

    def _number(self) -> int:
        return self.counters.rendered + self.counters.reused

    def _index(self) -> int:
        return self.steps.index(self.fixed_steps) if self.fixed_steps else self._level.index

    def _judge(self, frame_ms: float) -> None:
        if self.options.deadline_ms is None:
            return
        self.counters.late += frame_ms > self.options.deadline_ms
        if not self.fixed_steps:
            self._level = next_level(self._level, self.steps, frame_ms, self.options.deadline_ms)

    def fix_steps(self, steps: int) -> None:
        """Draw with so many steps from now on, 0 to let the deadline decide; raises ``ConfigError``."""
        if steps and steps not in self.steps:
            raise ConfigError(
                f"no bundle has {steps} steps", expected=f"one of {list(self.steps)}, or 0", fix="choose one of these"
            )
        self.fixed_steps = steps

    def state(self) -> dict[str, Any]:
        """Facts for a page: size, steps, person and backend."""
        best = self._pipelines[0]
        return {
            "size": list(self.size),
            "bundle": best.bundle.path.name,
            "backend": best.backend,
            "steps": self.steps[self._index()],
            "steps_available": list(self.steps),
            "person": self.person,
            "deadline_ms": self.options.deadline_ms,
        }


def _require_falling(pipelines: Sequence[Pipeline]) -> tuple[int, ...]:
    steps = tuple(int(pipeline.bundle.config["steps"]) for pipeline in pipelines)
    sizes = {pipeline.size for pipeline in pipelines}
    if len(sizes) != 1:
        raise ConfigError(f"the bundles have the sizes {sorted(sizes)}", expected="one size", fix="build them alike")
    if sorted(set(steps), reverse=True) != list(steps):
        raise ConfigError(f"the bundles have {list(steps)} steps", expected="falling steps", fix="order them so")
    return steps
