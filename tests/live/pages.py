"""What the tests of the live page share: Chromium with a page that is being watched, and a service behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rpfm_edge import api
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.live.access import Access
from rpfm_edge.live.clients import Limits
from rpfm_edge.live.server import Place, serving
from rpfm_edge.live.service import Service
from rpfm_edge.live.session import Options
from rpfm_edge.people.image import load_image
from tests.live.chrome import Page, browser

PEOPLE = Path(api.__file__).parent / "assets" / "people" / "test_highres"
FIRST, SECOND = PEOPLE / "p00900_0.jpg", PEOPLE / "p00909_3.jpg"
SPY = """
window.sent = {};
window.received = {binary: 0, headers: 0, poses: 0};
for (const kind of [WebSocket, RTCDataChannel]) {
  const send = kind.prototype.send;
  kind.prototype.send = function (text) {
    const message = JSON.parse(text);
    window.sent[message.type] = {...message, by: kind.name};
    send.call(this, text);
  };
}
window.WebSocket = class extends WebSocket {
  constructor(...given) {
    super(...given);
    this.addEventListener("message", ({data}) => (window.received.binary += typeof data !== "string"));
  }
};
window.RTCPeerConnection = class extends RTCPeerConnection {
  createDataChannel(...given) {
    const channel = super.createDataChannel(...given);
    channel.addEventListener("message", () => (window.received.headers += 1));
    return channel;
  }
  async setRemoteDescription(description) {
    window.received.answer = description.sdp;
    await super.setRemoteDescription(description);
  }
};
"""


@pytest.fixture(scope="session")
def page_pipeline(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    bundle = api.build(tiny_graph.path, tmp_path_factory.mktemp("page") / "bundle", "openvino")
    with Pipeline.open(bundle.path) as opened:
        yield opened


@contextmanager
def service(
    pipeline: Any, port: int = 0, access: Access | None = None, webrtc: bool = False, **feeds: Any
) -> Iterator[Address]:
    """The address of a live service of the first person, which draws every pose that it is given."""
    found = Service([pipeline], load_image(FIRST), Options(still_px=-1), Limits(), feeds, webrtc=webrtc)
    with serving(found, Place(port=port, access=access or Access(None))) as running:
        yield Address(f"http://127.0.0.1:{running.port}/", found)


class Address(str):
    """Where a service is, and the service."""

    service: Service

    def __new__(cls, address: str, service: Service) -> Address:
        made = super().__new__(cls, address)
        made.service = service
        return made


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        page.call("Page.addScriptToEvaluateOnNewDocument", source=SPY)
        yield page


@pytest.fixture
def page(chromium: Page) -> Iterator[Page]:
    chromium.errors.clear()
    chromium.screen(1280, 860)
    yield chromium
    assert chromium.errors == []
    chromium.call("Page.navigate", url="about:blank")
