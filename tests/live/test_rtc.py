"""Frames as WebRTC video, received by aiortc from the real service and a real bundle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import cv2
import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect

from rpfm_edge import Pipeline
from rpfm_edge.errors import BackendError
from rpfm_edge.live import messages, service
from rpfm_edge.metrics import psnr_db
from tests.live.driver import driver

aiortc = pytest.importorskip("aiortc", reason="needs aiortc: pip install 'rpfm-edge[webrtc]'")

from rpfm_edge.live.rtc import STRIP_ROWS, numbered, read_number  # noqa: E402

Start = Callable[..., Any]
PATIENCE_S = 20


class Viewer:
    """A client with a peer connection: poses at a steady rate, and what comes back by each way."""

    def __init__(self, ws: ClientConnection) -> None:
        self.ws, self.connection = ws, aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))
        self.answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self.headers: dict[int, dict[str, Any]] = {}
        self.pictures: dict[int, np.ndarray] = {}
        self.jpegs: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.persons: list[int] = []
        self.tasks = [asyncio.create_task(self.listen())]

    async def listen(self) -> None:
        async for data in self.ws:
            if isinstance(data, bytes):
                self.jpegs.append(messages.unpack(data)[0])
                continue
            message = json.loads(data)
            if message["type"] == "header":
                self.headers[message["frame"]] = message
                assert not self.persons or message["person"] >= self.persons[-1]
            elif message["type"] == "video" and not self.answer.done():
                self.answer.set_result(message["sdp"])
            elif message["type"] == "error":
                self.errors.append(message["message"])
            elif message["type"] == "person":
                self.persons.append(message["person"])

    async def say(self, **message: Any) -> None:
        await self.ws.send(json.dumps({"v": 1, **message}))

    async def speak(self, poses: np.ndarray, rate: float = 25) -> None:
        number = 0
        while True:
            await self.say(type="pose", id=number, keypoints=poses[number % len(poses)].tolist())
            await asyncio.sleep(1 / rate)
            number += 1

    async def watch(self, track: Any) -> None:
        while True:
            image = (await track.recv()).to_ndarray(format="rgb24")
            self.pictures[read_number(image)] = image

    async def open_video(self) -> None:
        self.connection.addTransceiver("video", direction="recvonly")
        self.connection.on("track", lambda track: self.tasks.append(asyncio.create_task(self.watch(track))))
        await self.connection.setLocalDescription(await self.connection.createOffer())
        await self.say(type="video", sdp=self.connection.localDescription.sdp)
        sdp = await asyncio.wait_for(self.answer, PATIENCE_S)
        assert sdp is not None, self.errors
        await self.connection.setRemoteDescription(aiortc.RTCSessionDescription(sdp, "answer"))

    def seen(self) -> list[int]:
        return sorted(self.headers.keys() & self.pictures.keys())


@asynccontextmanager
async def viewer(port: int) -> AsyncIterator[Viewer]:
    async with connect(f"ws://127.0.0.1:{port}/ws", compression=None) as ws:
        found = Viewer(ws)
        try:
            yield found
        finally:
            for task in found.tasks:
                task.cancel()
            await asyncio.gather(*found.tasks, return_exceptions=True)
            await found.connection.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.02)


def with_viewer(port: int, body: Callable[[Viewer], Awaitable[None]]) -> None:
    async def run() -> None:
        async with viewer(port) as found:
            await body(found)

    asyncio.run(run())


@pytest.mark.parametrize("width", [48, 176, 352])
def test_numbers_survive_a_codec(width: int) -> None:
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (8, 6, 3)).astype(np.uint8), (width, 64))
    for number in (0, 1, 255, 21845, 43690, 65535, 70_000):
        picture = numbered(image, number)
        np.testing.assert_array_equal(picture[:-STRIP_ROWS], image)
        data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 10])[1]
        assert read_number(cv2.imdecode(data, cv2.IMREAD_COLOR)) == number % 65536


def test_pictures_and_headers_come_apart_and_belong_together(
    start: Start, live_pipeline: Pipeline, sources: list[np.ndarray], poses: np.ndarray
) -> None:
    running, port = start(webrtc=True)
    person, few = live_pipeline.prepare(sources[0]), poses[:2]

    async def body(viewer: Viewer) -> None:
        viewer.tasks.append(asyncio.create_task(viewer.speak(few)))
        await until(lambda: viewer.jpegs)
        await viewer.open_video()
        await until(lambda: len(viewer.seen()) > 40)
        jpegs = len(viewer.jpegs)
        await asyncio.sleep(0.3)
        assert len(viewer.jpegs) == jpegs  # one way at a time
        right = [live_pipeline.render(person, pose) for pose in few]
        for number in viewer.seen()[20:]:  # the bitrate has settled
            shown, which = viewer.pictures[number][:-STRIP_ROWS], viewer.headers[number]["id"] % 2
            assert shown.shape == right[0].shape
            assert psnr_db(shown, right[which]) > psnr_db(shown, right[1 - which])
        stamps = viewer.headers[viewer.seen()[-1]]["times_ms"]
        assert list(stamps.values()) == sorted(stamps.values())
        await viewer.say(type="video", sdp=None)
        await until(lambda: len(viewer.jpegs) > jpegs + 3)
        assert viewer.errors == []

    with_viewer(port, body)
    counted = running.counters()
    assert counted["sent"] > 40


def test_alpha_comes_below_the_picture(start: Start, poses: np.ndarray) -> None:
    _, port = start(webrtc=True)

    async def body(viewer: Viewer) -> None:
        viewer.tasks.append(asyncio.create_task(viewer.speak(poses)))
        await viewer.say(type="options", matte="stacked")
        await viewer.open_video()
        await until(viewer.seen)
        assert {viewer.pictures[number].shape for number in viewer.seen()} == {(2 * 64 + STRIP_ROWS, 48, 3)}

    with_viewer(port, body)


def test_no_header_shows_someone_who_was_exchanged(start: Start, sources: list[np.ndarray], poses: np.ndarray) -> None:
    running, port = start(webrtc=True)

    async def body(viewer: Viewer) -> None:
        viewer.tasks.append(asyncio.create_task(viewer.speak(poses, 100)))
        await viewer.open_video()
        await until(viewer.seen)
        for number, source in enumerate(sources[1:], 2):
            swapped = asyncio.run_coroutine_threadsafe(running.swap(source), running._loop)
            assert await asyncio.wrap_future(swapped) == number
            await until(lambda number=number: any(one["person"] == number for one in viewer.headers.values()))

    with_viewer(port, body)  # the viewer itself asserts the order


def test_when_the_connection_breaks_jpegs_come_again_and_nothing_stays(start: Start, poses: np.ndarray) -> None:
    running, port = start(webrtc=True)

    async def body(viewer: Viewer) -> None:
        viewer.tasks.append(asyncio.create_task(viewer.speak(poses)))
        await viewer.open_video()
        await until(viewer.seen)
        jpegs = len(viewer.jpegs)
        await viewer.connection.close()
        await until(lambda: len(viewer.jpegs) > jpegs + 3)

    for _ in range(3):
        with_viewer(port, body)
    end = asyncio.run_coroutine_threadsafe(until(lambda: not (running._connections or running._tasks)), running._loop)
    end.result(PATIENCE_S)


def test_offers_that_cannot_be_answered_change_nothing(start: Start, poses: np.ndarray) -> None:
    _, port = start(webrtc=True)
    audio = "v=0\r\no=- 0 0 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\nm=audio 9 RTP/AVP 0\r\nc=IN IP4 0.0.0.0\r\na=recvonly\r\n"
    with driver(port) as client:
        for sdp, said in ((5, "an offer, or null"), ("nonsense", "cannot be answered"), (audio, "cannot be answered")):
            client.say(type="video", sdp=sdp)
            assert said in client.text("error")["message"]
        for _ in range(3):
            client.say(type="video", sdp="nonsense")
        assert any("too many offers" in client.text("error")["message"] for _ in range(3))
        client.pose(poses[0])
        assert client.frame()[0]["id"] == 0


def test_only_where_it_is_asked_for(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    _, port = start()
    with driver(port) as client:
        assert client.hello["pictures"] == ["jpeg"]
        client.say(type="video", sdp="v=0")
        assert "--webrtc" in client.text("error")["message"]
    monkeypatch.setitem(__import__("sys").modules, "rpfm_edge.live.rtc", None)
    with pytest.raises(BackendError, match=r"rpfm-edge\[webrtc\]"):
        start(webrtc=True)
    assert service.WEBRTC == "webrtc"
