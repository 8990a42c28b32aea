"""The live page in AR, in a headset that iwer emulates: compared with the projection of a rectangle 1.7 m high."""

from __future__ import annotations

import base64
import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.live.chrome import Page
from tests.live.pages import service

IWER = "iwer@2.5.0"
PERSON = (slice(16, 64), slice(12, 36))  # rows and columns of the painted person, of 64 × 48
LIFE_M, AHEAD_M, EYES_M = 1.7, 2.0, 1.6
HEADSET = """
const supportedFeatures = IWER.metaQuest3.supportedFeatures.filter((name) => name !== LACKING);
const device = new IWER.XRDevice(
  {...IWER.metaQuest3, supportedFeatures}, {stereoEnabled: false, ipd: 0, fovy: Math.PI / 2});
device.installRuntime({forceInstall: true});
device.position.set(0, 1.6, 0);
window.headset = device;
const drawArrays = WebGLRenderingContext.prototype.drawArrays;
WebGLRenderingContext.prototype.drawArrays = function (...given) {
  drawArrays.apply(this, given);
  const [, , width, height] = this.getParameter(this.VIEWPORT);
  if (!window.wanted || !width) return;
  window.wanted = false;
  const data = new Uint8Array(width * height * 4);
  this.readPixels(0, 0, width, height, this.RGBA, this.UNSIGNED_BYTE, data);
  window.seen = {width, height, data: btoa(Array.from(data, (level) => String.fromCharCode(level)).join(''))};
};
"""


@pytest.fixture(scope="module")
def iwer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The emulator's script, fetched by npm."""
    if shutil.which("npm") is None:
        pytest.skip(f"needs npm, to fetch {IWER}")
    folder = tmp_path_factory.mktemp("iwer")
    fetched = subprocess.run(["npm", "pack", "--silent", IWER], cwd=folder, capture_output=True, text=True, timeout=120)
    if fetched.returncode:
        pytest.skip(f"npm cannot fetch {IWER}: {fetched.stderr.strip()[-200:]}")
    shutil.unpack_archive(folder / fetched.stdout.split()[-1], folder, "gztar", filter="data")
    return (folder / "package" / "build" / "iwer.min.js").read_text()


class Painter:
    """A pipeline that paints a red person on grey, so that matte and colour are known."""

    size, backend, pose_kind = (64, 48), "painted", "skeleton"
    bundle = SimpleNamespace(config={"steps": 1}, path=Path("painted"))

    def prepare(self, _: Any) -> None:
        return None

    def render_input(self, *_: Any) -> np.ndarray:
        image = np.full((64, 48, 3), 200, np.uint8)
        image[PERSON] = (220, 30, 30)
        return image


def seen(page: Page) -> np.ndarray:
    """(H, W, 4) what the headset shows, top row first, colours multiplied by alpha."""
    page.run("window.seen = null; window.wanted = true")
    found = page.until("window.seen")
    levels = np.frombuffer(base64.b64decode(found["data"]), np.uint8)
    return levels.reshape(found["height"], found["width"], 4)[::-1]


def bounds(picture: np.ndarray) -> tuple[float, float, float, float]:
    """top, bottom, left, right of what is opaque."""
    rows, columns = np.nonzero(picture[..., 3] > 127)
    return float(rows.min()), float(rows.max() + 1), float(columns.min()), float(columns.max() + 1)


def expected(shape: tuple[int, ...]) -> tuple[float, float, float, float]:
    """Where a person of ``PERSON`` stands, 2 m ahead of eyes 1.6 m high that see 90 degrees from top to bottom."""
    height, width = shape[:2]
    scale = height / 2 / AHEAD_M / math.tan(math.pi / 4)  # pixels a metre, 2 m ahead
    rows, columns = PERSON
    top, bottom = (LIFE_M * (1 - row / 64) - EYES_M for row in (rows.start, rows.stop))
    left, right = (LIFE_M * (column - 24) / 64 for column in (columns.start, columns.stop))
    return height / 2 - top * scale, height / 2 - bottom * scale, width / 2 + left * scale, width / 2 + right * scale


@pytest.fixture
def headset(page: Page, iwer: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A page in the headset's browser, with a session under way; the parameter is a feature that it lacks."""
    lacking = f"const LACKING = {json.dumps(getattr(request, 'param', None))};"
    script = page.call("Page.addScriptToEvaluateOnNewDocument", source=f"{iwer}\n{lacking}\n{HEADSET}")
    with ExitStack() as stack:
        stack.callback(page.call, "Page.removeScriptToEvaluateOnNewDocument", **script)
        page.screen(640, 640)
        page.open(stack.enter_context(service(Painter())))
        page.until("sent.shown && !ar.hidden")
        page.run("ar.click()", gesture=True)
        page.until("ar.textContent === 'Leave AR'")
        assert page.run("sent.options.matte") == "stacked"
        shown = page.run("sent.shown.id")
        page.until(f"sent.shown.id > {shown} + 5")
        yield page


@pytest.mark.browser
@pytest.mark.parametrize("headset", [None, "local-floor"], indirect=True)
def test_ar_shows_the_person_life_size_and_nothing_around(headset: Page) -> None:
    picture = seen(headset)
    found = bounds(picture)
    np.testing.assert_allclose(found, expected(picture.shape), atol=6)  # a source pixel is 4 of these
    top, bottom, left, right = (round(edge) for edge in found)
    inside = picture[top + 12 : bottom - 12, left + 12 : right - 12].astype(int)
    assert np.abs(inside - [220, 30, 30, 255]).max() < 25
    outside = picture.copy()
    outside[max(top - 12, 0) : bottom + 12, left - 12 : right + 12] = 0
    assert outside.max() == 0


@pytest.mark.browser
def test_ar_faces_the_viewer_and_comes_when_called(headset: Page) -> None:
    before = bounds(seen(headset))
    quarter = math.sqrt(0.5)
    headset.run(f"headset.position.set(2, 1.6, -2); headset.quaternion.set(0, {quarter}, 0, {quarter})")
    np.testing.assert_allclose(bounds(seen(headset)), before, atol=2)  # from the side it would be a line
    headset.run("headset.position.set(0, 1.6, 5); headset.quaternion.set(0, 1, 0, 0)")  # away from it
    assert seen(headset).max() == 0
    for value in (1, 0):
        headset.run(f"headset.controllers.right.updateButtonValue('trigger', {value})")
        headset.run("new Promise((done) => setTimeout(done, 300))")
    np.testing.assert_allclose(bounds(seen(headset)), before, atol=2)


@pytest.mark.browser
def test_ar_ends(headset: Page) -> None:
    headset.run("ar.click()")
    headset.until("ar.textContent === 'Enter AR'")
    headset.until("sent.options.matte === 'none'")
    shown = headset.run("sent.shown.id")
    headset.until(f"sent.shown.id > {shown} + 3")  # the page goes on
    assert headset.run("picture.height") == 64
