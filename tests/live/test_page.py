"""The live page: what it is made of, and in headless Chromium against the real service and a real bundle.

What the page shows is compared with ``Pipeline.render`` of the poses that it sent.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import cv2
import numpy as np
import pytest

from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.live.access import Access
from rpfm_edge.live.clients import Limits
from rpfm_edge.live.server import STATIC
from rpfm_edge.live.sources import replay
from rpfm_edge.measure.metrics import psnr_db
from rpfm_edge.people.image import load_image
from rpfm_edge.people.pose import BONES, KEYPOINTS, check_pose, draw_skeleton
from tests.live.chrome import Page
from tests.live.pages import FIRST, SECOND, service
from tests.live.test_client import STAND

PIXELS = """(canvas) => {
  const {data, width, height} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return {width, height, data: Array.from(data)};
}"""
HIDDEN = "delete window.MediaStreamTrackProcessor;"  # then a video element shows the track
DECODED = """(async (bytes) => {
  const bitmap = await createImageBitmap(new Blob([bytes], {type: 'image/jpeg'}));
  const canvas = Object.assign(document.createElement('canvas'), {width: bitmap.width, height: bitmap.height});
  canvas.getContext('2d').drawImage(bitmap, 0, 0);
  return canvas;
})"""


def text(name: str) -> str:
    return (STATIC / name).read_text()


def test_needs_nothing_from_elsewhere() -> None:
    html = text("index.html")
    references = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert {"static/app.js", "static/style.css"} <= set(references)
    assert all((STATIC.parent / reference).is_file() for reference in references)
    for script in STATIC.glob("*.js"):
        imports = re.findall(r'from "(.+)";', script.read_text())
        assert all((STATIC / name).is_file() for name in imports)
        assert "http://" not in script.read_text().replace("http://www.w3.org", "")
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=", html), "the policy forbids inline code"


def test_ids_and_labels() -> None:
    html, script = text("index.html"), text("app.js")
    ids = set(re.findall(r' id="([^"]+)"', html))
    assert set(re.findall(r'\$\("([^"]+)"\)', script)) <= ids
    for reference in re.findall(r'(?:aria-labelledby|aria-describedby|for)="([^"]+)"', html):
        assert reference in ids
    for canvas in re.findall(r"<canvas[^>]*>", html):
        assert "aria-label" in canvas


def test_skeleton_is_that_of_the_package() -> None:
    script = text("pose.js")
    bones = re.search(r"BONES = (\[\n.*?\n\]);", script, re.DOTALL)
    names = re.search(r"NAMES = (\[\n.*?\n\]);", script, re.DOTALL)
    assert bones
    assert names
    assert tuple(map(tuple, json.loads(re.sub(r",\s*\]$", "]", bones.group(1))))) == BONES
    found = json.loads(re.sub(r",\s*\]$", "]", names.group(1)))
    assert [name.replace(" ", "_") for name in found] == list(KEYPOINTS)


def first_codec(sdp: str) -> str:
    """The video codec that an answer prefers."""
    payload = re.search(r"^m=video \d+ \S+ (\d+)", sdp, re.MULTILINE)[1]
    return re.search(rf"^a=rtpmap:{payload} (\w+)/", sdp, re.MULTILINE)[1]


def choose(page: Page, mode: str) -> None:
    page.run(f"document.querySelector('input[value={mode}]').click()")


def pixels(page: Page, canvas: str) -> np.ndarray:
    """(H, W, 3) uint8 of the canvas that an expression gives."""
    found = page.run(f"(async () => ({PIXELS})(await {canvas}))()")
    return np.array(found["data"], np.uint8).reshape(found["height"], found["width"], 4)[..., :3]


def settled(page: Page) -> np.ndarray:
    """The picture, once that of a pose that is sent from now on is on screen."""
    before = page.until("sent.pose?.id")
    page.until(f"sent.shown?.id > {before}")
    return pixels(page, "picture")


def sent_as(page: Page, image: np.ndarray) -> np.ndarray:
    """What the browser makes of the JPEG of an image: the tiny bundle's is noise, on which decoders differ."""
    data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, Limits().quality])[1]
    return pixels(page, f"{DECODED}(Uint8Array.from({data.tolist()}))")


def sent_pose(page: Page) -> np.ndarray:
    points = page.run("sent.pose.keypoints")
    return np.array([[np.nan, np.nan] if point is None else point for point in points], np.float32)


def middle(page: Page, point: np.ndarray) -> tuple[float, float]:
    """Where a point of the picture lies on the screen, on the canvas of the pose."""
    box = page.run("(({x, y, width, height}) => ({x, y, width, height}))(pose.getBoundingClientRect())")
    height, width = page.run("sent.pose.size")
    return box["x"] + float(point[0]) * box["width"] / width, box["y"] + float(point[1]) * box["height"] / height


@pytest.mark.browser
@pytest.mark.parametrize("finger", [False, True])
def test_shows_what_the_bundle_renders(page: Page, page_pipeline: Pipeline, finger: bool) -> None:
    person = page_pipeline.prepare(FIRST)
    page.call("Emulation.setTouchEmulationEnabled", enabled=finger)
    with service(page_pipeline) as address:
        page.open(address)
        page.until("fps.textContent.endsWith(' fps') && parseFloat(fps.textContent) > 0")
        assert page.run("document.querySelector('[data-open]').textContent") == "Connected"
        choose(page, "hand")
        still, stood = settled(page), sent_pose(page)
        wrist = stood[4] + [12, 10 if stood[4, 1] < 32 else -10]
        page.drag(middle(page, stood[4]), middle(page, wrist), finger)
        page.until(f"sent.pose.keypoints[4][0] > {stood[4, 0]} + 6")
        moved, raised = settled(page), sent_pose(page)
        np.testing.assert_allclose(raised[4], wrist, atol=0.6)
        np.testing.assert_array_equal(np.delete(raised, 4, 0), np.delete(stood, 4, 0))
        right = [sent_as(page, page_pipeline.render(person, pose)) for pose in (stood, raised)]
        for shown, own, other in ((still, *right), (moved, *reversed(right))):
            assert psnr_db(shown, own) > max(50, psnr_db(shown, other) + 10)


@pytest.mark.browser
def test_keys_move_joints_and_their_limbs(page: Page, page_pipeline: Pipeline) -> None:
    with service(page_pipeline) as address:
        page.open(address)
        choose(page, "hand")
        settled(page)
        before = sent_pose(page)
        page.run("pose.focus()")
        for key in ["n"] * 4 + ["ArrowRight"]:
            page.run(f"pose.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}}))")
        assert page.run("joint.textContent") == "right elbow"
        page.until(f"sent.pose.keypoints[3][0] > {before[3, 0]} + 0.2")
        np.testing.assert_allclose(sent_pose(page) - before, np.eye(18)[[3, 4]].sum(0)[:, None] * [0.5, 0], atol=0.11)
        for modifier, taken in (("ctrlKey", False), ("metaKey", False), ("altKey", False), ("shiftKey", True)):
            pressed = f"new KeyboardEvent('keydown', {{key: 'p', cancelable: true, {modifier}: true}})"
            assert page.run(f"pose.dispatchEvent({pressed})") != taken
        assert page.run("joint.textContent") == "right shoulder"


@pytest.mark.browser
def test_a_full_server_is_asked_less_and_less_often(page: Page, page_pipeline: Pipeline) -> None:
    """A full server accepts a connection, then closes it: only its greeting tells that the page is in."""
    script = """import('/static/link.js').then(({Link}) => {
      const kept = {setTimeout, WebSocket}, delays = [], sockets = [];
      window.setTimeout = (again, delay) => delays.push(delay) && delays.length % 4 && again();
      window.WebSocket = class { constructor() { sockets.push(this); } send() {} };
      const link = new Link({open() {}, hello() {}});
      for (let i = 0; i < 4; i += 1) {
        sockets.at(-1).onopen();
        sockets.at(-1).onclose({code: 4429});
      }
      link.connect();
      sockets.at(-1).onopen();
      sockets.at(-1).onmessage({data: '{"type": "hello"}'});
      sockets.at(-1).onclose({code: 1006});
      Object.assign(window, kept);
      return delays;
    })"""
    with service(page_pipeline) as address:
        page.open(address)
        assert page.run(script) == [250, 500, 1000, 2000, 250]


@pytest.mark.browser
def test_tells_the_latency_and_answers(page: Page, page_pipeline: Pipeline) -> None:
    with service(page_pipeline) as address:
        page.open(address)
        page.until("parseFloat(total.textContent) > 0")
        rows = page.run("[...stages.rows].map((row) => [...row.cells].map((cell) => cell.textContent))")
        assert [row[0] for row in rows][-1] == "Together"
        medians = [float(row[1]) for row in rows]
        assert len(medians) == 7
        assert medians[2] > 0  # rendering
        assert medians[-1] <= 2 * sum(medians[:-1]) + 1
        state = json.load(urlopen(f"{address}api/state"))
        assert state["split_ms"]["pose_to_photon"]["p50"] > 0
        shown = page.run("sent.shown")
        assert shown["t_ms"] >= shown["received_ms"]


class Noted:
    """A pipeline that keeps the pictures that it prepares. (What the tiny bundle draws hardly depends on them.)"""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.pictures = pipeline, list[np.ndarray]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def prepare(self, image: np.ndarray) -> Any:
        self.pictures.append(image)
        return self.pipeline.prepare(image)


@pytest.mark.browser
def test_a_photo_swaps_the_person(page: Page, page_pipeline: Pipeline, tmp_path: Path) -> None:
    large, broken, noted = tmp_path / "large.jpg", tmp_path / "broken.jpg", Noted(page_pipeline)
    cv2.imwrite(str(large), cv2.resize(cv2.imread(str(FIRST)), (2112, 3072), interpolation=cv2.INTER_CUBIC))
    broken.write_bytes(FIRST.read_bytes()[:2000])
    with service(noted) as address:
        page.open(address)
        page.until("facts.textContent.includes('person 1')")
        for number, photo in enumerate((SECOND, large), 2):
            page.choose_file("#file", photo)
            page.until(f"document.getElementById('upload-note').textContent.startsWith('Sent: person {number}')")
            page.until(f"facts.textContent.includes('person {number}')")  # a frame of that person is shown
        _, small, shrunk = noted.pictures
        np.testing.assert_array_equal(small, load_image(SECOND))  # untouched
        assert shrunk.shape == (1024, 704, 3)
        assert psnr_db(cv2.resize(shrunk, (176, 256), interpolation=cv2.INTER_AREA), load_image(FIRST)) > 30
        page.choose_file("#file", broken)
        page.until("document.getElementById('upload-note').textContent === 'The photo was not taken.'")
        assert "cut short" in page.run("message.textContent")
        settled(page)  # frames still come
        assert "person 3" in page.run("facts.textContent")


@pytest.mark.browser
def test_the_servers_motion(page: Page, page_pipeline: Pipeline) -> None:
    motion = STAND + np.array([[[-4, 0]], [[0, 0]], [[4, 0]]], np.float32)
    with service(page_pipeline, motion=replay(motion, 10)) as address:
        page.open(address)
        page.until("document.querySelector('[name=mode]:checked')?.value === 'motion'")
        page.until("sent.shown")
        assert page.run("sent.pose") is None  # the page sends none
        dots = "(() => new Set(pose.getContext('2d').getImageData(0, 0, pose.width, pose.height).data).size)()"
        page.until(f"{dots} > 16")  # and shows those that drive the picture
        choose(page, "animated")
        page.until("sent.pose?.id > 5")
        choose(page, "watch")
        page.run("new Promise((done) => setTimeout(done, 300))")
        last = page.run("sent.pose.id")
        page.run("new Promise((done) => setTimeout(done, 300))")
        assert page.run("sent.pose.id") == last


@pytest.mark.browser
def test_a_pose_by_hand_moves_with_the_size_of_the_pictures(page: Page, page_pipeline: Pipeline) -> None:
    with service(page_pipeline) as address:
        page.open(address)
        choose(page, "hand")
        settled(page)
        held = sent_pose(page)
    with service(Larger(page_pipeline), port=int(address.rsplit(":", 1)[1].strip("/"))):
        page.until("sent.pose.size[0] === 128")
        page.until("sent.shown?.frame > 0 && document.getElementById('status').textContent === 'Connected'")
        np.testing.assert_allclose(sent_pose(page), 2 * held, atol=0.2)


@pytest.mark.browser
def test_video_that_breaks_gives_way_to_jpegs(page: Page, page_pipeline: Pipeline) -> None:
    pytest.importorskip("aiortc", reason="needs aiortc: pip install 'rpfm-edge[webrtc]'")
    with service(Mirror(page_pipeline), webrtc=True) as address:
        page.open(address)
        page.until("sent.shown")
        page.run("document.querySelector('[name=transport][value=webrtc]').click()")
        page.until("received.headers > 10")
        page.run("window.received.binary = 0")
        [connection] = address.service._connections.open.values()
        asyncio.run_coroutine_threadsafe(connection.close(), address.service._loop).result(10)
        page.until("received.binary > 5")
        page.until("document.querySelector('[name=transport]:checked').value === 'jpeg'")
        assert page.run("message.textContent").startswith("No video: ")


class Larger:
    """A pipeline with pictures of twice the size."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.size = pipeline, (2 * pipeline.size[0], 2 * pipeline.size[1])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def prepare(self, _: np.ndarray) -> None:
        return None

    def render_input(self, _: Any, skeleton: np.ndarray) -> np.ndarray:
        return skeleton[0]


class Mirror(Larger):
    """A pipeline that shows the pose that it is given: what the tiny bundle draws is noise, which no video carries."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline)
        self.size = pipeline.size


@pytest.mark.browser
@pytest.mark.parametrize("processor", [True, False])
def test_pictures_as_video(page: Page, page_pipeline: Pipeline, processor: bool) -> None:
    pytest.importorskip("aiortc", reason="needs aiortc: pip install 'rpfm-edge[webrtc]'")
    hide = page.call("Page.addScriptToEvaluateOnNewDocument", source="" if processor else HIDDEN)
    try:
        with service(Mirror(page_pipeline), webrtc=True) as address:
            page.open(address)
            choose(page, "hand")
            settled(page)
            stood = sent_pose(page)
            page.run("document.querySelector('[name=transport][value=webrtc]').click()")
            page.until("received.headers > 60")
            page.run("window.received.binary = 0")
            shown = settled(page)
            assert page.run("received.binary") == 0
            assert page.run("[sent.pose.by, sent.shown.by]") == ["RTCDataChannel"] * 2
            assert first_codec(page.run("received.answer")) == "H264"
            wrist = stood[4] + [12, 10 if stood[4, 1] < 32 else -10]
            page.drag(middle(page, stood[4]), middle(page, wrist))
            page.until(f"sent.pose.keypoints[4][0] > {stood[4, 0]} + 6")
            moved, raised = settled(page), sent_pose(page)
            right = [draw_skeleton(pose, page_pipeline.size) for pose in (stood, raised)]
            assert shown.shape == moved.shape == right[0].shape
            for image, own, other in ((shown, *right), (moved, *reversed(right))):
                assert psnr_db(image, own) > psnr_db(image, other) + 3
            assert page.run("sent.shown.received_ms <= sent.shown.t_ms")
            page.run("document.querySelector('[name=transport][value=jpeg]').click()")
            page.until("received.binary > 5")
    finally:
        page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=hide["identifier"])


@pytest.mark.browser
def test_reconnects(page: Page, page_pipeline: Pipeline) -> None:
    with service(page_pipeline) as address:
        page.open(address)
        page.until("sent.shown")
    page.until("document.getElementById('status').textContent.startsWith('Reconnecting')")
    with service(page_pipeline, port=int(address.rsplit(":", 1)[1].strip("/"))):
        page.until("document.getElementById('status').textContent === 'Connected'")
        before = page.run("sent.shown.id")
        page.until(f"sent.shown.id > {before}")


@pytest.mark.browser
def test_pairs_by_a_code_and_says_when_it_is_shut_out(page: Page, page_pipeline: Pipeline) -> None:
    access = Access("0123456789abcdef")
    with service(page_pipeline, access=access) as address:
        page.open(f"{address}?pair={access.pairing_code()}", landing=address)
        page.until("sent.shown")
        page.choose_file("#file", SECOND)
        page.until("document.getElementById('upload-note').textContent.startsWith('Sent: person 2')")
        page.call("Network.clearBrowserCookies")
        page.open(f"{address}?token={access.token}", landing=address)
        page.until("sent.shown")
    with service(page_pipeline, port=int(address.rsplit(":", 1)[1].strip("/")), access=Access("another-token-123")):
        page.until("document.getElementById('status').textContent.startsWith('This page has no valid token.')")
        assert page.run("document.getElementById('status').dataset.open") == "false"


@pytest.mark.browser
def test_the_animation_stays_in_the_picture(page: Page, page_pipeline: Pipeline) -> None:
    with service(page_pipeline) as address:
        page.open(address)
        for size in ((256, 176), (64, 48), (512, 512)):
            script = (
                f"import('/static/pose.js').then((m) => [...Array(400)].map((_, i) => m.animated(i / 9, {list(size)})))"
            )
            poses = np.array(page.run(script), np.float32)
            assert all(np.isfinite(check_pose(pose, size)).all() for pose in poses)
            assert np.abs(np.diff(poses, axis=0)).max() > 0.01 * size[0]


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(320, 568), (390, 844), (768, 1024), (1280, 720)])
def test_fits_every_screen(page: Page, page_pipeline: Pipeline, width: int, height: int) -> None:
    with service(page_pipeline) as address:
        page.screen(width, height, mobile=width < 800)
        page.open(address)
        page.until("sent.shown")
        assert page.run("document.documentElement.scrollWidth") <= width
        bottom = page.run(
            "Math.max(...[...document.querySelectorAll('canvas')].map((c) => c.getBoundingClientRect().bottom))"
        )
        assert bottom <= height  # pose and person are seen without scrolling
        assert page.run("document.getElementById('ar-note').textContent") == "This device has no AR display."
        assert page.run("ar.hidden")
