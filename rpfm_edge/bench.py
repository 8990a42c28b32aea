"""Speed of a bundle, with the packaged sample as input: prepare and frame end to end, raw times kept; where a frame's
time goes; frames without a pause."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge import artifact, assets, device_state, measure
from rpfm_edge.artifact import Artifact
from rpfm_edge.breakdown import breakdown
from rpfm_edge.bundle import add_evidence, size_bytes
from rpfm_edge.errors import BackendError
from rpfm_edge.image import load_image
from rpfm_edge.pipeline import Pipeline, default_backend, engine_versions
from rpfm_edge.splits import sample_inputs
from rpfm_edge.sustained import draw, sustain, write
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
        "machine": measure.where(engine_versions(bundle, backend)),
        "state": state,
    }


def stages(bundle: str | Path, backend: str | None = None, rounds: int = 30) -> dict[str, Any]:
    """Where a frame's time goes on each backend of a bundle, kept as evidence ``stages``; or on one, which is not kept.

    ``failures``: backend → why it cannot tell, such as torch, which has no layers of the graph. If none can, the last
    error is raised.
    """
    loaded = artifact.load(assets.resolve(bundle), "bundle")
    person, pose = sample_inputs(tuple(loaded.config["size"]))
    results: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for name in [backend] if backend else loaded.config["backends"]:
        try:
            found = breakdown(loaded, name, person, pose, rounds)
        except BackendError as error:
            failures[name], last = str(error), error
            continue
        results.append({**found, "stages": [asdict(stage) for stage in found["stages"]]})
    if not results:
        raise last
    evidence = {"backends": results, "failures": failures}
    if backend is None:
        add_evidence(loaded, "stages", evidence)
    return evidence


def sustained(bundle: str | Path, minutes: float, out: str | Path, backend: str | None = None) -> dict[str, Any]:
    """Frames without a pause for ``minutes``. ``sustained.json`` in ``out`` grows with every window; at the end it is
    drawn as ``sustained.png``, or ``no_plot`` of the result says why not."""
    loaded = artifact.load(assets.resolve(bundle), "bundle")
    name = backend or default_backend(loaded)
    person, pose = sample_inputs(tuple(loaded.config["size"]))
    facts = {key: loaded.config[key] for key in ("precision", "steps")} | {"backend": name, "minutes": minutes}
    with ExitStack() as stack:
        pipe = stack.enter_context(Pipeline.open(loaded.path, name))
        render = partial(pipe.render, pipe.prepare(person), pose)
        facts["machine"] = measure.where(engine_versions(loaded, name))
        result = facts | sustain(render, minutes, keep=lambda result: write({**facts, **result}, Path(out)))
    try:
        draw(result, Path(out))
    except BackendError as error:
        result["no_plot"] = str(error)
    return result


def rows(evidence: Mapping[str, Any]) -> Iterator[list[str]]:
    """Engine, call, p50, p95 and p99 in ms, calls per second and number of calls, of what ``api.bench`` measured."""
    for result in evidence["backends"]:
        engine = f"{result['backend']}, {result['precision']}, {plural(result['steps'])}"
        for call in ("prepare", "frame"):
            times = result[call]
            cells = [f"{1e3 * times[p]:.2f}" for p in ("p50_s", "p95_s", "p99_s")]
            yield [engine, call, *cells, f"{times['fps']:.1f}", str(times["runs"])]
