"""TODO."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from rpfm_edge.core.errors import BackendError, ConfigError, RpfmError
from rpfm_edge.live import record
from rpfm_edge.live.messages import Pose
from rpfm_edge.live.record import Recorder
from rpfm_edge.live.session import Frame
from rpfm_edge.measure.metrics import psnr_db

SIZE = (64, 48)


def frame(number: int, at_ms: float) -> Frame:
    ramp = np.linspace(0, 200, 48)[None, :, None] + np.array([0, 10, 20]) + 2 * number
    image = np.broadcast_to(ramp, (*SIZE, 3)).astype(np.uint8)
    return Frame(number, Pose(number, np.zeros((18, 2)), at_ms), 1, 1, image, False, {"rendered": at_ms})


def test_frames_come_back_in_order_at_their_times(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "out" / "live.mp4"
    recorder = Recorder(path, SIZE)
    times = [1000.0, 1033.4, 1066.0, 1200.0, 1200.2]
    for number, at in enumerate(times):
        recorder.put(frame(number, at))
    assert not path.exists()
    recorder.close()
    with av.open(str(path)) as container:
        found = [(float(one.pts * one.time_base), one.to_ndarray(format="rgb24")) for one in container.decode(video=0)]
    assert [at for at, _ in found] == pytest.approx([0, 0.033, 0.066, 0.2, 0.201], abs=1e-3)
    for number, (_, image) in enumerate(found):
        assert psnr_db(image, frame(number, 0).image) > 35
    capture = cv2.VideoCapture(str(path))  # another reader
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == recorder.written == len(times)
    assert list(path.parent.iterdir()) == [path]


def test_what_finds_no_room_is_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    monkeypatch.setattr(record, "WAITING", 4)
    recorder = Recorder(tmp_path / "live.mkv", SIZE)
    for number in range(2000):
        recorder.put(frame(number % 20, 10.0 * number))
    recorder.close()
    assert recorder.dropped > 0
    assert recorder.written + recorder.dropped == 2000


def test_a_recording_without_frames_leaves_no_file(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(RpfmError, match="no frame came"):
        Recorder(tmp_path / "live.mp4", SIZE).close()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_recorded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="is no video"):
        Recorder(tmp_path / "live.png", SIZE)
    with pytest.raises(ConfigError, match="frames are 63 × 48"):
        Recorder(tmp_path / "live.mp4", (63, 48))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BackendError, match=r"rpfm-edge\[record\]"):
        Recorder(tmp_path / "live.mp4", SIZE)
