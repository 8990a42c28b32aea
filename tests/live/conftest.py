"""A tiny bundle and a running service, for every test of the live service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpfm_edge import Pipeline, api
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.live.access import Access
from rpfm_edge.live.clients import Limits
from rpfm_edge.live.server import Place, serving
from rpfm_edge.live.service import Service
from rpfm_edge.live.session import Options
from tests.live.pages import (
    chromium,  # noqa: F401
    page,  # noqa: F401
    page_pipeline,  # noqa: F401
)

Started = tuple[Service, int]


@pytest.fixture(scope="session")
def live_bundle(tiny_graph: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 64 × 48 pixels and two steps for ONNX Runtime."""
    return api.build(str(tiny_graph.path), tmp_path_factory.mktemp("live") / "bundle", ["onnxruntime"], {}).path


@pytest.fixture(scope="session")
def live_pipeline(live_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.open(live_bundle) as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def sources() -> list[np.ndarray]:
    """Pictures of four people who look nothing alike."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (64, 48, 3)).astype(np.uint8) for _ in range(4)]


@pytest.fixture
def poses() -> np.ndarray:
    """(50, 18, 2) poses of 64 × 48."""
    return (np.random.default_rng(1).random((50, 18, 2)) * [48, 64]).astype(np.float32)


@pytest.fixture
def start(live_pipeline: Pipeline, sources: list[np.ndarray]) -> Iterator[Callable[..., Started]]:
    """Starts a service and returns it with its port; stopped after the test."""
    with ExitStack() as stack:

        def begin(
            access: Access | None = None,
            limits: Limits | None = None,
            options: Options | None = None,
            feeds: dict[str, Any] | None = None,
            webrtc: bool = False,
            **place: Any,
        ) -> Started:
            options = options or Options(still_px=-1)
            service = Service([live_pipeline], sources[0], options, limits or Limits(), feeds or {}, webrtc=webrtc)
            running = stack.enter_context(serving(service, Place(port=0, access=access or Access(None), **place)))
            return service, running.port

        yield begin
