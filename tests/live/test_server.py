"""TODO."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from rpfm_edge import Pipeline
from rpfm_edge.core.errors import BackendError
from rpfm_edge.live import server
from rpfm_edge.live.access import Access
from rpfm_edge.live.clients import REMEMBERED, TEXTS, Bucket, Client, Limits
from rpfm_edge.live.matte import stacked
from rpfm_edge.live.messages import MAX_BYTES, Pose
from rpfm_edge.live.server import Place, listen_at
from rpfm_edge.live.session import Frame, Options
from rpfm_edge.live.sources import replay
from rpfm_edge.measure.metrics import psnr_db
from rpfm_edge.people.image import decode_image
from tests.live.driver import Driver, driver

TOKEN = "a-token-of-two-dozen-chars"
Start = Callable[..., Any]


class Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect."""

    def redirect_request(self, *_: Any) -> None:
        return None


def ask(port: int, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body; redirects are not followed."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body, headers=names)
    try:
        with urllib.request.build_opener(Stay).open(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def encoded(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, Limits().quality])[1].tobytes()


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def closed(port: int, query: str = "", **options: Any) -> int:
    """The code with which the server closes a connection that it does not want."""
    with connect(f"ws://127.0.0.1:{port}/ws{query}", compression=None, **options) as ws:
        with pytest.raises(ConnectionClosed) as end:
            ws.recv(timeout=10)
        assert end.value.rcvd is not None
        return end.value.rcvd.code


def test_a_pose_comes_back_as_the_frame_of_that_pose(
    start: Start, live_pipeline: Pipeline, sources: list[np.ndarray], poses: np.ndarray
) -> None:
    service, port = start()
    with driver(port) as client:
        number = client.pose(poses[0], t_ms=1000.0)
        header, jpeg = client.frame()
        assert (header["id"], header["person"], header["steps"], header["reused"]) == (number, 1, 2, False)
        assert "pose" not in header
        stamps = [header["times_ms"][name] for name in ("pose_in", "drawn", "rendered", "encoded", "sent")]
        assert stamps == sorted(stamps)
        assert jpeg == encoded(live_pipeline.render(live_pipeline.prepare(sources[0]), poses[0]))
        client.say(type="shown", id=number, t_ms=1050.0)
        client.say(type="ping", t_ms=5.0)
        assert client.text("pong")["t_ms"] == 5.0
        assert service.latency.split()["pose_to_photon"]["p50"] == 50
        state = client.text("state")
    assert state["counters"]["poses"] == state["counters"]["frames"] == state["counters"]["sent"] == 1
    assert state["split_ms"]["server"]["count"] == 1


def test_bad_messages_are_answered_one_by_one_while_the_stream_goes_on(start: Start, poses: np.ndarray) -> None:
    _, port = start()
    with driver(port) as client:
        for number, bad in enumerate(
            ["{", "[]", '{"type":"dance"}', '{"type":"pose","id":0,"keypoints":[[NaN,1]]}', '{"type":"shown","id":0}']
        ):
            client.socket.send(bad)
            error = client.text("error")
            assert error["message"].endswith(".")
            client.pose(poses[number])
            assert client.frame()[0]["id"] == number
        client.socket.send(b"\xff\xfe")
        assert "no JSON" in client.text("error")["message"]
        client.say(type="pose", id=2, keypoints=poses[0].tolist())
        error = client.text("error")
        assert (error["id"], error["message"]) == (
            2,
            "pose 2 is out of order: expected an id above 4; count poses upwards.",
        )
        client.say(type="options", matte="round")
        assert "the matte is 'round'" in client.text("error")["message"]
        client.say(type="options", steps=7)
        assert "no bundle has 7 steps" in client.text("error")["message"]


def test_the_matte_comes_below_the_picture(start: Start, live_pipeline: Pipeline, poses: np.ndarray) -> None:
    _, port = start()
    with driver(port) as client, driver(port) as plain:
        client.say(type="options", matte="stacked")
        client.say(type="ping", t_ms=0)
        client.text("pong")
        client.pose(poses[0])
        header, jpeg = client.frame()
        both, alone = decode_image(jpeg, "frame"), decode_image(plain.frame()[1], "frame")
    assert header["matte"] == "stacked"
    assert both.shape == (128, 48, 3)
    assert psnr_db(both[:64], alone) > 25
    assert psnr_db(both, stacked(both[:64])) > 15


def test_a_message_that_is_too_big_ends_its_connection_and_no_other(start: Start, poses: np.ndarray) -> None:
    _, port = start()
    with driver(port) as good, driver(port) as bad:
        bad.socket.send("x" * (MAX_BYTES + 1))
        with pytest.raises(ConnectionClosed) as end:
            bad.frame()
        assert end.value.sent is None or end.value.rcvd is not None
        good.pose(poses[0])
        assert good.frame()[0]["id"] == 0


def test_a_flood_is_thinned_and_answered_now_and_then(start: Start, poses: np.ndarray) -> None:
    service, port = start(limits=Limits(messages_per_s=20))
    began = time.monotonic()
    with driver(port) as client:
        for _ in range(300):
            client.pose(poses[0])
        assert "too many messages" in client.text("error")["message"]
        until(lambda: service.counters()["poses"] + service.counters()["refused"] == 300)
        assert 40 <= service.counters()["poses"] <= 40 + 20 * (time.monotonic() - began)


def test_a_bucket_lets_its_rate_through() -> None:
    bucket = Bucket(10)
    assert sum(bucket.take(k / 100) for k in range(1000)) == pytest.approx(20 + 10 * 10, abs=1)


def test_too_many_clients_are_turned_away(start: Start) -> None:
    service, port = start(limits=Limits(clients=2))
    with driver(port), driver(port):
        assert closed(port) == server.TOO_MANY
    until(lambda: not service.clients)
    with driver(port) as client:
        assert client.hello["clients"] == 1


def test_without_the_token_nothing_is_served(start: Start) -> None:
    _, port = start(access=Access(TOKEN))
    for path in ("/", "/static/app.js", "/api/state", "/api/report", "/metrics", "/api/state?token=wrong", "/?pair=x"):
        status, body = ask(port, path)
        assert (status, "no token" in json.loads(body)["message"]) == (401, True)
    assert ask(port, "/api/source", b"x", Authorization="Bearer wrong")[0] == 401
    assert closed(port, "?token=wrong") == server.BAD_TOKEN


def test_a_token_is_taken_in_four_ways(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    _, port = start(access=Access(TOKEN))
    assert ask(port, f"/api/state?token={TOKEN}")[0] == 200
    assert ask(port, "/api/state", Authorization=f"Bearer {TOKEN}")[0] == 200
    assert ask(port, "/api/state", Cookie=f"rpfm_token={TOKEN}")[0] == 200
    others = f'=;;; x={{"a":1}}; rpfm_token={TOKEN}; y'  # of programs on other ports of this machine
    assert ask(port, "/api/state", Cookie=others)[0] == 200
    with driver(port, additional_headers={"Cookie": others}) as client:
        assert client.hello["v"] == 1
    with driver(port, f"?token={TOKEN}") as client:
        assert client.hello["v"] == 1
    with connect(f"ws://127.0.0.1:{port}/ws", compression=None) as ws:
        ws.send(json.dumps({"v": 1, "type": "hello", "token": TOKEN}))
        assert Driver(ws).hello["person"] == 1
    monkeypatch.setattr(server, "HELLO_S", 0.2)
    assert closed(port) == server.BAD_TOKEN


def test_a_pairing_code_buys_the_cookie_once_and_the_token_always(start: Start) -> None:
    access = Access(TOKEN)
    _, port = start(access=access)
    code = access.pairing_code()
    for query in (f"pair={code}", f"token={TOKEN}"):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(f"GET /?{query} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
            answer = raw.makefile("rb").read().decode().lower()
        assert " 303 " in answer
        assert "location: /\r\n" in answer
        assert f"rpfm_token={TOKEN}; httponly; path=/; samesite=lax" in answer
    assert ask(port, f"/?pair={code}")[0] == 401


def test_every_answer_has_the_headers_that_browsers_heed(start: Start) -> None:
    _, port = start(access=Access(TOKEN))
    for path, status in (("/static/app.js?token=" + TOKEN, 200), ("/api/state", 401), ("/?token=" + TOKEN, 303)):
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        asked.request("GET", path)
        answer = asked.getresponse()
        assert answer.status == status
        assert "default-src 'self'" in (answer.getheader("content-security-policy") or "")
        assert answer.getheader("x-content-type-options") == "nosniff"
        assert answer.getheader("referrer-policy") == "no-referrer"
        asked.close()


def test_foreign_pages_are_turned_away(start: Start) -> None:
    _, port = start()
    own = f"http://127.0.0.1:{port}"
    assert ask(port, "/api/state", Origin=own)[0] == 200
    assert ask(port, "/api/state", Origin="https://evil.example")[0] == 403
    assert ask(port, "/api/state", Host="evil.example", Origin="http://evil.example")[0] == 403  # DNS rebinding
    assert closed(port, origin="https://evil.example") == server.BAD_ORIGIN
    with driver(port, origin=own) as client:
        assert client.hello["person"] == 1


def test_an_origin_can_be_allowed(start: Start) -> None:
    _, port = start(access=Access(TOKEN, ("https://studio.example",)))
    assert ask(port, f"/api/state?token={TOKEN}", Origin="https://studio.example")[0] == 200
    assert ask(port, f"/api/state?token={TOKEN}", Origin="https://evil.example")[0] == 403


def form(name: str, data: bytes) -> tuple[bytes, str]:
    head = f'--B\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return head.encode() + data + b"\r\n--B--\r\n", "multipart/form-data; boundary=B"


def test_a_source_is_swapped_while_frames_flow(
    start: Start, live_pipeline: Pipeline, sources: list[np.ndarray], poses: np.ndarray
) -> None:
    _, port = start()
    with driver(port) as client:
        client.pose(poses[0])
        assert client.frame()[0]["person"] == 1
        body, kind = form("picture", png(sources[1]))
        assert ask(port, "/api/source", body, Content_Type=kind) == (200, b'{"person":2}')
        assert client.text("person")["person"] == 2
        client.pose(poses[0])
        header, jpeg = client.frame()
        assert header["person"] == 2
        assert ask(port, "/api/source", png(sources[2])) == (200, b'{"person":3}')
    old, new = (encoded(live_pipeline.render(live_pipeline.prepare(one), poses[0])) for one in sources[:2])
    assert jpeg == new
    assert jpeg != old


def test_after_the_person_message_no_older_frame_comes(
    start: Start, sources: list[np.ndarray], poses: np.ndarray
) -> None:
    service, port = start(feeds={"motion": replay(poses, 400)})
    swap = person = 1
    with driver(port) as client:
        while person < 21:
            if person == swap < 21:
                assert ask(port, "/api/source", png(sources[swap % 4]))[0] == 200
                swap += 1
            header, _ = client.frame()
            person = max([person, *(text["person"] for text in client.texts if text["type"] == "person")])
            client.texts.clear()
            assert header["person"] >= person
    assert service.counters()["swaps"] == 20


def test_pictures_that_cannot_be_used_are_refused(start: Start, sources: list[np.ndarray], poses: np.ndarray) -> None:
    _, port = start(limits=Limits(upload_bytes=20_000))
    bomb = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0" + b"\0" * 16
    whole = png(sources[1])
    for body, status, words in [
        (b"no picture", 400, "no picture that can be read"),
        (b"", 400, "no picture"),
        (whole[: len(whole) // 2], 400, "cut short"),
        (bomb, 400, "megapixels"),
        (b"x" * 20_001, 413, "larger than 20000 bytes"),
    ]:
        found, answer = ask(port, "/api/source", body, Content_Type="application/octet-stream")
        assert (found, words in json.loads(answer)["message"]) == (status, True), answer
    body, kind = form("photo", whole)
    assert ask(port, "/api/source", body, Content_Type=kind)[0] == 400
    body, kind = form("picture", b"x" * 30_000)
    assert ask(port, "/api/source", body, Content_Type=kind)[0] == 413
    body, _ = form("picture", whole)
    assert ask(port, "/api/source", body, Content_Type="multipart/form-data")[0] == 400
    with driver(port) as client:
        client.pose(poses[0])
        assert client.frame()[0]["person"] == 1


def test_a_picture_that_finds_no_room_is_not_even_read(start: Start, sources: list[np.ndarray]) -> None:
    _, port = start(limits=Limits(uploads_waiting=1))
    picture = png(sources[1])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(f"POST /api/source HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 100\r\n\r\nbegin".encode())
        until(lambda: ask(port, "/api/source", picture)[0] == 400)  # as soon as the other one is there
        assert "1 pictures wait already" in json.loads(ask(port, "/api/source", b"no picture")[1])["message"]
    until(lambda: ask(port, "/api/source", picture)[0] == 200)


def test_an_uploaded_picture_never_touches_the_disk(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, port = start()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))  # writing there would fail
    large = np.random.default_rng(0).integers(0, 256, (1000, 800, 3)).astype(np.uint8)
    body, kind = form("picture", png(large))
    assert len(body) > 2**20  # what the form parser would put on disk by itself
    assert ask(port, "/api/source", body, Content_Type=kind) == (200, b'{"person":2}')


def test_a_client_that_does_not_read_is_dropped_and_the_others_do_not_notice(
    start: Start, poses: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SEND_BUFFER", 4096)
    service, port = start(limits=Limits(send_s=0.3, quality=100), feeds={"motion": replay(poses, 400)})
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    raw.connect(("127.0.0.1", port))
    raw.sendall(handshake(port))
    with raw, driver(port) as good:
        until(lambda: len(service.clients) == 2)
        until(lambda: len(service.clients) == 1, 15)
        before = good.frame()[0]["frame"]
        numbers = [good.frame()[0]["frame"] for _ in range(50)]
    assert numbers == sorted(numbers)
    assert numbers[0] > before
    assert service.counters()["missed"] > 0


def handshake(port: int) -> bytes:
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    return (
        f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{key}\r\n".encode()
    )


def test_what_waits_for_a_client_or_its_answer_is_bounded(sources: list[np.ndarray], poses: np.ndarray) -> None:
    client = Client(None, 1, Limits())
    for number in range(2 * REMEMBERED):
        client.tell({"number": number})
        client.remember(Frame(number, Pose(number, poses[0], 0.0), 1, 1, sources[0], False, {}), {})
    assert [text["number"] for text in client.texts] == list(range(2 * REMEMBERED - TEXTS, 2 * REMEMBERED))
    assert list(client.unanswered) == list(range(REMEMBERED, 2 * REMEMBERED))


def test_a_client_of_the_tests_gives_up_even_if_other_messages_come(start: Start) -> None:
    _, port = start()
    with driver(port) as client:
        for wait in (client.frame, lambda timeout: client.text("dance", timeout)):
            with pytest.raises(TimeoutError):
                wait(timeout=1.5)  # a state comes every second


def test_a_silent_client_is_dropped(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PING_S", 0.5)
    service, port = start()
    with socket.create_connection(("127.0.0.1", port)) as raw, driver(port):
        raw.sendall(handshake(port))  # and nothing more, not even an answer to a ping
        until(lambda: len(service.clients) == 2)
        until(lambda: len(service.clients) == 1)


def test_many_come_and_go_and_nothing_stays(start: Start, poses: np.ndarray) -> None:
    service, port = start(feeds={"motion": replay(poses, 200)})
    for _ in range(30):
        with driver(port) as client:
            client.frame()
    until(lambda: not service.clients)
    counters = service.counters()
    assert counters["connected"] == 30
    assert counters["sent"] >= 30


def test_a_motion_reaches_every_client_with_its_pose_until_a_client_takes_over(start: Start, poses: np.ndarray) -> None:
    _, port = start(feeds={"motion": replay(poses[:1], 100)})
    with driver(port) as client, driver(port) as viewer:
        assert client.hello["sources"] == ["client", "motion"]
        assert client.hello["source_of_poses"] == "motion"
        for one in (client, viewer):
            np.testing.assert_allclose(one.frame()[0]["pose"], poses[0], atol=0.06)
        client.pose(poses[3])
        assert "poses come from motion now" in client.text("error")["message"]
        client.say(type="options", source_of_poses="client")
        number = client.pose(poses[4])
        while (header := client.frame()[0]).get("pose"):
            pass
        assert header["id"] == number
        client.say(type="options", source_of_poses="camera")
        assert "no poses come from 'camera'" in client.text("error")["message"]


def test_metrics_are_prometheus_text(start: Start, poses: np.ndarray) -> None:
    _, port = start()
    with driver(port) as client:
        client.pose(poses[0])
        client.frame()
        client.say(type="ping", t_ms=0)
        client.text("pong")
        families = {one.name: one for one in text_string_to_metric_families(ask(port, "/metrics")[1].decode())}
        report = json.loads(ask(port, "/api/report")[1])
    assert families["rpfm_live_poses"].samples[0].value == 1
    assert families["rpfm_live_clients_now"].samples[0].value == 1
    labels = [sample.labels for sample in families["rpfm_live_latency_ms"].samples]
    assert {"stage": "server", "quantile": "0.99"} in labels
    assert report["counters"]["frames"] == 1


def test_a_still_pose_is_sent_again_without_drawing(start: Start, poses: np.ndarray) -> None:
    service, port = start(options=Options())
    with driver(port) as client:
        for _ in range(2):
            client.pose(poses[0])
        client.frame()
        client.pose(poses[0])
        header, jpeg = client.frame()
        assert header["reused"]
        assert decode_image(jpeg, "frame").shape == (64, 48, 3)
        assert service.counters()["rendered"] == 1


def test_a_picture_that_never_ends_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "UPLOAD_S", 0.2)
    _, port = start()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
        raw.sendall(f"POST /api/source HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 100\r\n\r\nbegin".encode())
        answer = raw.recv(4096).decode()
    assert " 408 " in answer


@pytest.mark.parametrize("library", server.LIBRARIES)
def test_a_missing_library_is_named_before_anything_starts(
    start: Start, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BackendError, match=rf"{library} is not installed.*rpfm-edge\[live\]"):
        start()


def test_an_address_that_is_taken_is_named() -> None:
    with listen_at(Place(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BackendError, match=f"127.0.0.1:{port} cannot be listened at"):
            listen_at(Place(port=port))
