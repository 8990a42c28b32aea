"""TODO."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from rpfm_edge.core.errors import BackendError, ConfigError, InputError
from rpfm_edge.live import sources
from rpfm_edge.live.messages import Pose
from rpfm_edge.live.sources import Feed, check_fps, replay, watch

SIZE = (64, 48)


def test_a_replay_keeps_its_rate_and_starts_again(poses: np.ndarray) -> None:
    found = list(itertools.islice(replay(poses[:2], 20), 5))
    assert [due for due, _ in found] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    np.testing.assert_array_equal(found[4][1], poses[0])
    for fps in (0, -1, 1e6, float("nan")):
        with pytest.raises(ConfigError, match="--fps is"):
            check_fps(fps)


def test_a_feed_gives_poses_in_time_and_only_while_it_is_on(poses: np.ndarray) -> None:
    got: list[tuple[float, Pose]] = []
    feed = Feed("motion", replay(poses, 50), lambda pose: got.append((time.perf_counter(), pose)), threading.Event())
    feed.start()
    time.sleep(0.05)
    assert not got
    feed.on.set()
    time.sleep(0.5)
    feed.on.clear()
    time.sleep(0.1)
    count = len(got)
    assert 5 <= count <= 27
    time.sleep(0.1)
    assert len(got) == count
    assert [pose.id for _, pose in got] == list(range(count))
    early = [at - got[0][0] - number / 50 for number, (at, _) in enumerate(got)]
    assert min(early) > -0.005  # never before its time
    feed.close()


def test_a_feed_does_not_wait_for_its_next_pose_to_end(poses: np.ndarray) -> None:
    got: queue.Queue[Pose] = queue.Queue()
    feed = Feed("slow motion", replay(poses, 0.05), got.put, threading.Event())
    feed.on.set()
    feed.start()
    got.get(timeout=10)
    feed.close()  # the next is due in twenty seconds, and five are waited for
    assert "slow motion" not in [thread.name for thread in threading.enumerate()]
    assert got.empty()


def test_a_feed_that_ends_says_why() -> None:
    def broken() -> Iterator[tuple[float, np.ndarray]]:
        yield 0.0, np.zeros((18, 2), np.float32)
        raise InputError("the camera 0 gives no picture", expected="pictures", fix="check the plug")

    got: list[Pose] = []
    feed = Feed("camera", broken(), got.append, threading.Event())
    feed.on.set()
    feed.start()
    end = time.monotonic() + 5
    while feed.error is None and time.monotonic() < end:
        time.sleep(0.01)
    assert feed.error is not None
    assert "gives no picture" in feed.error
    assert len(got) == 1
    feed.close()


def test_a_video_file_gives_poses_at_its_own_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    from tests.blob import blob_network

    monkeypatch.setenv("RPFM_EDGE_POSE", str(blob_network(tmp_path / "blob.xml")))
    path = str(tmp_path / "video.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 10, (128, 256))
    for x in (30, None, 60):
        picture = np.zeros((256, 128, 3), np.uint8)
        if x is not None:
            picture[20:28, x - 4 : x + 4] = 255
        writer.write(picture)
    writer.release()
    found = list(itertools.islice(watch(path, SIZE), 4))
    assert [due for due, _ in found] == pytest.approx([0.1, 0.3, 0.4, 0.6])  # nobody is in the second picture
    noses = np.stack([points[0] for _, points in found])
    expected = [[x / 4 + 8, 6] for x in (30, 60, 30, 60)]  # a quarter of the size, padded by 8 on each side
    np.testing.assert_allclose(noses, expected, atol=0.4)


def test_a_camera_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "missing_pose", lambda: None)
    with pytest.raises(InputError, match=r"the camera .*none.mp4 cannot be opened"):
        watch(str(tmp_path / "none.mp4"), SIZE)
    monkeypatch.setattr(sources, "missing_pose", lambda: "the network is not at hand")
    with pytest.raises(BackendError, match="the network is not at hand"):
        watch("0", SIZE)


def test_a_video_that_stops_giving_pictures_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead:
        def get(self, _: int) -> float:
            return 0.0

        def read(self) -> tuple[bool, None]:
            return False, None

    with pytest.raises(InputError, match="gives no picture"):
        next(sources._pictures(Dead(), "0"))
