"""What every backend offers: three verbs, build, open and profile, and a session that runs a graph.

The table of backends is ``core.backends.BACKENDS``; ``runtimes.load(name)`` returns one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.signature import Feeds, Signature

Known = Mapping[str, np.ndarray]  # inputs of a graph, and what ONNX Runtime makes of them (``measure.canary``)


@dataclass(frozen=True, slots=True)
class LayerTime:
    """What one kernel of an engine costs.

    Attributes:
        names: the ONNX nodes that it computes, as far as the library tells; none for a kernel of the library's own.
        kind: the library's name for the kernel, such as ``brgconv_avx512_I8``.
        seconds: median over the runs.
    """

    names: tuple[str, ...]
    kind: str
    seconds: float


class Session(Protocol):
    """A loaded engine. ``run`` returns once the outputs are on the host."""

    @property
    def signature(self) -> Signature: ...

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Outputs by name. The arrays belong to the caller; raises ``SignatureError`` on feeds that do not fit."""

    def keep(self, array: np.ndarray) -> np.ndarray:
        """An array equal to ``array``, in the form that ``run`` takes fastest again and again; never changed by it."""


class Runtime(Protocol):
    """A backend.

    ``options`` are plain values kept in the bundle's manifest; an unknown one is a ``ConfigError``.
    """

    name: str

    def build(
        self, graph: Artifact, name: str, engine: Path, options: Mapping[str, Any], known: Known | None = None
    ) -> None:
        """Compile graph ``name`` ("prepare", "frame") of a graph artifact into the existing empty folder ``engine``,
        and compare what it computes with ``known``; ``ParityError`` if it is wrong."""

    def open(self, engine: Path, signature: Signature, options: Mapping[str, Any]) -> AbstractContextManager[Session]:
        """Load what ``build`` wrote; leaving the context frees it."""

    def profile(
        self, engine: Path, signature: Signature, options: Mapping[str, Any], feeds: Feeds, runs: int = 30
    ) -> list[LayerTime]:
        """One entry for each kernel that runs, by the library's own profiler, which slows the engine down a little.

        Raises ``SignatureError`` on feeds that do not fit, ``BackendError`` where the library cannot tell.
        """

    def checked_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options`` over the defaults; raises ``ConfigError`` for what is unknown, out of range or cannot work."""

    def versions(self, options: Mapping[str, Any] | None = None) -> dict[str, str]:
        """Distribution name → version of the libraries that this backend runs on, with these options."""
