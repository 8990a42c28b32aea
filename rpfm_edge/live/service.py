"""What the live service is between the network and the render thread: clients, the person, and who gives poses."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.live.clients import Client, Limits, Sender, set_matte
from rpfm_edge.live.latency import Latency, summary
from rpfm_edge.live.messages import Pose
from rpfm_edge.live.session import Frame, Options, Renderer
from rpfm_edge.live.sources import Feed

CLIENT, NOBODY = "client", "none"
JPEG, WEBRTC = "jpeg", "webrtc"
RECENT = 2048  # frames that the split in a state is taken over
_OF_CLIENTS = ("sent", "missed", "refused")


class Service:
    """One person, one render thread, many clients. Made anywhere; ``run`` belongs to the server's event loop.

    Args:
        pipelines, source, options: see ``Renderer``.
        limits: see ``Limits``.
        feeds: other sources of poses by name; the first gives poses at the start, else clients do.
        tap: takes each frame too, in the render thread; must return at once.
        webrtc: let clients ask for a video track; needs the extra ``webrtc``.

    Raises:
        BackendError: ``webrtc`` without its library.
    """

    def __init__(
        self,
        pipelines: Sequence[Pipeline],
        source: np.ndarray,
        options: Options,
        limits: Limits,
        feeds: Mapping[str, Iterator[tuple[float, np.ndarray]]],
        tap: Callable[[Frame], None] | None = None,
        webrtc: bool = False,
    ) -> None:
        self._connections = import_extra("rpfm_edge.live.rtc", WEBRTC).Connections(self) if webrtc else None
        self.limits, self.latency, self._tap = limits, Latency(), tap
        self.clients: dict[int, Client] = {}
        self.renderer = Renderer(pipelines, source, self._deliver, self._failed, options)
        self.size, self.sender = self.renderer.size, Sender(limits, self.latency)
        self.feeds = {name: Feed(name, poses, self.renderer.put, threading.Event()) for name, poses in feeds.items()}
        self.source_of_poses = next(iter(self.feeds), CLIENT)
        self._left = dict.fromkeys(_OF_CLIENTS, 0)  # the counts of clients that are gone
        self.connected = self._uploads = 0
        self._started_s = time.perf_counter()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Draw and send until cancelled."""
        self._loop, self._started_s = asyncio.get_running_loop(), time.perf_counter()
        await asyncio.to_thread(self.renderer.start)
        for feed in self.feeds.values():
            feed.start()
        self.choose_source(self.source_of_poses)
        try:
            while True:
                await asyncio.sleep(1)
                state = {"type": "state", **self.state()} if self.clients else {}
                for client in self.clients.values():
                    client.tell(state)
        finally:
            if self._connections:
                await self._connections.close()

    def close(self) -> None:
        """End the threads. From any thread, after ``run``."""
        for feed in self.feeds.values():
            feed.close()
        self.renderer.close()
        self.sender.close()

    # The render thread hands over, and goes on.

    def _deliver(self, frame: Frame) -> None:
        if self._tap:
            self._tap(frame)
        self._in_loop(self._spread, frame)

    def _failed(self, pose: Pose, message: str) -> None:
        self._in_loop(self._tell_owner, pose, message)

    def _in_loop(self, call: Any, *args: Any) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop was closed in the meantime
                self._loop.call_soon_threadsafe(call, *args)

    def _spread(self, frame: Frame) -> None:
        for client in self.clients.values():
            client.offer(frame)

    def _tell_owner(self, pose: Pose, message: str) -> None:
        if pose.owner in self.clients:
            self.clients[pose.owner].refuse(message, pose.id)

    # What clients ask for.

    def join(self, socket: Any) -> Client:
        """Take a connection in and greet it."""
        self.connected += 1
        client = Client(socket, self.connected, self.limits)
        self.clients[client.number] = client
        client.tell({"type": "hello", **self.facts()})
        return client

    def leave(self, client: Client) -> None:
        """Forget a connection, but not its counts."""
        if self.clients.pop(client.number, None):
            if self._connections:
                self._connections.ask(client, {})
            for name in _OF_CLIENTS:
                self._left[name] += getattr(client, name)

    def pose(self, client: Client, pose: Pose) -> None:
        """Draw a client's pose, if clients give the poses; raises ``InputError``."""
        if self.source_of_poses != CLIENT:
            raise InputError(
                f"poses come from {self.source_of_poses} now",
                expected='"source_of_poses": "client"',
                fix="send it as options first",
            )
        self.renderer.put(pose)

    def options(self, client: Client, message: Mapping[str, Any]) -> None:
        """Change what a message of type ``options`` names; raises ``ConfigError``."""
        if "matte" in message:
            set_matte(client, message["matte"])
        if "steps" in message:
            self.renderer.fix_steps(message["steps"])
        if "source_of_poses" in message:
            self.choose_source(message["source_of_poses"])

    def video(self, client: Client, message: Mapping[str, Any]) -> None:
        """Answer a client's offer to receive frames as video, or end that; raises ``ConfigError``."""
        if self._connections is None:
            raise ConfigError("no video is sent here", expected="JPEGs", fix="start the service with --webrtc")
        self._connections.ask(client, message)

    def choose_source(self, name: object) -> None:
        """Let one source give the poses, and no other; raises ``ConfigError``."""
        known = [CLIENT, *self.feeds, NOBODY]
        if name not in known:
            raise ConfigError(
                f"no poses come from {name!r:.30}", expected=f"one of {known}", fix="start the service with it"
            )
        self.source_of_poses = str(name)
        for feed in self.feeds.values():
            feed.on.set() if feed.name == name else feed.on.clear()

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """Room for one picture, from before it is read until it is shown, so that pictures cannot fill the memory.

        Raises:
            InputError: too many pictures are on their way already.
        """
        if self._uploads >= self.limits.uploads_waiting:
            raise InputError(
                f"{self._uploads} pictures wait already", expected="fewer at once", fix="try again in a second"
            )
        self._uploads += 1
        try:
            yield
        finally:
            self._uploads -= 1

    async def swap(self, source: np.ndarray) -> int:
        """Show another person from now on: its number, once no older frame can be sent any more."""
        person = await asyncio.wrap_future(self.renderer.swap(source))
        self.sender.person = max(person, self.sender.person)
        for client in self.clients.values():
            client.tell({"type": "person", "person": person})
        return person

    # What it tells.

    def counters(self) -> dict[str, int]:
        """Every pose and frame, by what became of it."""
        drawn = asdict(self.renderer.counters)
        sums = {name: self._left[name] + sum(getattr(c, name) for c in self.clients.values()) for name in _OF_CLIENTS}
        frames = drawn["rendered"] + drawn["reused"]
        return {"poses": drawn.pop("posed"), "frames": frames, **drawn, **sums, "connected": self.connected}

    def facts(self) -> dict[str, Any]:
        """What does not need measuring."""
        feeds = {name: feed.error for name, feed in self.feeds.items() if feed.error}
        return {
            **self.renderer.state(),
            "sources": [CLIENT, *self.feeds],
            "source_of_poses": self.source_of_poses,
            "source_errors": feeds,
            "pictures": [JPEG, WEBRTC] if self._connections else [JPEG],
            "clients": len(self.clients),
        }

    def state(self) -> dict[str, Any]:
        """Facts, counters and the split over the latest frames."""
        return {**self.facts(), "counters": self.counters(), "split_ms": self.latency.split(RECENT)}

    def report(self) -> dict[str, Any]:
        """The session so far."""
        elapsed = time.perf_counter() - self._started_s
        return {**self.facts(), **summary(self.latency, self.counters(), elapsed)}
