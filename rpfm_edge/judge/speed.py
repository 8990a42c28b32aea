"""Speed of a bundle, with the packaged sample as input: prepare and frame end to end, raw times kept; where a frame's
time goes; frames without a pause."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.bundle.engines import FAILURES, default_backend, engine_versions, size_bytes, usable_backends
from rpfm_edge.bundle.evidence import add_evidence
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import BackendError
from rpfm_edge.judge.breakdown import breakdown
from rpfm_edge.judge.sustained import draw, watch, write
from rpfm_edge.measure import clock, device_state
from rpfm_edge.measure.clock import check_seconds
from rpfm_edge.measure.machine import where
from rpfm_edge.people.image import load_image
from rpfm_edge.people.splits import sample_inputs


def bench_backend(
    bundle: Artifact, backend: str, source: str | Path | np.ndarray, pose: np.ndarray, runs: int, seconds: float
) -> dict[str, Any]:
    """Times of ``prepare`` and ``render`` (skeleton drawing, engine and copies included) on one backend."""
    image = load_image(source, tuple(bundle.config["size"]))
    with Pipeline.open(bundle, backend) as pipe:
        person, before = pipe.prepare(image), device_state.read()
        prepare = clock.measure(
            lambda: pipe.prepare(image), warmup=2, min_runs=max(5, runs // 5), min_seconds=seconds / 5
        )
        frame = clock.measure(lambda: pipe.render(person, pose), min_runs=runs, min_seconds=seconds)
        state = device_state.around(before)
    return {
        "backend": backend,
        "precision": bundle.config["precision"],
        "steps": bundle.config["steps"],
        "prepare": prepare.to_json(),
        "frame": frame.to_json(),
        "engine_bytes": size_bytes(bundle, backend),
        "machine": where(engine_versions(bundle, backend)),
        "state": state,
    }


def profile(bundle: str | Path, backend: str | None = None, rounds: int = 30) -> dict[str, Any]:
    """Where a frame's time goes on each backend of a bundle, kept as evidence ``stages``; or on one, which is not kept.

    ``failures``: backend → why it cannot tell, such as torch, which has no layers of the graph. If none can, the last
    error is raised.
    """
    loaded = artifact.load(shipped.resolve(bundle), "bundle")
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


def sustain(bundle: str | Path, minutes: float, out: str | Path, backend: str | None = None) -> dict[str, Any]:
    """Frames without a pause for ``minutes``. ``sustained.json`` in ``out`` grows with every window; at the end it is
    drawn as ``sustained.png``, or ``no_plot`` of the result says why not."""
    loaded = artifact.load(shipped.resolve(bundle), "bundle")
    name = backend or default_backend(loaded)
    person, pose = sample_inputs(tuple(loaded.config["size"]))
    facts = {key: loaded.config[key] for key in ("precision", "steps")} | {"backend": name, "minutes": minutes}
    with ExitStack() as stack:
        pipe = stack.enter_context(Pipeline.open(loaded, name))
        render = partial(pipe.render, pipe.prepare(person), pose)
        facts["machine"] = where(engine_versions(loaded, name))
        result = facts | watch(render, minutes, keep=lambda result: write({**facts, **result}, Path(out)))
    try:
        draw(result, Path(out))
    except BackendError as error:
        result["no_plot"] = str(error)
    return result


def bench(bundle: str | Path, backend: str | None = None, runs: int = 50, seconds: float = 3.0) -> dict[str, Any]:
    """Times of prepare and frame on each backend of the bundle (or one), with the packaged sample as input.

    A backend that fails does not end the others: its reason is in ``failures``. One whose library is not installed here
    is in ``skipped`` likewise, unless it was asked for. If none can be timed, the first error is raised.
    """
    check_seconds(seconds)
    loaded = artifact.load(shipped.resolve(bundle), "bundle")
    source, pose = sample_inputs(tuple(loaded.config["size"]))
    names, skipped = usable_backends(loaded, backend)
    evidence: dict[str, Any] = {"backends": []}
    failures: dict[str, Exception] = {}
    for name in names:
        try:
            measured = bench_backend(loaded, name, source, pose, runs, seconds)
            evidence["backends"].append(measured)
        except FAILURES as error:
            failures[name] = error
    if failures and not evidence["backends"]:
        raise next(iter(failures.values()))
    if failures:
        evidence["failures"] = {name: str(error) for name, error in failures.items()}
    evidence |= skipped
    if backend is None:
        add_evidence(loaded, "speed", evidence)
    return evidence
