"""The gate: a bundle's frame against another bundle in the same rounds, or against the times of a baseline."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rpfm_edge.bundle.engines import FAILURES, engine_versions, require_engine, usable_backends
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.config import without_none
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.files import keep_text, require_writable
from rpfm_edge.judge import baseline
from rpfm_edge.judge.baseline import FOLDER, Baseline
from rpfm_edge.measure import clock, rounds
from rpfm_edge.measure.clock import Call, Latency
from rpfm_edge.measure.machine import where
from rpfm_edge.measure.rounds import Chunk
from rpfm_edge.measure.verdict import EXIT_CODES, Judgement, check_limit, judge_baseline, judge_pairs, worst
from rpfm_edge.people.splits import sample_inputs

OLD, NEW = "old", "new"
Judge = Callable[[Sequence[Chunk], list[str]], Judgement]
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class GateConfig:
    """``max_slowdown``: the share of its speed that a frame may lose. At least ``rounds`` rounds and ``seconds`` are
    measured, then more until there is a verdict; after ``limit_s`` it is ``unstable``."""

    max_slowdown: float = 0.05
    rounds: int = 50
    seconds: float = 3.0
    limit_s: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_limit(self.max_slowdown)
        if self.rounds < clock.STABLE_BLOCKS or not 0 <= self.seconds < self.limit_s:
            raise ConfigError(
                f"{self.rounds} rounds and {self.seconds:g} s within {self.limit_s:g} s",
                expected=f"at least {clock.STABLE_BLOCKS} rounds, and seconds from 0 to below the limit",
                fix="raise --runs or --limit, or lower --seconds",
            )


def compare(calls: Mapping[str, Call], config: GateConfig, found: list[Chunk]) -> Judgement:
    """``calls["new"]`` against ``calls["old"]`` in the same rounds; ``found`` gets the chunks, also if a call fails."""

    def judge(window: Sequence[Chunk], reasons: list[str]) -> Judgement:
        old, new = (rounds.joined(window, name) for name in (OLD, NEW))
        return judge_pairs(old, new, config.max_slowdown, reasons)

    return _until_told({name: calls[name] for name in (OLD, NEW)}, judge, config, found)


def hold_against(call: Call, times_s: Sequence[float], config: GateConfig, found: list[Chunk]) -> Judgement:
    """``call`` against times of another day. The newest half counts, so that a machine may take a while to settle."""

    def judge(window: Sequence[Chunk], reasons: list[str]) -> Judgement:
        newest = newest_half(window, config)
        reasons = reasons + rounds.disturbance(rounds.busy_share(newest))
        return judge_baseline(times_s, rounds.joined(newest, NEW), config.max_slowdown, reasons)

    return _until_told({NEW: call}, judge, config, found)


def settle(call: Call, config: GateConfig, found: list[Chunk]) -> Judgement:
    """Measure until the times would do as a baseline: held against themselves, they are undisturbed and precise."""

    def judge(window: Sequence[Chunk], reasons: list[str]) -> Judgement:
        newest = newest_half(window, config)
        reasons = reasons + rounds.disturbance(rounds.busy_share(newest))
        times = rounds.joined(newest, NEW)
        return judge_baseline(times, times, config.max_slowdown, reasons)

    return _until_told({NEW: call}, judge, config, found)


def newest_half(window: Sequence[Chunk], config: GateConfig) -> Sequence[Chunk]:
    """The newest half of the chunks, but no fewer than ``config.rounds`` rounds."""
    least = -(-config.rounds // rounds.CHUNK_ROUNDS)
    return window[-max(least, len(window) // 2) :]


def settled_half(found: Sequence[Chunk], config: GateConfig) -> Sequence[Chunk]:
    """What is held against another day, or kept for it: the newest half of what no throttling disturbed, if any."""
    return newest_half(rounds.undisturbed(found) or found, config)


def _until_told(calls: Mapping[str, Call], judge: Judge, config: GateConfig, found: list[Chunk]) -> Judgement:
    start = time.perf_counter()
    for chunk in rounds.chunks(calls, config.seed):
        found.append(chunk)
        window = rounds.undisturbed(found)
        count, elapsed_s = len(window) * rounds.CHUNK_ROUNDS, time.perf_counter() - start
        if count >= config.rounds and elapsed_s >= config.seconds:
            judgement = judge(window, [])
            if judgement.verdict != "unstable" or elapsed_s >= config.limit_s:
                return judgement
        elif elapsed_s >= config.limit_s:
            held = sorted({word for one in found for word in one.throttling})
            reasons = [f"the clocks were held down ({', '.join(held)})"] if held else []
            return judge(window or found, [*reasons, f"only {count} rounds within {config.limit_s:g} s"])
    raise AssertionError("the rounds never end")


def run_gate(bundle: Artifact, backends: Sequence[str], name: str, folder: Path, config: GateConfig) -> Record:
    """Hold every backend of a bundle against the baseline ``name``; the result is that of ``_each``.

    If the baseline's bundle is there and is another one, both run in the same rounds. These say nothing of what slows
    both, such as rpfm-edge itself: after a pass the baseline's bundle is held against its own times, and the reasons
    say if it is slower. Without the baseline's bundle, or if it is the same, the frame is held against the baseline's
    times.
    """

    def judged(backend: str, record: Record) -> None:
        kept = baseline.find(folder, name, backend, baseline.fingerprint(bundle, backend))
        if isinstance(kept, str):
            record |= {"verdict": "no baseline", "reasons": [kept]}
            return
        _check_size(bundle, kept.config, f"baseline {name}")
        other = baseline.kept_bundle(folder, kept)
        if other is not None and other.digest != bundle.digest:
            _judge_bundles(bundle, other, backend, config, record, kept)
        else:
            _judge_times(bundle, kept, backend, config, record)

    return _each(backends, judged, folder / "results" / f"{name}.json", {"gate": name, "bundle": bundle}, config)


def run_against(bundle: Artifact, backends: Sequence[str], other: Artifact, folder: Path, config: GateConfig) -> Record:
    """Compare every backend of a bundle with another bundle, in the same rounds."""
    _check_size(bundle, other.config, str(other.path))
    for backend in backends:
        require_engine(other, backend)

    def judged(backend: str, record: Record) -> None:
        _judge_bundles(bundle, other, backend, config, record)

    what = {"against": str(other.path), "bundle": bundle}
    return _each(backends, judged, folder / "results" / "against.json", what, config)


def run_save(bundle: Artifact, backends: Sequence[str], name: str, folder: Path, config: GateConfig) -> Record:
    """Measure every backend of a bundle and keep that as the baseline ``name``.

    Times that do not settle are kept with the reasons: the copy of the bundle still serves in the same rounds.
    """
    baseline.check_name(name)
    require_writable(folder)

    def judged(backend: str, record: Record) -> None:
        found: list[Chunk] = []
        with ExitStack() as stack:
            record["way"] = "save"
            try:
                judgement = settle(frame(stack, bundle, backend), config, found)
            finally:
                record |= _facts(found, settled_half(found, config))
        times = rounds.joined(settled_half(found, config), NEW)
        what = {key: bundle.config[key] for key in ("size", "steps", "precision")}
        device = baseline.fingerprint(bundle, backend)
        kept = Baseline(name, backend, device, what, bundle.digest, tuple(times), judgement.reasons)
        path = baseline.save(folder, kept, bundle)
        record |= {"verdict": "pass", "reasons": list(judgement.reasons), "baseline": str(path), "device": device}

    return _each(backends, judged, folder / "results" / f"{name}.json", {"save": name, "bundle": bundle}, config)


def _judge_bundles(
    bundle: Artifact, other: Artifact, backend: str, config: GateConfig, record: Record, kept: Baseline | None = None
) -> None:
    found: list[Chunk] = []
    record |= {"way": "a/b", "old_bundle": str(other.path)}
    with ExitStack() as stack:
        try:
            calls = {OLD: frame(stack, other, backend), NEW: frame(stack, bundle, backend)}
            record |= compare(calls, config, found).to_json()
        finally:
            record |= _facts(found, rounds.undisturbed(found) or found)
        if kept is not None and record["verdict"] == "pass":
            _judge_both(calls[OLD], kept, config, record)


def _judge_both(old: Call, kept: Baseline, config: GateConfig, record: Record) -> None:
    """Say what slows both bundles: the old one against its stored times, alone, as it was when these were measured.

    It is no verdict: a machine that is slower today is not told from slower code, and the rounds judged the bundle.
    """
    untold = _unsettled(kept) or rounds.disturbance(record["others"])
    if not untold:
        judgement = hold_against(old, kept.times_s, config, [])
        record["old_against_stored"] = judgement.to_json()
        untold = list(judgement.reasons)
        if judgement.verdict == "regression":
            why = f"the old bundle takes {judgement.slowdown:.1%} more than when it was saved"
            record["reasons"].append(f"{why}: rpfm-edge or the machine is slower")
    record["reasons"] += [f"not told whether rpfm-edge itself became slower: {why}" for why in untold]


def _unsettled(kept: Baseline) -> list[str]:
    return [f"when the baseline was saved, {why}" for why in kept.unsettled]


def _judge_times(bundle: Artifact, kept: Baseline, backend: str, config: GateConfig, record: Record) -> None:
    record |= {"way": "baseline", OLD: Latency(kept.times_s).to_json()}
    if reasons := _unsettled(kept):
        record |= {"verdict": "unstable", "reasons": reasons}
        return
    found: list[Chunk] = []
    with ExitStack() as stack:
        try:
            record |= hold_against(frame(stack, bundle, backend), kept.times_s, config, found).to_json()
        finally:
            record |= _facts(found, settled_half(found, config))


def _each(
    backends: Iterable[str], judged: Callable[[str, Record], None], out: Path, what: Record, config: GateConfig
) -> Record:
    """Judge one backend after the other; what is known is written to ``out`` each time, if that can be.

    Returns:
        ``verdict`` (the gravest), ``exit_code``, ``max_slowdown`` and ``backends``: of each its ``verdict``, its
        ``reasons`` and, as far as it was measured, ``way`` (``a/b``, ``baseline`` or ``save``), ``slowdown``,
        ``interval``, the judged times ``old`` and ``new`` with raw values in so many ``rounds``, those measured
        ``before_s``, ``others``, ``throttling``, ``machine``, and ``old_against_stored`` (the old bundle's verdict).
    """
    bundle: Artifact = what["bundle"]
    result: Record = {**what, "bundle": str(bundle.path), "digest": bundle.digest, "max_slowdown": config.max_slowdown}
    records: list[Record] = []
    for backend in backends:
        record: Record = {"backend": backend, **{key: bundle.config[key] for key in ("precision", "steps")}}
        try:
            judged(backend, record)
        except FAILURES as error:
            record |= {"verdict": "error", "reasons": [str(error)]}
        record["machine"] = where(_versions(bundle, backend))
        records.append(record)
        verdict = worst(one["verdict"] for one in records)
        result |= {"verdict": verdict, "exit_code": EXIT_CODES[verdict], "backends": records}
        keep_text(out, json.dumps(result, indent=1))
    return result


def frame(stack: ExitStack, bundle: Artifact, backend: str) -> Call:
    """One frame of the first held-out pair of the sample, drawing of the pose and copies included."""
    pipe = stack.enter_context(Pipeline.open(bundle, backend))
    source, pose = sample_inputs(pipe.size)
    return partial(pipe.render, pipe.prepare(source), pose)


def _facts(found: Sequence[Chunk], judged: Sequence[Chunk]) -> Record:
    """What was measured, as far as it got: the judged rounds, which are the last, and the raw times before them."""
    if not found:
        return {}
    names, before = list(found[0].times_s), found[: len(found) - len(judged)]
    return {
        **{name: Latency(tuple(rounds.joined(judged, name))).to_json() for name in names},
        "rounds": len(judged) * rounds.CHUNK_ROUNDS,
        "before_s": {name: rounds.joined(before, name) for name in names},
        "others": rounds.busy_share(judged),
        "throttling": sorted({word for chunk in found for word in chunk.throttling}),
    }


def _versions(bundle: Artifact, backend: str) -> Mapping[str, str]:
    try:
        return engine_versions(bundle, backend)
    except FAILURES:
        return {}


def _check_size(bundle: Artifact, config: Mapping[str, Any], whose: str) -> None:
    if list(bundle.config["size"]) != list(config["size"]):
        sizes = [" × ".join(map(str, size)) for size in (config["size"], bundle.config["size"])]
        raise ConfigError(
            f"{whose} renders {sizes[0]}, {bundle.path} {sizes[1]}",
            expected="frames of one size",
            fix="compare bundles of the same size",
        )


def gate(
    bundle: str | Path,
    baseline: str | None = None,
    against: str | Path | None = None,
    backend: str | None = None,
    baselines: str | Path = FOLDER,
    **changes: Any,
) -> dict[str, Any]:
    """Whether a frame of the bundle became slower than the baseline of this name, or than that of another bundle.

    Args:
        baselines: the folder of the baselines, and of ``results/``.
        changes: fields of ``regression.GateConfig`` (max_slowdown, rounds, seconds, limit_s); None is no change.

    Returns:
        ``verdict`` (pass, regression, error, no baseline or unstable), ``exit_code``, ``backends``, and ``skipped``, as
        in ``bench``, if any is.
    """
    if (baseline is None) == (against is None):
        raise ConfigError(
            "nothing, or two things, to hold the bundle against",
            expected="a baseline's name or another bundle",
            fix="give one of --baseline and --against",
        )
    config, loaded = GateConfig(**without_none(changes)), artifact.load(shipped.resolve(bundle), "bundle")
    backends, skipped = usable_backends(loaded, backend)
    if baseline is not None:
        return run_gate(loaded, backends, baseline, Path(baselines), config) | skipped
    other = artifact.load(shipped.resolve(str(against)), "bundle")
    return run_against(loaded, backends, other, Path(baselines), config) | skipped


def save_baseline(
    bundle: str | Path, baseline: str, backend: str | None = None, baselines: str | Path = FOLDER, **changes: Any
) -> dict[str, Any]:
    """Measure a frame of the bundle and keep that, with a copy of the bundle, as a baseline of this device.

    Arguments and result are as in ``gate``.
    """
    config, loaded = GateConfig(**without_none(changes)), artifact.load(shipped.resolve(bundle), "bundle")
    backends, skipped = usable_backends(loaded, backend)
    return run_save(loaded, backends, baseline, Path(baselines), config) | skipped
