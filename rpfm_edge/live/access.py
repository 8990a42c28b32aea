"""Who may come in: tokens, origins, one-time pairing, addresses and certificates. Knows no server library."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.extras import import_extra

COOKIE = "rpfm_token"
LEAST_TOKEN = 16  # characters
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether an address to listen at can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(slots=True)
class Access:
    """The rules of one service.

    Attributes:
        token: needed by everyone; None needs none, which is for loopback alone.
        origins: of other sites that may connect, such as ``https://example.org``.
        pairing: codes that buy the token, once each.
    """

    token: str | None
    origins: Collection[str] = ()
    pairing: set[str] = field(default_factory=set)

    def known(self, headers: Mapping[str, str], query: Mapping[str, str], cookies: Mapping[str, str]) -> bool:
        """Whether a request carries the token: bearer, cookie or ``?token=``."""
        if self.token is None:
            return True
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        return any(self.fits(given) for given in (bearer, query.get("token"), cookies.get(COOKIE)))

    def fits(self, given: object) -> bool:
        """Compare a token in constant time."""
        return self.token is None or (
            isinstance(given, str) and secrets.compare_digest(given.encode("utf-8", "replace"), self.token.encode())
        )

    def origin_allowed(self, headers: Mapping[str, str]) -> bool:
        """Whether the page that asks is ours. Programs send no origin; without a token they must name this machine,
        because a foreign name that points here (DNS rebinding) would let any web page in.
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.token is None and _split(f"//{host}").hostname not in LOOPBACK_NAMES:
            return False
        return origin is None or origin in self.origins or (bool(host) and _split(origin).netloc == host)

    def pairing_code(self) -> str:
        """A new code that ``redeem`` takes once."""
        code = secrets.token_urlsafe(16)
        self.pairing.add(code)
        return code

    def redeem(self, code: str) -> bool:
        """Whether ``code`` was good; it is no longer."""
        found = [one for one in self.pairing if secrets.compare_digest(one.encode(), code.encode("utf-8", "replace"))]
        self.pairing.difference_update(found)
        return bool(found)


def _split(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError:  # half an IPv6 address
        return urlsplit("")


def choose_token(host: str, token_file: Path | None) -> str | None:
    """The token of a service at ``host``: from the file; else None on loopback, and a new one at any other address.

    Raises:
        ConfigError: the file cannot be read, or its token is shorter than 16 characters.
    """
    if token_file is None:
        return None if is_loopback(host) else secrets.token_urlsafe(32)
    try:
        token = token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no text"
        raise ConfigError(f"{token_file} cannot be read ({why})", expected="a token", fix="check the path") from None
    if len(token) < LEAST_TOKEN or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"the token in {token_file} has {len(token)} characters, or odd ones",
            expected=f"at least {LEAST_TOKEN} of ASCII",
            fix="write a longer one: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return token


def check_certificate(cert: Path | None, key: Path | None) -> None:
    """Raise ``ConfigError`` unless both or neither are given and fit together."""
    import ssl

    if (cert is None) != (key is None):
        raise ConfigError("one of --cert and --key is missing", expected="both, or neither", fix="give the other one")
    if cert is None or key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"{cert} and {key} cannot be used ({error.strerror or error})",
            expected="a PEM certificate and its private key",
            fix="check the paths",
        ) from None


def address(host: str, port: int, tls: bool) -> str:
    """The address that others reach a service at; for all interfaces, that of the one that leads out."""
    name = host
    if host in ("0.0.0.0", "::"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing: it only chooses a route
                name = probe.getsockname()[0]
            except OSError:
                name = socket.gethostname()
    return f"{'https' if tls else 'http'}://{f'[{name}]' if ':' in name else name}:{port}"


def qr_code(text: str) -> str:
    """``text`` as a QR code in half blocks, for a terminal; raises ``BackendError`` without the library."""
    import io

    code, out = import_extra("qrcode", "live").QRCode(border=2), io.StringIO()
    code.add_data(text)
    code.print_ascii(out=out, invert=True)
    return out.getvalue()
