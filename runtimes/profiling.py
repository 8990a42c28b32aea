"""What the ``profile`` of every backend shares: feeds are refused as ``run`` refuses them, times become medians."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from statistics import median
from typing import NoReturn

from rpfm_edge.core.errors import BackendError, ConfigError
from rpfm_edge.core.runtime import LayerTime
from rpfm_edge.core.signature import Feeds, Signature

WARM_UP = 5  # runs before the first that counts

Entry = tuple[Hashable, tuple[str, ...], str, float]  # kernel, ONNX nodes, kind, seconds


def require(signature: Signature, feeds: Feeds, runs: int) -> None:
    """Raise ``SignatureError`` for feeds that do not fit, ``ConfigError`` for fewer than one run."""
    signature.check(feeds)
    if runs < 1:
        raise ConfigError(f"{runs} runs", expected="at least 1", fix="ask for more")


def medians(entries: Iterable[Entry]) -> list[LayerTime]:
    """One ``LayerTime`` for each kernel, in the order of their first run; the first ``WARM_UP`` runs do not count."""
    found: dict[Hashable, tuple[tuple[str, ...], str, list[float]]] = {}
    for kernel, names, kind, seconds in entries:
        found.setdefault(kernel, (names, kind, []))[2].append(seconds)
    return [LayerTime(names, kind, median(seconds[WARM_UP:])) for names, kind, seconds in found.values()]


def refuse(backend: str, reason: str) -> NoReturn:
    """Raise the ``BackendError`` of a backend that cannot time the nodes of a graph."""
    raise BackendError(
        f"{backend} cannot say what each layer costs, because {reason}",
        expected="a backend that runs the nodes of the ONNX graph",
        fix="profile openvino, onnxruntime or tensorrt",
    )
