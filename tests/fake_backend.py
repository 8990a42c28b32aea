"""A backend as someone else would add one: ONNX Runtime on one thread, under another name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.runtime import Known, LayerTime, Session
from rpfm_edge.core.signature import Feeds, Signature
from runtimes import ort, profiling
from runtimes.options import checked

name = "fake"
DEFAULTS = {"threads": 1}


def build(graph: Artifact, name: str, engine: Path, options: Mapping[str, Any], known: Known | None = None) -> None:
    ort.build(graph, name, engine, checked_options(options), known)


@contextmanager
def open(engine: Path, signature: Signature, options: Mapping[str, Any]) -> Iterator[Session]:
    with ort.open(engine, signature, checked_options(options)) as session:
        yield session


def profile(
    engine: Path, signature: Signature, options: Mapping[str, Any], feeds: Feeds, runs: int = 30
) -> list[LayerTime]:
    profiling.refuse(name, "nobody asked it")


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return checked(name, DEFAULTS, options, {"threads": range(1, 3)})


def versions(options: Mapping[str, Any] | None = None) -> dict[str, str]:
    return ort.versions()
