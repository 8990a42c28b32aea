"""A client for tests: speaks the messages of docs/live.md through the library websockets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from websockets.sync.client import connect

from rpfm_edge.live import messages


class Driver:
    """A connection; ``texts`` keeps the messages that came before what was waited for."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.texts, self.number = socket, [], 0
        self.hello = self.text("hello")

    def say(self, **message: Any) -> None:
        self.socket.send(json.dumps({"v": 1, **message}))

    def pose(self, points: np.ndarray, **changes: Any) -> int:
        rows = [None if np.isnan(x) else [x, y] for x, y in points.tolist()]
        self.say(**{"type": "pose", "id": self.number, "keypoints": rows, **changes})
        self.number += 1
        return self.number - 1

    def text(self, kind: str, timeout: float = 10) -> dict[str, Any]:
        """The next message of a type; what comes before it is dropped."""
        end = time.monotonic() + timeout
        while True:
            data = self._receive(end)
            if isinstance(data, str) and (message := json.loads(data))["type"] == kind:
                return dict(message)

    def frame(self, timeout: float = 10) -> tuple[dict[str, Any], bytes]:
        """The next frame; texts before it are kept."""
        end = time.monotonic() + timeout
        while isinstance(data := self._receive(end), str):
            self.texts.append(json.loads(data))
        return messages.unpack(data)

    def _receive(self, end: float) -> str | bytes:
        """The next message; a state comes every second, so that a limit for each alone would never end."""
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the message that was waited for did not come")
        data: str | bytes = self.socket.recv(timeout=left)
        return data


@contextmanager
def driver(port: int, query: str = "", scheme: str = "ws", **options: Any) -> Iterator[Driver]:
    """A client of the service at ``port``."""
    options = {"compression": None, "close_timeout": 0.5, **options}  # unread frames would hold up the farewell
    with connect(f"{scheme}://127.0.0.1:{port}/ws{query}", **options) as socket:
        yield Driver(socket)
