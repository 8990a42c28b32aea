"""Frames as WebRTC video, received by aiortc from the real service and a real bundle."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import cv2
import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect

from rpfm_edge import Pipeline
from rpfm_edge.core.errors import BackendError
from rpfm_edge.live import messages
from rpfm_edge.measure.metrics import psnr_db
from tests.live.driver import driver

aiortc = pytest.importorskip("aiortc", reason="needs aiortc: pip install 'rpfm-edge[webrtc]'")

from rpfm_edge.live import rtc  # noqa: E402
from rpfm_edge.live.rtc import STRIP_ROWS, numbered, read_number  # noqa: E402

Start = Callable[..., Any]
PATIENCE_S = 20


class Viewer:
    """A client with a peer connection: poses at a steady rate, and what comes back by each way."""

    def __init__(self, ws: ClientConnection) -> None:
        self.ws, self.connection = ws, peer()
        self.channel: Any = None
        self.answers: list[dict[str, Any]] = []
        self.headers: dict[int, dict[str, Any]] = {}
        self.pictures: dict[int, np.ndarray] = {}
        self.jpegs: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.order: list[tuple[str, int]] = []  # of ("person" or "header", person)
        self.tasks = [asyncio.create_task(self.listen())]

    async def listen(self) -> None:
        async for data in self.ws:
            if isinstance(data, bytes):
                self.jpegs.append(messages.unpack(data)[0])
                continue
            message = json.loads(data)
            if message["type"] == "video":
                self.answers.append(message)
            elif message["type"] == "error":
                self.errors.append(message["message"])
            elif message["type"] == "person":
                self.order.append(("person", message["person"]))

    def told(self, text: str) -> None:
        header = json.loads(text)
        self.headers[header["frame"]] = header
        self.order.append(("header", header["person"]))

    async def say(self, **message: Any) -> None:
        await self.ws.send(json.dumps({"v": 1, **message}))

    async def speak(self, poses: np.ndarray, rate: float = 25, by_channel: bool = False) -> None:
        number = 0
        while True:
            pose = {"v": 1, "type": "pose", "id": number, "keypoints": poses[number % len(poses)].tolist()}
            if not by_channel:
                await self.ws.send(json.dumps(pose))
            elif self.channel and self.channel.readyState == "open":
                self.channel.send(json.dumps(pose))
            await asyncio.sleep(1 / rate)
            number += 1

    async def watch(self, track: Any) -> None:
        while True:
            image = (await track.recv()).to_ndarray(format="rgb24")
            self.pictures[read_number(image)] = image

    async def open_video(self) -> str:
        """Connect; the SDP of the answer."""
        self.channel = self.connection.createDataChannel("frames", ordered=False, maxRetransmits=0)
        self.channel.on("message", self.told)
        self.connection.addTransceiver("video", direction="recvonly")
        self.connection.on("track", lambda track: self.tasks.append(asyncio.create_task(self.watch(track))))
        await self.connection.setLocalDescription(await self.connection.createOffer())
        await self.say(type="video", id=7, sdp=self.connection.localDescription.sdp)
        await until(lambda: self.answers)
        [answer] = self.answers
        assert answer["id"] == 7
        assert answer["sdp"], self.errors
        await self.connection.setRemoteDescription(aiortc.RTCSessionDescription(answer["sdp"], "answer"))
        return str(answer["sdp"])

    async def begin(self, poses: np.ndarray, rate: float = 25) -> None:
        """Speak until the end, and go on once the first picture and its header are here."""
        self.tasks.append(asyncio.create_task(self.speak(poses, rate)))
        await self.open_video()
        await until(self.seen)

    def seen(self) -> list[int]:
        return sorted(self.headers.keys() & self.pictures.keys())


def peer() -> Any:
    return aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))


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
    end = asyncio.get_running_loop().time() + PATIENCE_S
    while not condition():
        assert asyncio.get_running_loop().time() < end
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


@pytest.mark.parametrize("by_channel", [False, True])
def test_pictures_and_headers_come_apart_and_belong_together(
    start: Start, live_pipeline: Pipeline, sources: list[np.ndarray], poses: np.ndarray, by_channel: bool
) -> None:
    running, port = start(webrtc=True)
    person, few = live_pipeline.prepare(sources[0]), poses[:2]

    async def body(viewer: Viewer) -> None:
        viewer.tasks.append(asyncio.create_task(viewer.speak(few, by_channel=by_channel)))
        answer = await viewer.open_video()
        payload = re.search(r"^m=video \d+ \S+ (\d+)", answer, re.MULTILINE)[1]
        assert f"a=rtpmap:{payload} H264/90000" in answer
        assert "a=sendonly" in answer
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
        if not by_channel:  # the end of video is the end of the channel
            await viewer.say(type="video", sdp=None)
            await until(lambda: len(viewer.jpegs) > jpegs + 3)
            assert viewer.answers[1:] == [{"v": 1, "type": "video", "id": None, "sdp": None}]
        assert viewer.errors == []

    with_viewer(port, body)
    assert running.counters()["sent"] > 40


def test_a_pose_that_was_overtaken_is_no_fault(start: Start, poses: np.ndarray) -> None:
    running, port = start(webrtc=True)

    async def body(viewer: Viewer) -> None:
        await viewer.open_video()
        await until(lambda: viewer.channel.readyState == "open")
        for number in (5, 3, 6):
            pose = {"v": 1, "type": "pose", "id": number, "keypoints": poses[number].tolist()}
            viewer.channel.send(json.dumps(pose))
        viewer.channel.send('{"v": 1, "type": "pose", "id": 9, "keypoints": 3}')
        await until(lambda: viewer.errors)
        assert ["keypoints" in error for error in viewer.errors] == [True]

    with_viewer(port, body)
    counted = running.counters()
    assert (counted["poses"], counted["refused"]) == (2, 2)


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
        await viewer.begin(poses, rate=100)
        for number, source in enumerate(sources[1:], 2):
            swapped = asyncio.run_coroutine_threadsafe(running.swap(source), running._loop)
            assert await asyncio.wrap_future(swapped) == number
            await until(lambda number=number: ("header", number) in viewer.order)
        await asyncio.sleep(0.2)
        shown = [person for kind, person in viewer.order if kind == "header"]
        assert shown == sorted(shown)

    with_viewer(port, body)


def test_when_the_client_hangs_up_jpegs_come_again_and_nothing_stays(start: Start, poses: np.ndarray) -> None:
    running, port = start(webrtc=True)

    async def body(viewer: Viewer) -> None:
        await viewer.begin(poses)
        jpegs = len(viewer.jpegs)
        await viewer.connection.close()
        await until(lambda: len(viewer.jpegs) > jpegs + 3)

    for _ in range(3):
        with_viewer(port, body)
    held = running._connections
    end = asyncio.run_coroutine_threadsafe(until(lambda: not (held.open or held.tasks)), running._loop)
    end.result(PATIENCE_S)


def test_when_the_encoder_fails_jpegs_come_again(
    start: Start, poses: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, port = start(webrtc=True)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no encoder")

    async def body(viewer: Viewer) -> None:
        await viewer.begin(poses)
        jpegs = len(viewer.jpegs)
        monkeypatch.setattr(rtc, "_made", broken)
        await until(lambda: len(viewer.jpegs) > jpegs + 3)

    with_viewer(port, body)


def test_a_client_that_vanishes_without_a_word_gets_jpegs(
    start: Start, poses: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    ice = pytest.importorskip("aioice.ice")
    monkeypatch.setattr(ice, "CONSENT_INTERVAL", 0.2)
    monkeypatch.setattr(ice, "CONSENT_FAILURES", 3)
    _, port = start(webrtc=True)

    async def body(viewer: Viewer) -> None:
        await viewer.begin(poses)
        jpegs = len(viewer.jpegs)
        for transport in sockets(viewer.connection):
            transport.abort()
        await until(lambda: len(viewer.jpegs) > jpegs + 3)

    with_viewer(port, body)


def test_a_connection_that_never_stands_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtc, "CONNECT_S", 0.5)
    running, port = start(webrtc=True)
    with driver(port) as client:
        client.say(type="video", sdp=offer("vd"))  # whose maker is gone
        assert client.text("video")["sdp"]
        [connection] = running._connections.open.values()
        end = asyncio.run_coroutine_threadsafe(until(lambda: connection.connectionState == "closed"), running._loop)
        end.result(PATIENCE_S)


def sockets(connection: Any) -> list[Any]:
    """The UDP sockets of a connection."""
    ice = connection.sctp.transport.transport._connection
    return [protocol.transport for protocol in ice._protocols]


def offer(kinds: str, direction: str = "recvonly") -> str:
    """SDP that aiortc itself makes: v is video, a audio, d a data channel."""

    async def made() -> str:
        connection = peer()
        for kind in kinds:
            if kind == "d":
                connection.createDataChannel("frames")
            else:
                connection.addTransceiver({"v": "video", "a": "audio"}[kind], direction=direction)
        await connection.setLocalDescription(await connection.createOffer())
        sdp = connection.localDescription.sdp
        await connection.close()
        return str(sdp)

    return asyncio.run(made())


@pytest.mark.parametrize(
    ("sdp", "said"),
    [
        (5, "an offer, or null"),
        ("nonsense", "cannot be answered"),
        (offer("v"), "not one video and one data channel"),
        (offer("a"), "not one video and one data channel"),
        (offer("ad"), "not one video and one data channel"),
        (offer("vvd"), "not one video and one data channel"),
        (offer("avd"), "not one video and one data channel"),
        (offer("vd", "sendonly"), "does not receive video"),
        (offer("vd") + "a=candidate:1 1 udp 1 10.0.0.1 9 typ host\r\n" * 40, "more than 32 candidates"),
    ],
)
def test_an_offer_that_cannot_be_answered_changes_nothing(
    start: Start, poses: np.ndarray, sdp: object, said: str
) -> None:
    running, port = start(webrtc=True)
    with driver(port) as client:
        client.say(type="video", id=3, sdp=sdp)
        assert said in client.text("error")["message"]
        assert client.text("video") == {"v": 1, "type": "video", "id": 3, "sdp": None}
        client.pose(poses[0])
        assert client.frame()[0]["id"] == 0
        assert not running._connections.open


def test_what_a_client_sends_is_not_decoded(start: Start) -> None:
    _, port = start(webrtc=True)
    with driver(port) as client:
        client.say(type="video", sdp=offer("vd", "sendrecv"))
        assert "a=sendonly" in client.text("video")["sdp"]


def test_a_bad_offer_leaves_a_good_connection(start: Start, poses: np.ndarray) -> None:
    _, port = start(webrtc=True)

    async def body(viewer: Viewer) -> None:
        await viewer.begin(poses)
        await viewer.say(type="video", sdp="nonsense")
        await until(lambda: viewer.errors)
        seen = len(viewer.seen())
        await until(lambda: len(viewer.seen()) > seen + 10)
        assert viewer.connection.connectionState == "connected"

    with_viewer(port, body)


def test_offers_are_limited(start: Start) -> None:
    _, port = start(webrtc=True)
    with driver(port) as client:
        for _ in range(4):
            client.say(type="video", sdp="nonsense")
        said = [client.text("error")["message"] for _ in range(4)]
        assert ["too many offers" in text for text in said] == [False, False, True, True]


def test_only_where_it_is_asked_for(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    _, port = start()
    with driver(port) as client:
        assert client.hello["pictures"] == ["jpeg"]
        client.say(type="video", sdp="v=0")
        assert "--webrtc" in client.text("error")["message"]
    monkeypatch.setitem(sys.modules, "rpfm_edge.live.rtc", None)
    with pytest.raises(BackendError, match=r"rpfm-edge\[webrtc\]"):
        start(webrtc=True)
