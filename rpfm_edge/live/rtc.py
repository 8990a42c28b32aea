"""Frames as a WebRTC video track, by aiortc (extra ``webrtc``), for networks that lose packets.

RTP has no room for the number of a frame, so it is drawn below the picture: a strip of 16 cells, which any codec
keeps. The header follows over a data channel when the frame has left, and a client shows no frame without its header.
Poses may come over that channel too. Nothing on it is sent twice, so nothing waits for what was lost.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine, Mapping
from fractions import Fraction
from typing import Any

import aiortc
import av
import numpy as np
from aiortc.mediastreams import MediaStreamError

from rpfm_edge.core.errors import InputError
from rpfm_edge.live.clients import Client, header, heard, picture
from rpfm_edge.live.session import Frame, now_ms

STRIP_ROWS, STRIP_BITS = 16, 16
# What is preferred, and which encoder of PyAV it needs; lost packets of both may be sent again (rtx).
CODECS = {"video/H264": "libx264", "video/VP8": "libvpx"}
CONNECT_S = 20.0
CANDIDATES = 32  # of an offer: each address of it is sent something
CONGESTED = 16_384  # bytes of headers that wait: then there are none for new pictures
_MILLISECONDS = Fraction(1, 1000)
_BITS = 2 ** np.arange(STRIP_BITS)[::-1]


def numbered(image: np.ndarray, number: int) -> np.ndarray:
    """``image`` (H, W, 3) uint8, below it the lowest 16 bits of ``number``, high first, 1 is white: (H + 16, W, 3)."""
    bits = (number & _BITS > 0)[np.arange(image.shape[1]) * STRIP_BITS // image.shape[1]]
    strip = np.where(bits, np.uint8(255), np.uint8(0))[None, :, None]
    return np.concatenate([image, np.broadcast_to(strip, (STRIP_ROWS, image.shape[1], 3))])


def read_number(image: np.ndarray) -> int:
    """The number below a picture that ``numbered`` made, whatever a codec did to it."""
    centres = (np.arange(STRIP_BITS) * 2 + 1) * image.shape[1] // (2 * STRIP_BITS)
    cells = image[-STRIP_ROWS // 2 - 2 : -STRIP_ROWS // 2 + 2, centres].mean(axis=(0, 2))
    return int((cells > 127) @ _BITS)


class FrameTrack(aiortc.MediaStreamTrack):
    """The frames of one client, the latest whenever the encoder is free. While it is read, no JPEGs are sent."""

    kind = "video"

    def __init__(self, client: Client, service: Any) -> None:
        super().__init__()
        self._client, self._service, self._last = client, service, -1
        self._channel: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._leaving: tuple[Frame, str] | None = None

    def open(self, channel: Any) -> None:
        """Take the data channel of the client: headers leave by it, poses and what was shown may come."""
        if self._channel.done():
            channel.close()
            return
        self._channel.set_result(channel)
        channel.on("message", lambda data: heard(self._client, data, self._service.latency, self._service, False))

    async def recv(self) -> Any:
        """The next frame; aiortc asks for it when the one before is encoded and handed to the network."""
        channel = await self._channel
        self._left(channel)
        self._client.by_video = True
        frame, matte = await self._client.next_frame(), self._client.matte
        self._leaving = frame, matte
        encoder = self._service.sender.encoder
        made = await asyncio.get_running_loop().run_in_executor(encoder, _made, frame, matte)
        self._last = max(self._last + 1, round(frame.times_ms["rendered"]))  # times must rise
        made.pts, made.time_base = self._last, _MILLISECONDS
        return made

    def stop(self) -> None:
        """aiortc calls it however the track ends: JPEGs take over."""
        super().stop()
        self._client.by_video = False
        self._client.wake.set()

    def _left(self, channel: Any) -> None:
        """Send the header of the frame that has left, unless it shows someone who was exchanged meanwhile."""
        if channel.readyState != "open":
            raise MediaStreamError
        if self._leaving is None:
            return
        (frame, matte), self._leaving, client, now = self._leaving, None, self._client, now_ms()
        if self._service.sender.outdated(client, frame, matte):
            return
        if channel.bufferedAmount > CONGESTED:
            client.missed += 1
            return
        times = {**frame.times_ms, "encoded": now, "sent": now}
        channel.send(json.dumps(header(frame, client, times), allow_nan=False))
        client.remember(frame, times)
        client.sent += 1
        self._service.latency.sent(times, now)


def _made(frame: Frame, matte: str) -> Any:
    return av.VideoFrame.from_ndarray(numbered(picture(frame, matte), frame.number), format="rgb24")


class Connections:
    """The connections of a service's clients, one each; belongs to the event loop of ``service``."""

    def __init__(self, service: Any) -> None:
        self._service = service
        self.open: dict[int, Any] = {}  # by the number of the client
        self.tasks: set[asyncio.Task[None]] = set()

    def ask(self, client: Client, message: Mapping[str, Any]) -> None:
        """Answer the offer of a message of type ``video``; one without ends the client's connection."""
        self._spawn(self._answer(client, message))

    async def close(self) -> None:
        """End them all."""
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.gather(*(one.close() for one in self.open.values()), return_exceptions=True)

    async def _answer(self, client: Client, message: Mapping[str, Any]) -> None:
        """Replace a client's connection by the one that it offers, or by none; an offer that fails changes nothing."""
        offer, number, sdp = message.get("sdp"), message.get("id"), None
        async with client.connecting:
            try:
                connection = None
                if offer is not None and client.number in self._service.clients:
                    connection, sdp = await answer(client, _checked(client, offer), self._service)
            except InputError as error:
                client.refuse(str(error))
            else:
                if before := self.open.pop(client.number, None):
                    await before.close()  # its track lets JPEGs take over
                if connection is not None:
                    self.open[client.number] = connection
                    asyncio.get_running_loop().call_later(CONNECT_S, self._give_up, connection)
            client.tell({"type": "video", "id": number if isinstance(number, int) else None, "sdp": sdp})

    def _give_up(self, connection: Any) -> None:
        """Close a connection that does not come to stand, which aiortc would try for ever."""
        if connection.connectionState in ("new", "connecting"):
            self._spawn(connection.close())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


def _checked(client: Client, offer: object) -> str:
    if not isinstance(offer, str):
        raise InputError(f"the sdp is {offer!r:.30}", expected="an offer, or null", fix="send SDP as a string")
    if not client.offers.take(time.perf_counter()):
        raise InputError("too many offers of video", expected="two at once, one a second", fix="wait a second")
    return offer


async def answer(client: Client, offer: str, service: Any) -> tuple[Any, str]:
    """Connect to a client that offers to receive one video and to open one data channel.

    Args:
        offer: SDP with all candidates. Only addresses of this machine are offered in return: no STUN, no TURN.
        service: takes poses, knows ``latency`` and ``sender``: ``rpfm_edge.live.service.Service``.

    Returns:
        The connection, to be closed with ``close``, and the SDP of the answer. Frames leave as JPEGs until it stands,
        and again when it has broken, which takes half a minute to be noticed.

    Raises:
        InputError: no SDP, too many candidates, or anything else in it than one video and one data channel.
    """
    connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))
    track = FrameTrack(client, service)
    connection.on("datachannel", track.open)
    video = connection.addTransceiver(track, direction="sendonly")  # never to decode what a client may send
    video.setCodecPreferences(_codecs())
    try:
        if offer.count("a=candidate:") > CANDIDATES:
            raise ValueError(f"it has more than {CANDIDATES} candidates")
        await connection.setRemoteDescription(aiortc.RTCSessionDescription(offer, "offer"))
        if connection.getTransceivers() != [video] or video.mid is None or connection.sctp is None:
            raise ValueError("it is not one video and one data channel")
        await connection.setLocalDescription(await connection.createAnswer())
        if video.currentDirection != "sendonly":
            raise ValueError("it does not receive video")
    except Exception as error:  # whatever an offer may hold
        await connection.close()
        raise InputError(
            f"the offer cannot be answered ({type(error).__name__}: {error!s:.80})",
            expected="SDP that receives one video, H.264 or VP8, and opens one data channel",
            fix="send what RTCPeerConnection.createOffer gives, with all candidates",
        ) from None
    return connection, connection.localDescription.sdp


def _codecs() -> list[Any]:
    known = aiortc.RTCRtpSender.getCapabilities("video").codecs
    names = [name for name, encoder in CODECS.items() if encoder in av.codecs_available]
    return [one for name in (*names, "video/rtx") for one in known if one.mimeType == name]
