"""The clients of the live service: one slot, one sender and one set of limits each, so that none can hold up another.

Everything here runs in the server's event loop, except ``encode``, which has a thread of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict, deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from rpfm_edge.core.errors import ConfigError, InputError, RpfmError
from rpfm_edge.live import messages
from rpfm_edge.live.latency import Latency
from rpfm_edge.live.matte import stacked
from rpfm_edge.live.session import Frame, now_ms

REMEMBERED = 256  # frames of a client that may still be answered with "shown"
TEXTS = 64  # that wait for a client; the oldest go first
ERRORS_PER_S = 20
OFFERS_PER_S = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What one service puts up with."""

    clients: int = 8
    messages_per_s: float = 600.0
    send_s: float = 5.0
    upload_bytes: int = 10 * 2**20
    uploads_waiting: int = 4
    quality: int = 90  # of JPEG


@dataclass(slots=True)
class Bucket:
    """A token bucket: ``rate`` a second on average, twice that at once."""

    rate: float
    level: float = field(default=0.0)
    _at_s: float | None = None

    def take(self, now_s: float) -> bool:
        """Whether one more is allowed at ``now_s``."""
        full = 2 * self.rate
        before = now_s if self._at_s is None else self._at_s
        self.level = full if self._at_s is None else min(full, self.level + (now_s - before) * self.rate)
        self._at_s = now_s
        if self.level < 1:
            return False
        self.level -= 1
        return True


class Client:
    """One connection: what waits for it, and what it may still answer."""

    def __init__(self, socket: Any, number: int, limits: Limits) -> None:
        self.socket, self.number, self.matte = socket, number, "none"
        self.frame: Frame | None = None
        self.by_video = False  # a video track takes the frames
        self.texts: deque[dict[str, Any]] = deque(maxlen=TEXTS)
        self.wake, self.arrived = asyncio.Event(), asyncio.Event()  # for the sender; for the video track
        self.last_id = -1
        self.sent = self.missed = self.refused = 0
        self.unanswered: OrderedDict[int, tuple[int, dict[str, float], float | None]] = OrderedDict()
        self.rate, self.errors = Bucket(limits.messages_per_s), Bucket(ERRORS_PER_S)
        self.offers, self.connecting = Bucket(OFFERS_PER_S), asyncio.Lock()  # of video, one after the other

    def tell(self, message: Mapping[str, Any]) -> None:
        """Let the client know, in order, before any later frame."""
        self.texts.append({"v": messages.VERSION, **message})
        self.wake.set()

    def refuse(self, message: str, number: int | None = None) -> None:
        """Answer with an error; a flood of faults is answered now and then only."""
        self.refused += 1
        if self.errors.take(now_ms() / 1e3):
            self.tell({"type": "error", "message": message} | ({} if number is None else {"id": number}))

    def offer(self, frame: Frame) -> None:
        """Put a frame in the slot, in place of one that is not sent yet."""
        self.missed += self.frame is not None
        self.frame = frame
        self.wake.set()
        self.arrived.set()

    async def next_frame(self) -> Frame:
        """Wait for the slot to be filled, and empty it."""
        while (frame := self.frame) is None:
            self.arrived.clear()
            await self.arrived.wait()
        self.frame = None
        return frame

    def remember(self, frame: Frame, times_ms: dict[str, float]) -> None:
        """Keep the stamps of a frame until it is answered."""
        posed = frame.pose.client_ms if frame.pose.owner == self.number else None
        self.unanswered[frame.number] = (frame.pose.id, times_ms, posed)
        while len(self.unanswered) > REMEMBERED:
            self.unanswered.popitem(last=False)

    def answered(self, message: Mapping[str, Any]) -> tuple[dict[str, float], float | None] | None:
        """The stamps of the frame that a message of type ``shown`` names; None if it is not known (any more)."""
        number = message.get("frame")
        if not isinstance(number, int):
            wanted = messages.pose_id(message)
            number = next((key for key, (one, *_) in reversed(self.unanswered.items()) if one == wanted), None)
        found = None if number is None else self.unanswered.pop(number, None)
        return None if found is None else found[1:]


def picture(frame: Frame, matte: str) -> np.ndarray:
    """The picture of a frame, (H, W, 3) uint8 RGB; with the matte ``stacked`` (2 H, W, 3), its alpha below."""
    if matte == "none":
        return frame.image
    if matte not in frame.pictures:
        frame.pictures[matte] = stacked(frame.image)
    return frame.pictures[matte]


def encode(frame: Frame, matte: str, quality: int) -> bytes:
    """The JPEG of a frame, made once for all clients who want it so; stamps the frame when it is first encoded."""
    if matte not in frame.jpegs:
        image = cv2.cvtColor(picture(frame, matte), cv2.COLOR_RGB2BGR)
        good, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        assert good
        frame.jpegs[matte] = data.tobytes()
    return frame.jpegs[matte]


def header(frame: Frame, client: Client, times_ms: Mapping[str, float]) -> dict[str, Any]:
    """What stands before the JPEG; with the pose, if it is not the client's own."""
    found = {
        "id": frame.pose.id,
        "frame": frame.number,
        "person": frame.person,
        "steps": frame.steps,
        "matte": client.matte,
        "reused": frame.reused,
        "times_ms": {name: round(value, 3) for name, value in times_ms.items()},
    }
    if frame.pose.owner != client.number:
        found["pose"] = [None if np.isnan(x) else [round(x, 1), round(y, 1)] for x, y in frame.pose.points.tolist()]
    return found


class Sender:
    """Sends what waits for a client, for all clients with one thread that encodes."""

    def __init__(self, limits: Limits, latency: Latency) -> None:
        self.limits, self.latency, self.person = limits, latency, 1
        self.encoder = ThreadPoolExecutor(1, "encode")

    def close(self) -> None:
        """Free the thread."""
        self.encoder.shutdown()

    async def run(self, client: Client) -> None:
        """Send until the connection ends; ``TimeoutError`` if the client takes nothing for ``limits.send_s``."""
        while True:
            await client.wake.wait()
            client.wake.clear()
            await self._send_texts(client)
            if client.frame is not None and not client.by_video:
                await self._send_frame(client, await client.next_frame())

    def outdated(self, client: Client, frame: Frame, matte: str) -> bool:
        """Whether a frame shows someone who left while it was encoded, or has another matte than is wanted now."""
        if frame.person >= self.person and matte == client.matte:
            return False
        client.missed += 1
        return True

    async def _send_texts(self, client: Client) -> None:
        while client.texts:
            await self._in_time(client.socket.send_text(json.dumps(client.texts.popleft(), allow_nan=False)))

    async def _send_frame(self, client: Client, frame: Frame) -> None:
        loop, matte = asyncio.get_running_loop(), client.matte
        jpeg = await loop.run_in_executor(self.encoder, encode, frame, matte, self.limits.quality)
        if self.outdated(client, frame, matte):
            return
        now = now_ms()
        times = {**frame.times_ms, "encoded": now, "sent": now}
        data = messages.pack(header(frame, client, times), jpeg)
        times["sent"] = now_ms()
        client.remember(frame, times)
        await self._in_time(client.socket.send_bytes(data))
        client.sent += 1
        self.latency.sent(times, now_ms())

    async def _in_time(self, sending: Any) -> None:
        await asyncio.wait_for(sending, self.limits.send_s)


def heard(client: Client, text: str | bytes, latency: Latency, service: Any, ordered: bool = True) -> None:
    """Act on one message of a client; what is wrong with it is answered, and nothing else happens.

    Args:
        service: takes poses and options, and knows ``size``: ``rpfm_edge.live.service.Service``.
        ordered: False where messages may overtake each other: a pose that comes too late is no fault then.
    """
    now, number = now_ms(), None
    if not client.rate.take(now / 1e3):
        client.refuse("too many messages: expected fewer a second; slow down.")
        return
    try:
        message = messages.decode(text)
        number = message.get("id") if isinstance(message.get("id"), int) else None
        _act(client, message, now, latency, service, ordered)
    except RpfmError as error:
        client.refuse(str(error), number)


def _act(client: Client, message: dict[str, Any], now: float, latency: Latency, service: Any, ordered: bool) -> None:
    kind = message["type"]
    if kind == "pose":
        pose = in_order(client, messages.read_pose(message, service.size, now, client.number), ordered)
        if pose is not None:
            service.pose(client, pose)
    elif kind == "shown":
        _shown(client, message, latency)
    elif kind == "ping":
        client.tell({"type": "pong", "t_ms": messages.number_or_none(message, "t_ms"), "server_ms": now_ms()})
    elif kind == "options":
        service.options(client, message)
    elif kind == "video":
        service.video(client, message)
    elif kind != "hello":
        known = '"pose", "shown", "ping", "options" or "video"'
        raise InputError(f"a message has the type {kind!r:.30}", expected=known, fix="correct it")


def in_order(client: Client, pose: messages.Pose, ordered: bool) -> messages.Pose | None:
    """``pose``, if it comes after the client's latest; else ``InputError`` where messages are ``ordered``, or None."""
    if pose.id <= client.last_id:
        if not ordered:
            client.refused += 1
            return None
        raise InputError(
            f"pose {pose.id} is out of order", expected=f"an id above {client.last_id}", fix="count poses upwards"
        )
    client.last_id = pose.id
    return pose


def _shown(client: Client, message: Mapping[str, Any], latency: Latency) -> None:
    shown = messages.number_or_none(message, "t_ms")
    if shown is None:
        raise InputError("shown has no time", expected='"t_ms", the client\'s clock', fix="send it")
    found = client.answered(message)
    if found is not None:
        received, offset = (messages.number_or_none(message, name) for name in ("received_ms", "offset_ms"))
        latency.shown(*found, shown, received, offset)


def set_matte(client: Client, matte: object) -> None:
    """Choose how a client's frames carry alpha; raises ``ConfigError``."""
    if matte not in messages.MATTES:
        raise ConfigError(
            f"the matte is {matte!r:.30}", expected=f"one of {list(messages.MATTES)}", fix="choose one of these"
        )
    client.matte = str(matte)
