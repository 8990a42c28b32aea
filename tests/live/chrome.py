"""Headless Chromium by its DevTools protocol: just enough to open a page, run scripts in it and look at it."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

START_S = 30
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--remote-debugging-port=0",
]


class Page:
    """One tab. What its scripts throw or log as errors is kept in ``errors``."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number, self.errors = socket, 0, list[str]()
        for domain in ("Page", "Runtime", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=START_S))
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            if message.get("id") == self.number:
                assert "error" not in message, f"{method}: {message.get('error')}"
                answer: dict[str, Any] = message["result"]
                return answer

    def run(self, script: str, gesture: bool = False) -> Any:
        """The value of an expression in the page, awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=gesture
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 20) -> Any:
        """Wait until an expression is true; its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true within {seconds} s: {script}; {self.errors}"
            time.sleep(0.05)
        return value

    def open(self, address: str, landing: str | None = None) -> None:
        """Load a page; ``landing`` is where a redirection leads."""
        self.call("Page.navigate", url=address)
        self.until(f"document.readyState === 'complete' && location.href === {json.dumps(landing or address)}")

    def mouse(self, kind: str, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def drag(self, start: tuple[float, float], end: tuple[float, float], finger: bool = False) -> None:
        """Press at one point of the screen and let go at another, with the mouse or a finger."""
        if not finger:
            self.mouse("mousePressed", *start)
            self.mouse("mouseMoved", *end)
            self.mouse("mouseReleased", *end)
            return
        for kind, points in (("touchStart", [start]), ("touchMove", [end]), ("touchEnd", [])):
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y} for x, y in points])

    def choose_file(self, selector: str, file: Path) -> None:
        node = self.call("DOM.querySelector", nodeId=self.call("DOM.getDocument")["root"]["nodeId"], selector=selector)
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node["nodeId"])

    def screen(self, width: int, height: int, dark: bool = False, mobile: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        """A PNG of what is to be seen."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A tab of a Chromium with a profile in ``folder``; skips the test where there is no Chromium."""
    client = pytest.importorskip("websockets.sync.client", reason="needs websockets: pip install 'rpfm-edge[live]'")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with (folder / "chromium.log").open("w") as log:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"], stderr=log, stdout=log
        )
    try:
        with client.connect(_debugger(folder, process), max_size=None, compression=None) as socket:
            yield Page(socket)
            socket.send(json.dumps({"id": 0, "method": "Browser.close"}))
            process.wait(START_S)
    finally:
        process.kill()
        process.wait()


def _debugger(folder: Path, process: subprocess.Popen[bytes]) -> str:
    """The address of the first tab, once Chromium is up."""
    note, end = folder / "DevToolsActivePort", time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, (folder / "chromium.log").read_text()
        if note.exists() and (lines := note.read_text().split()):
            tabs = json.load(urlopen(f"http://127.0.0.1:{lines[0]}/json/list"))
            if pages := [tab for tab in tabs if tab["type"] == "page"]:
                return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.05)
    raise AssertionError(f"Chromium did not start: {(folder / 'chromium.log').read_text()}")
