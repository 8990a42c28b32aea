"""A session as a video file, by PyAV (extra ``record``): encoded in a thread of its own, never waited for."""

from __future__ import annotations

import queue
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

from rpfm_edge.core.errors import BackendError, ConfigError, RpfmError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.live.session import Frame

WAITING = 60  # frames; two seconds that the disk or the encoder may stand still
SUFFIXES = (".mp4", ".mkv", ".mov")
_MILLISECONDS = Fraction(1, 1000)


class Recorder:
    """Writes frames as H.264 with the times at which they were rendered; the file appears when it is closed.

    Args:
        path: of the video; its suffix chooses the container.
        size: (height, width) of the frames, even numbers.

    Attributes:
        written, dropped: frames in the file, and frames that found no room to wait.

    Raises:
        ConfigError: another suffix, or an odd size, which H.264 cannot hold.
        BackendError: PyAV is not installed, or has no encoder for H.264.
    """

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"{path} is no video", expected=f"a name in {list(SUFFIXES)}", fix="change its suffix")
        if size[0] % 2 or size[1] % 2:
            raise ConfigError(f"frames are {size[0]} × {size[1]}", expected="even sizes", fix="record no video")
        self.path, self.written, self.dropped, self.error = path, 0, 0, ""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._part = path.with_name(f".{path.stem}.part{path.suffix}")
        self._start, self._last = 0, -1  # ms
        self._container, self._stream = _opened(self._part, size)
        self._frames: queue.Queue[Frame | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)
        self._thread.start()

    def put(self, frame: Frame) -> None:
        """Take a frame, or count it as dropped. Returns at once."""
        try:
            self._frames.put_nowait(frame)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what waits, and give the file its name; raises ``RpfmError`` if that failed."""
        self._frames.put(None)
        self._thread.join()
        if self.error or not self.written:
            self._part.unlink(missing_ok=True)
            raise RpfmError(
                f"{self.path} was not written ({self.error or 'no frame came'})",
                expected="frames, and room for them",
                fix="check the disk, and that poses came",
            )
        self._part.replace(self.path)

    def _run(self) -> None:
        while (frame := self._frames.get()) is not None:
            if not self.error:
                self._guard(self._write, frame)
        self._guard(self._finish)

    def _guard(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # a full disk must not end the service
            self.error = self.error or str(error)

    def _write(self, frame: Frame) -> None:
        picture = import_extra("av", "record").VideoFrame.from_ndarray(frame.image, format="rgb24")
        at = round(frame.times_ms["rendered"])
        self._start = self._start if self.written else at
        self._last = max(at - self._start, self._last + 1)  # times must rise
        picture.pts, picture.time_base = self._last, _MILLISECONDS
        self._container.mux(self._stream.encode(picture))
        self.written += 1

    def _finish(self) -> None:
        if self.written:
            self._container.mux(self._stream.encode())
        self._container.close()


def _opened(path: Path, size: tuple[int, int]) -> tuple[Any, Any]:
    """The container and its stream."""
    av = import_extra("av", "record")
    if "libx264" not in av.codecs_available:
        raise BackendError("this PyAV has no H.264", expected="libx264", fix="install PyAV's own wheel: pip install av")
    container = av.open(str(path), "w")
    stream = container.add_stream(
        "libx264", rate=30, options={"preset": "veryfast", "tune": "zerolatency", "crf": "18"}
    )
    stream.height, stream.width, stream.pix_fmt = size[0], size[1], "yuv420p"
    stream.time_base = stream.codec_context.time_base = _MILLISECONDS
    return container, stream
