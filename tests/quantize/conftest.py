"""Calibration samples of the tiny graph from the packaged data, and the tiny graph in INT8, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantize import apply, calibrate
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.people.data import Split, sample_root
from rpfm_edge.people.deepfashion import open_split


@pytest.fixture(scope="session")
def people() -> Split:
    return open_split(sample_root(), "test")


@pytest.fixture(scope="session")
def samples(tiny_graph: Artifact, people: Split, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate.record(tiny_graph, people, tmp_path_factory.mktemp("calibration") / "a.safetensors", 16)


@pytest.fixture(scope="session")
def tiny_int8(tiny_graph: Artifact, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return apply.quantize(tiny_graph, "int8", tmp_path_factory.mktemp("int8") / "graph", samples)
