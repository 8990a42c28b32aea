"""HTTP and WebSocket: who may come in, what they may send, and how much of it. Starlette on uvicorn.

The service behind it is ``service.Service``. The libraries are those of the extra ``live``.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rpfm_edge.core.errors import BackendError, InputError, RpfmError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.live import messages
from rpfm_edge.live.access import COOKIE, Access
from rpfm_edge.live.clients import heard
from rpfm_edge.live.service import Service
from rpfm_edge.live.telemetry import CONTENT_TYPE, exposition
from rpfm_edge.people.image import decode_image

LIBRARIES = ("starlette", "uvicorn", "websockets", "python_multipart", "prometheus_client")
STATIC = Path(__file__).parent / "static"
HELLO_S, UPLOAD_S, CLOSE_S = 5.0, 30.0, 1.0
PING_S = 5.0  # a client that does not answer within so long is silent
SEND_BUFFER = 65_536  # bytes; a few frames: a slow client's pile up with us, where the latest wins, not in the kernel
CONNECTIONS_PER_CLIENT = 8
BAD_TOKEN, BAD_ORIGIN, TOO_MANY, TOO_SLOW = 4401, 4403, 4429, 4408
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; connect-src 'self' ws: wss:",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where to listen, and how: port 0 is any free one; certificate and key make it TLS."""

    host: str = "127.0.0.1"
    port: int = 8787
    cert: Path | None = None
    key: Path | None = None
    access: Access = field(default_factory=lambda: Access(None))


def application(service: Service, access: Access, tls: bool = False) -> Any:
    """The ASGI application: the page, ``/api``, ``/metrics`` and ``/ws``."""
    routing = import_extra("starlette.routing", "live")
    responses = import_extra("starlette.responses", "live")
    static = import_extra("starlette.staticfiles", "live").StaticFiles

    async def page(_: Any) -> Any:
        return responses.FileResponse(STATIC / "index.html")

    async def state(_: Any) -> Any:
        return responses.JSONResponse(service.state())

    async def report(_: Any) -> Any:
        return responses.JSONResponse(service.report())

    async def metrics(_: Any) -> Any:
        return responses.Response(exposition(service), media_type=CONTENT_TYPE)

    async def source(request: Any) -> Any:
        return await _answer_source(service, request)

    async def live(ws: Any) -> None:
        await _live(ws, service, access)

    routes = [
        routing.Route("/", page),
        routing.Route("/api/state", state),
        routing.Route("/api/report", report),
        routing.Route("/api/source", source, methods=["POST"]),
        routing.Route("/metrics", metrics),
        routing.WebSocketRoute("/ws", live),
        routing.Mount("/static", static(directory=STATIC, check_dir=False)),
    ]
    inside = import_extra("starlette.applications", "live").Starlette(routes=routes)
    return _guarded(inside, access, tls)


def _guarded(inside: Any, access: Access, tls: bool) -> Any:
    """``inside`` behind the token and the origin; WebSockets are let through, because ``_live`` checks them."""
    requests = import_extra("starlette.requests", "live")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        if scope["type"] != "http":
            await inside(scope, receive, send)
            return
        request = requests.Request(scope)
        answer = _turned_away(request, access, tls)
        await (answer or inside)(scope, receive, send_with_headers)

    return app


def _turned_away(request: Any, access: Access, tls: bool) -> Any:
    """The answer to a request that may not pass, or that pairs a device; None if it may pass."""
    if not access.origin_allowed(request.headers):
        return _refusal(403, "this page may not use the service: expected its own origin; open the page it serves.")
    if request.url.path == "/" and access.token is not None and _buys(request.query_params, access):
        redirect = import_extra("starlette.responses", "live").RedirectResponse("/", status_code=303)
        redirect.set_cookie(COOKIE, access.token, httponly=True, samesite="lax", secure=tls)
        return redirect
    if not access.known(request.headers, request.query_params, request.cookies):
        return _refusal(401, "no token, or a wrong one: expected the service's; scan its code or pass ?token=.")
    return None


def _buys(query: Any, access: Access) -> bool:
    """Whether the page's address has a pairing code or the token: its files then come with a cookie."""
    return ("pair" in query and access.redeem(query["pair"])) or ("token" in query and access.fits(query["token"]))


def _refusal(status: int, message: str) -> Any:
    return import_extra("starlette.responses", "live").JSONResponse({"message": message}, status_code=status)


async def _answer_source(service: Service, request: Any) -> Any:
    """The number of the new person, or what is wrong with the picture."""
    try:
        person = await _take_source(service, request)
    except _TooBig as error:
        return _refusal(413, str(error))
    except (TimeoutError, asyncio.TimeoutError):
        return _refusal(408, f"the picture did not come within {UPLOAD_S:g} s: expected it whole; send it again.")
    except RpfmError as error:
        return _refusal(400, str(error))
    return import_extra("starlette.responses", "live").JSONResponse({"person": person})


class _TooBig(Exception):
    pass


async def _take_source(service: Service, request: Any) -> int:
    """Read a picture and show that person; kept in memory only."""
    with service.uploading():
        data = await asyncio.wait_for(_picture(request, service.limits.upload_bytes), UPLOAD_S)
        image = await asyncio.to_thread(decode_image, data, "the picture")
        return await service.swap(image)


async def _picture(request: Any, limit: int) -> bytes:
    """The bytes of the field ``picture``, or of the whole body if it is no form."""
    if "multipart/form-data" not in request.headers.get("content-type", ""):
        return b"".join([chunk async for chunk in _limited(request.stream(), limit)])
    forms = import_extra("starlette.formparsers", "live")
    parser = forms.MultiPartParser(request.headers, _limited(request.stream(), limit + 4096), max_files=1, max_fields=8)
    parser.spool_max_size = limit + 4096  # never to disk
    try:
        form = await parser.parse()
    except forms.MultiPartException as error:
        raise InputError(
            f"the form cannot be read ({error.message})", expected="one file 'picture'", fix="send it so"
        ) from None
    picture = form.get("picture")
    if not hasattr(picture, "read"):
        raise InputError("the form has no picture", expected="a file in the field 'picture'", fix="send it so")
    return bytes(await picture.read())


async def _limited(chunks: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise _TooBig(f"the picture is larger than {limit} bytes: expected a smaller one; shrink it.")
        yield chunk


async def _live(ws: Any, service: Service, access: Access) -> None:
    """One connection from beginning to end."""
    await ws.accept()  # first, because a browser cannot read the code of a refusal
    if not access.origin_allowed(ws.headers):
        await ws.close(BAD_ORIGIN, "origin refused")
    elif not (access.known(ws.headers, ws.query_params, ws.cookies) or await _greeted(ws, access)):
        await ws.close(BAD_TOKEN, "no token, or a wrong one")
    elif len(service.clients) >= service.limits.clients:
        await ws.close(TOO_MANY, f"{service.limits.clients} clients are here already")
    else:
        await _serve(ws, service)


async def _greeted(ws: Any, access: Access) -> bool:
    """Whether the first message brings the token, in time; it is not waited for after a wrong one."""
    if "token" in ws.query_params:
        return False
    try:
        event = await asyncio.wait_for(ws.receive(), HELLO_S)
        message = messages.decode(event.get("text") or "")
    except (TimeoutError, asyncio.TimeoutError, InputError):
        return False
    return message["type"] == "hello" and access.fits(message.get("token"))


async def _serve(ws: Any, service: Service) -> None:
    client = service.join(ws)
    tasks = [asyncio.create_task(service.sender.run(client)), asyncio.create_task(_listen(ws, client, service))]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        slow = any(isinstance(task.exception(), TimeoutError | asyncio.TimeoutError) for task in done)
    finally:
        service.leave(client)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if slow:
        with suppress(Exception):  # it takes nothing, perhaps not even this
            await asyncio.wait_for(ws.close(TOO_SLOW, "too slow"), CLOSE_S)


async def _listen(ws: Any, client: Any, service: Service) -> None:
    while True:
        event = await ws.receive()
        if event["type"] == "websocket.disconnect":
            return
        heard(client, event.get("text") or event.get("bytes") or b"", service.latency, service)


def listen_at(place: Place) -> socket.socket:
    """The listening socket; raises ``BackendError`` if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # connections inherit it
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(3 * PING_S * 1e3))
        listener.bind((place.host, place.port))
        listener.listen(64)
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise BackendError(
            f"{place.host}:{place.port} cannot be listened at ({why})",
            expected="a free port of an address of this machine",
            fix="choose another --port or --host",
        ) from None
    return listener


async def serve(service: Service, place: Place, listener: socket.socket, ready: Callable[[Any], None]) -> None:
    """Serve until a signal, or until ``should_exit`` of the server that ``ready`` was given is set."""
    uvicorn = import_extra("uvicorn", "live")
    config = uvicorn.Config(
        application(service, place.access, place.cert is not None),
        http="h11",
        ws="websockets-sansio",
        ws_max_size=messages.MAX_BYTES,
        ws_ping_interval=PING_S,
        ws_ping_timeout=PING_S,
        ws_per_message_deflate=False,  # a JPEG does not shrink
        limit_concurrency=CONNECTIONS_PER_CLIENT * (service.limits.clients + 2),
        ssl_certfile=place.cert,
        ssl_keyfile=place.key,
        timeout_graceful_shutdown=2,
        lifespan="off",
        access_log=False,
        log_level="critical",
        server_header=False,
    )
    server = uvicorn.Server(config)
    drawing = asyncio.create_task(service.run())
    drawing.add_done_callback(lambda _: setattr(server, "should_exit", True))
    ready(server)
    try:
        await server.serve(sockets=[listener])
    finally:
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)
        await asyncio.to_thread(service.close)
    if not drawing.cancelled() and (error := drawing.exception()):
        raise error


@dataclass(frozen=True, slots=True)
class Running:
    """A service that runs in ``thread``; ``errors`` holds why it ended by itself."""

    port: int
    thread: threading.Thread
    errors: list[BaseException]


@contextmanager
def serving(service: Service, place: Place) -> Iterator[Running]:
    """Serve from a thread of its own for as long as the block lasts; ``BackendError`` if a library is missing."""
    for library in LIBRARIES:
        import_extra(library, "live")
    servers: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(serve(service, place, listener, servers.append))
        except BaseException as error:  # it belongs to whoever waits for the thread
            errors.append(error)

    with closing(listen_at(place)) as listener:
        thread = threading.Thread(target=run, name="serve", daemon=True)
        thread.start()
        try:
            yield Running(int(listener.getsockname()[1]), thread, errors)
        finally:
            while thread.is_alive():
                for server in servers:
                    server.should_exit = True
                thread.join(0.1)
