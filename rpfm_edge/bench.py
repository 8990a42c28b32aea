"""Speed: prepare and frame of a bundle, end to end through the pipeline, raw times kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import runtimes
from rpfm_edge import device_state, measure
from rpfm_edge.artifact import Artifact
from rpfm_edge.bundle import size_bytes
from rpfm_edge.image import load_image
from rpfm_edge.pipeline import Pipeline
from rpfm_edge.validate import plural


def bench_backend(
    bundle: Artifact, backend: str, source: str | Path | np.ndarray, pose: np.ndarray, runs: int, seconds: float
) -> dict[str, Any]:
    """Times of ``prepare`` and ``render`` (skeleton drawing, engine and copies included) on one backend."""
    image = load_image(source, tuple(bundle.config["size"]))
    with Pipeline.open(bundle.path, backend) as pipe:
        person, before = pipe.prepare(image), device_state.read()
        prepare = measure.measure(
            lambda: pipe.prepare(image), warmup=2, min_runs=max(5, runs // 5), min_seconds=seconds / 5
        )
        frame = measure.measure(lambda: pipe.render(person, pose), min_runs=runs, min_seconds=seconds)
        state = device_state.around(before)
    return {
        "backend": backend,
        "precision": bundle.config["precision"],
        "steps": bundle.config["steps"],
        "prepare": prepare.to_json(),
        "frame": frame.to_json(),
        "engine_bytes": size_bytes(bundle, backend),
        "peak_memory_bytes": measure.peak_memory_bytes(),
        "machine": measure.where(runtimes.load(backend).versions()),
        "state": state,
    }


def rows(evidence: Mapping[str, Any]) -> Iterator[list[str]]:
    """Engine, call, p50, p95 and p99 in ms, calls per second and number of calls, of what ``api.bench`` measured."""
    for result in evidence["backends"]:
        engine = f"{result['backend']}, {result['precision']}, {plural(result['steps'])}"
        for call in ("prepare", "frame"):
            times = result[call]
            cells = [f"{1e3 * times[p]:.2f}" for p in ("p50_s", "p95_s", "p99_s")]
            yield [engine, call, *cells, f"{times['fps']:.1f}", str(times["runs"])]
