"""The command ``rpfm-edge live``: opens bundles and sources, serves until interrupted, writes what it measured."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core.errors import ConfigError, RpfmError
from rpfm_edge.core.files import require_writable
from rpfm_edge.live.access import Access, address, check_certificate, choose_token, is_loopback, qr_code
from rpfm_edge.live.clients import Limits
from rpfm_edge.live.motion import read_motion
from rpfm_edge.live.record import Recorder
from rpfm_edge.live.server import Place, Running, serving
from rpfm_edge.live.service import Service
from rpfm_edge.live.session import Frame, Options
from rpfm_edge.live.sources import check_fps, replay, watch
from rpfm_edge.live.telemetry import write_session
from rpfm_edge.people.image import load_image
from rpfm_edge.report import tables


def live(
    bundle: Annotated[
        list[str], typer.Argument(help="The bundle to run; with --deadline-ms several of falling steps.")
    ],
    source: Annotated[Path, typer.Option(help="Picture of the person at the start.")],
    host: Annotated[str, typer.Option(help="Address to listen at; any but loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8787,
    backend: Annotated[str | None, typer.Option(help="One of the bundle's backends; default: the first.")] = None,
    motion: Annotated[Path | None, typer.Option(help="Poses to replay: a clip, JSON files or a .pose file.")] = None,
    fps: Annotated[float | None, typer.Option(help="Rate of --motion; default: the file's, else 30.")] = None,
    camera: Annotated[
        str | None, typer.Option(help="Number of a camera, or a video file; --motion drives first.")
    ] = None,
    deadline_ms: Annotated[
        float | None, typer.Option(help="From pose to image; fewer steps after 5 late frames.")
    ] = None,
    smooth: Annotated[
        float, typer.Option(min=0, help="One-Euro filter on joints: cutoff in Hz, 1 to 3; 0: off.")
    ] = 0.0,
    still_px: Annotated[float, typer.Option(help="Send the last image again while no joint moves further.")] = 0.25,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a token of 16 characters; default: a new one.")
    ] = None,
    cert: Annotated[Path | None, typer.Option(help="Certificate (PEM), for TLS.")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    origin: Annotated[
        list[str] | None, typer.Option(help="Another site whose pages may connect; several times.")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, max=256, help="At most so many at once.")] = 8,
    webrtc: Annotated[bool, typer.Option(help="Let clients choose video by WebRTC (extra webrtc).")] = False,
    record: Annotated[Path | None, typer.Option(help="H.264 to write: .mp4, .mkv or .mov (extra record).")] = None,
    report: Annotated[Path, typer.Option(help="Folder of live.json and live.html at the end.")] = Path("runs/live"),
) -> None:
    """Serve frames for poses to browsers and headsets, until interrupted."""
    check_certificate(cert, key)
    place = Place(host, port, cert, key, Access(choose_token(host, token_file), tuple(origin or ())))
    options = Options(_positive(deadline_ms), still_px, smooth)
    require_writable(report)
    with opened(bundle, backend) as pipelines:
        feeds = feeds_of(motion, fps if fps is None else check_fps(fps), camera, pipelines[0].size)
        with recording(record, pipelines[0].size) as tap:
            service = Service(pipelines, load_image(source), options, Limits(clients=clients), feeds, tap, webrtc)
            with _signals() as stop, serving(service, place) as running:
                _announce(place, running, token_file is not None)
                _wait(running, stop)
            reason = write_session(report, service)
            tables.say(f"wrote {report / 'live.json'}" + (f"; no page: {reason}" if reason else " and live.html"))
            if running.errors:
                raise running.errors[0]


def _positive(deadline_ms: float | None) -> float | None:
    if deadline_ms is not None and not 0 < deadline_ms < math.inf:
        raise ConfigError(f"--deadline-ms is {deadline_ms:g}", expected="above 0", fix="give milliseconds")
    return deadline_ms


@contextmanager
def opened(bundles: Sequence[str], backend: str | None) -> Iterator[list[Pipeline]]:
    """The bundles, open for as long as the block lasts."""
    with ExitStack() as stack:
        yield [stack.enter_context(Pipeline.open(bundle, backend)) for bundle in bundles]


@contextmanager
def recording(path: Path | None, size: tuple[int, int]) -> Iterator[Callable[[Frame], None] | None]:
    """What takes frames for a video at ``path``, which is finished after the block.

    If the block fails, what was recorded is kept, and a fault of the recording does not hide the block's own.
    """
    if path is None:
        yield None
        return
    recorder = Recorder(path, size)
    try:
        yield recorder.put
    except BaseException:
        with suppress(RpfmError, OSError):
            recorder.close()
        raise
    recorder.close()
    tables.say(f"wrote {path}: {recorder.written} frames, {recorder.dropped} dropped")


def feeds_of(
    motion: Path | None, fps: float | None, camera: str | None, size: tuple[int, int]
) -> dict[str, Iterator[tuple[float, np.ndarray]]]:
    """The sources of poses that are asked for, by name."""
    feeds: dict[str, Iterator[tuple[float, np.ndarray]]] = {}
    if motion is not None:
        poses, own_fps = read_motion(motion, size)
        feeds["motion"] = replay(poses, own_fps if fps is None else fps)
    if camera is not None:
        feeds["camera"] = watch(camera, size)
    return feeds


def _announce(place: Place, running: Running, secret: bool) -> None:
    """Say where the service is, and how to get in; ``secret`` tells neither a token nor a code to a log."""
    where = address(place.host, running.port, place.cert is not None)
    tables.say(f"live at {where}")
    if place.access.token is None:
        return
    if not secret:
        tables.say(f"token {place.access.token}")
    if not secret or sys.stdout.isatty():
        pairing = f"{where}/?pair={place.access.pairing_code()}"
        tables.say(f"Everyone needs the token, or this code, which is good once:\n{qr_code(pairing)}\n{pairing}")
    if place.cert is None and not is_loopback(place.host):
        tables.say(
            "Without --cert and --key the token and the pictures travel unencrypted, and browsers start no WebXR."
        )


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that a signal sets, instead of ending the process."""
    stop = threading.Event()

    def end(*_: Any) -> None:
        stop.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(running: Running, stop: threading.Event) -> None:
    """Until ``stop``, or until the service ends by itself."""
    while running.thread.is_alive() and not stop.wait(0.2):
        pass
