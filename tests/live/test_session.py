"""TODO."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rpfm_edge import Pipeline, api
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.live.messages import Pose
from rpfm_edge.live.policy import LATE_FRAMES, Smoother
from rpfm_edge.live.session import Frame, Options, Renderer, now_ms


class Stage:
    """A renderer whose frames are put in a queue, and which can be held up."""

    def __init__(self, pipelines: list[Pipeline], source: np.ndarray, **options: Any) -> None:
        self.frames: Queue[Frame] = Queue()
        self.errors: Queue[tuple[Pose, str]] = Queue()
        self.free = threading.Event()
        self.free.set()
        self.renderer = Renderer(pipelines, source, self._take, lambda *e: self.errors.put(e), Options(**options))

    def _take(self, frame: Frame) -> None:
        self.frames.put(frame)
        self.free.wait()

    def __enter__(self) -> Stage:
        self.renderer.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.free.set()
        self.renderer.close()

    def draw(self, number: int, points: np.ndarray) -> Frame:
        self.renderer.put(Pose(number, points, now_ms()))
        return self.frames.get(timeout=10)


def test_frames_are_those_of_the_pipeline(
    live_pipeline: Pipeline, sources: list[np.ndarray], poses: np.ndarray
) -> None:
    with Stage([live_pipeline], sources[0], still_px=-1) as stage:
        frames = [stage.draw(k, points) for k, points in enumerate(poses[:3])]
    person = live_pipeline.prepare(sources[0])
    for frame, points in zip(frames, poses, strict=False):
        np.testing.assert_array_equal(frame.image, live_pipeline.render(person, points))
        stamps = [frame.times_ms[name] for name in ("pose_in", "drawn", "rendered")]
        assert stamps == sorted(stamps)


def test_the_latest_pose_wins_and_every_drop_is_counted(
    live_pipeline: Pipeline, sources: list[np.ndarray], poses: np.ndarray
) -> None:
    with Stage([live_pipeline], sources[0], still_px=-1) as stage:
        stage.free.clear()
        stage.draw(0, poses[0])  # the thread is held up after this one
        for number in range(1, 10):
            stage.renderer.put(Pose(number, poses[number], now_ms()))
        stage.free.set()
        assert stage.frames.get(timeout=10).pose.id == 9
        counters = stage.renderer.counters
    assert (counters.posed, counters.rendered, counters.dropped) == (10, 2, 8)


def test_after_a_swap_every_frame_shows_the_new_person(
    live_pipeline: Pipeline, sources: list[np.ndarray], poses: np.ndarray
) -> None:
    people = [live_pipeline.prepare(source) for source in sources]
    pictures = [live_pipeline.render(person, poses[0]) for person in people]
    assert all((a != b).any() for a, b in itertools.combinations(pictures, 2))  # people can be told apart
    stop = threading.Event()
    with Stage([live_pipeline], sources[0], still_px=-1) as stage:

        def flood() -> None:
            number = 0
            while not stop.is_set():
                stage.renderer.put(Pose(number, poses[number % 50], now_ms()))
                number += 1
                stop.wait(0.0005)

        thread = threading.Thread(target=flood)
        thread.start()
        for swap in range(1, 9):
            assert stage.renderer.swap(sources[swap % 4]).result(timeout=10) == swap + 1
            before = stage.frames.qsize()
            frames = [stage.frames.get(timeout=10) for _ in range(before + 3)]
            assert {frame.person for frame in frames[before:]} == {swap + 1}
            for frame in frames:
                expected = live_pipeline.render(people[(frame.person - 1) % 4], frame.pose.points)
                np.testing.assert_array_equal(frame.image, expected)
        stop.set()
        thread.join()


def test_a_still_pose_is_drawn_once_but_not_across_a_swap(
    live_pipeline: Pipeline, sources: list[np.ndarray], poses: np.ndarray
) -> None:
    with Stage([live_pipeline], sources[0], still_px=0.5) as stage:
        first, second = (stage.draw(k, poses[0]) for k in range(2))
        assert (first.reused, second.reused) == (False, True)
        assert second.image is first.image
        assert (second.pose.id, second.number) == (1, 2)
        stage.renderer.swap(sources[1]).result(timeout=10)
        assert not stage.draw(2, poses[0]).reused
        counters = stage.renderer.counters
    assert (counters.posed, counters.rendered, counters.reused) == (3, 2, 1)


def test_a_swap_that_was_cancelled_changes_nothing(
    live_pipeline: Pipeline, sources: list[np.ndarray], poses: np.ndarray
) -> None:
    with Stage([live_pipeline], sources[0], still_px=-1) as stage:
        stage.free.clear()
        stage.draw(0, poses[0])  # the thread is held up after this one
        assert stage.renderer.swap(sources[1]).cancel()
        stage.free.set()
        assert stage.draw(1, poses[1]).person == 1
        assert stage.renderer.swap(sources[1]).result(timeout=10) == 2


def test_a_smoothed_joint_is_followed_to_where_it_stops(live_pipeline: Pipeline, sources: list[np.ndarray]) -> None:
    with Stage([live_pipeline], sources[0], still_px=0.01, smooth_hz=2.0) as stage:
        frames = []
        for number in range(60):
            points = np.full((18, 2), 10 if number < 2 else 30, np.float32)
            stage.renderer.put(Pose(number, points, 1000 * number / 30))
            frames.append(stage.frames.get(timeout=10))
    reused = [frame.reused for frame in frames]
    assert reused[1]  # at rest
    assert not any(reused[2:6])  # on its way, although the pose itself has stopped
    assert reused[-1]  # at rest again
    smoother, last = Smoother(2.0), 59 - reused[::-1].index(False)
    smooth = [smoother(frame.pose.points, number / 30) for number, frame in enumerate(frames)]
    np.testing.assert_allclose(smooth[last], 30, atol=0.1)
    expected = live_pipeline.render(live_pipeline.prepare(sources[0]), smooth[last])
    np.testing.assert_array_equal(frames[-1].image, expected)


def test_a_pose_or_picture_that_fails_does_not_end_the_stream(
    live_bundle: Path, sources: list[np.ndarray], poses: np.ndarray
) -> None:
    with Pipeline.open(live_bundle) as pipeline, Stage([pipeline], sources[0], still_px=-1) as stage:
        with pytest.raises(InputError, match="an image is"):
            stage.renderer.swap(np.zeros((4, 4), np.uint8)).result(timeout=10)
        assert stage.draw(0, poses[0]).person == 1
        pipeline.close()
        stage.renderer.put(Pose(1, poses[1], now_ms()))
        pose, message = stage.errors.get(timeout=10)
        assert pose.id == 1
        assert "session is closed" in message
        stage.renderer.put(Pose(2, poses[1], now_ms()))
        assert stage.errors.get(timeout=10)[0].id == 2
        assert stage.renderer.counters.failed == 2


def test_steps_fall_when_the_deadline_is_missed_and_can_be_fixed(
    live_pipeline: Pipeline, tiny_student: Artifact, sources: list[np.ndarray], poses: np.ndarray, tmp_path: Path
) -> None:
    from distill.export import export

    graph = export(tiny_student.path, tmp_path / "graph", steps=1)
    bundle = api.build(str(graph.path), tmp_path / "bundle", ["onnxruntime"], {})
    with (
        Pipeline.open(bundle.path) as fast,
        Stage([live_pipeline, fast], sources[0], still_px=-1, deadline_ms=1e-6) as stage,
    ):
        steps = [stage.draw(k, points).steps for k, points in enumerate(poses[: LATE_FRAMES + 2])]
        assert steps == [2] * LATE_FRAMES + [1] * 2
        assert stage.renderer.counters.late == LATE_FRAMES + 2
        stage.renderer.fix_steps(2)
        assert stage.draw(20, poses[20]).steps == 2
        with pytest.raises(ConfigError, match="no bundle has 3 steps"):
            stage.renderer.fix_steps(3)
        expected = fast.render(fast.prepare(sources[0]), poses[30])
        stage.renderer.fix_steps(1)
        np.testing.assert_array_equal(stage.draw(30, poses[30]).image, expected)


def bundle_of(steps: int, size: tuple[int, int] = (64, 48)) -> Any:
    return SimpleNamespace(size=size, bundle=SimpleNamespace(config={"steps": steps}))


@pytest.mark.parametrize(
    ("bundles", "words"),
    [
        ([bundle_of(1), bundle_of(2)], "falling steps"),
        ([bundle_of(2), bundle_of(2)], "falling steps"),
        ([bundle_of(2), bundle_of(1, (32, 32))], "one size"),
    ],
)
def test_bundles_that_do_not_fit_together_are_refused(bundles: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Renderer(bundles, np.zeros((64, 48, 3), np.uint8), lambda _: None, lambda *_: None, Options())
