"""Frames as a WebRTC video track, by aiortc (extra ``webrtc``): for networks that lose packets, and large pictures.

RTP has no room for the number of a frame, so it is drawn below the picture: a strip of 16 cells, which any codec
keeps. The header follows as a text message when the frame has left, and a client shows no frame without its header.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import aiortc
import av
import numpy as np

from rpfm_edge.errors import InputError
from rpfm_edge.live.clients import Client, Sender, header
from rpfm_edge.live.matte import stacked
from rpfm_edge.live.session import Frame, now_ms

STRIP_ROWS, STRIP_BITS = 16, 16
CODECS = ("video/H264", "video/VP8")  # in the order that they are preferred in
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

    def __init__(self, client: Client, sender: Sender) -> None:
        super().__init__()
        self._client, self._sender, self._last = client, sender, -1
        self._leaving: tuple[Frame, str] | None = None

    async def recv(self) -> Any:
        """The next frame; aiortc asks for it when the one before is encoded and handed to the network."""
        self._left()
        self._client.by_video = True
        frame = await self._client.next_frame()
        self._leaving = frame, self._client.matte
        image = stacked(frame.image) if self._client.matte == "stacked" else frame.image
        picture = av.VideoFrame.from_ndarray(numbered(image, frame.number), format="rgb24")
        self._last = max(self._last + 1, round(frame.times_ms["rendered"]))  # times must rise
        picture.pts, picture.time_base = self._last, _MILLISECONDS
        return picture

    def _left(self) -> None:
        """Send the header of the frame that has left, unless it shows someone who was exchanged meanwhile."""
        if self._leaving is None:
            return
        (frame, matte), self._leaving, client, now = self._leaving, None, self._client, now_ms()
        if frame.person < self._sender.person or matte != client.matte:
            client.missed += 1
            return
        times = {**frame.times_ms, "encoded": now, "sent": now}
        client.tell({"type": "header", **header(frame, client, times)})
        client.remember(frame, times)
        client.sent += 1
        self._sender.latency.sent(times, now)


async def answer(client: Client, offer: str, sender: Sender) -> tuple[Any, str]:
    """Connect to a client that offers to receive video.

    Args:
        offer: SDP with all candidates. Only addresses of this machine are offered in return: no STUN, no TURN.

    Returns:
        The connection, to be closed with ``close``, and the SDP of the answer. Frames leave as JPEGs until the
        connection stands, and again when it has broken.

    Raises:
        InputError: no SDP, or no video in it.
    """
    connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))

    @connection.on("connectionstatechange")
    def changed() -> None:
        if connection.connectionState in ("failed", "closed"):
            client.by_video = False

    try:
        await connection.setRemoteDescription(aiortc.RTCSessionDescription(offer, "offer"))
        video = next(one for one in connection.getTransceivers() if one.kind == "video")
        capabilities = aiortc.RTCRtpSender.getCapabilities("video").codecs
        video.setCodecPreferences([one for name in CODECS for one in capabilities if one.mimeType == name])
        connection.addTrack(FrameTrack(client, sender))
        await connection.setLocalDescription(await connection.createAnswer())
    except Exception as error:  # whatever an offer may hold
        await connection.close()
        raise InputError(
            f"the offer cannot be answered ({type(error).__name__}: {error!s:.80})",
            expected="SDP that receives one video, H.264 or VP8",
            fix="send what RTCPeerConnection.createOffer gives",
        ) from None
    return connection, connection.localDescription.sdp
