"""Speed: prepare and frame of a bundle, end to end through the pipeline, raw times kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import runtimes
from rpfm_edge import measure
from rpfm_edge.artifact import Artifact
from rpfm_edge.bundle import size_bytes
from rpfm_edge.image import load_image
from rpfm_edge.pipeline import Pipeline


def bench_backend(
    bundle: Artifact, backend: str, source: str | Path | np.ndarray, pose: np.ndarray, runs: int, seconds: float
) -> dict[str, Any]:
    """Times of ``prepare`` and ``render`` (skeleton drawing, engine and copies included) on one backend."""
    image = load_image(source, tuple(bundle.config["size"]))
    with Pipeline.open(bundle.path, backend) as pipe:
        person = pipe.prepare(image)
        prepare = measure.measure(
            lambda: pipe.prepare(image), warmup=2, min_runs=max(5, runs // 5), min_seconds=seconds / 5
        )
        frame = measure.measure(lambda: pipe.render(person, pose), min_runs=runs, min_seconds=seconds)
    return {
        "backend": backend,
        "precision": bundle.config["precision"],
        "steps": bundle.config["steps"],
        "prepare": prepare.to_json(),
        "frame": frame.to_json(),
        "engine_bytes": size_bytes(bundle, backend),
        "peak_memory_bytes": measure.peak_memory_bytes(),
        "machine": measure.where(runtimes.load(backend).versions()),
    }
