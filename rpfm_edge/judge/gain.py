"""What distillation gained: teacher, students and bundles at few steps, against the reference and the ground truth.

Pairs are measured in chunks. The pictures of one chunk are in memory at a time, and a finished chunk is kept beside the
result, so that a measurement that takes long can be stopped, continued and made longer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rpfm_edge.bundle.engines import default_backend, require_engine
from rpfm_edge.bundle.pipeline import Pipeline
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.files import json_digest, write_text
from rpfm_edge.core.flow import latent_shape, student_steps
from rpfm_edge.core.progress import progress
from rpfm_edge.core.stages import identity
from rpfm_edge.judge.quality import bundle_videos, images_of, teacher_videos
from rpfm_edge.measure import metrics
from rpfm_edge.measure.detail import NOBODY, sharpness
from rpfm_edge.measure.flicker import steadiness
from rpfm_edge.measure.joints import missing_pose, pose_accuracy
from rpfm_edge.measure.machine import where
from rpfm_edge.people.data import Split
from rpfm_edge.people.held_out import Clip, ClipConfig, Pairs, missing_clips, open_clips, read_pairs, shuffled_pairs
from rpfm_edge.people.splits import open_splits

STEPS = (1, 2, 4, 8)
NO_CLIPS = ClipConfig(count=0)
TARGETS = {1: 1.05, 4: 1.01}  # steps → error against the truth, in multiples of the teacher's
ERRORS = ("mse", "flip", "lpips")
Indices = list[tuple[int, int]]
Engine = tuple[Artifact, str]  # a bundle, and the backend that runs it


@dataclass(frozen=True, slots=True)
class GainConfig:
    """``pairs`` held-out pairs drawn by ``seed``; ``chunk`` of them are in memory, ``batch`` in the network at a time.

    ``precision`` is that of the networks. ``metrics``: keys of ``metrics.METRICS``; None: all that can be computed.
    ``poses``: look for joints too. ``filmed``: clips that the reference and the bundles are rendered on. ``backend``
    of the bundles; None: the first of each that is installed here."""

    pairs: int = 32
    seed: int = 0
    chunk: int = 32
    batch: int = 8
    precision: Literal["fp32", "bf16"] = "fp32"
    metrics: tuple[str, ...] | None = None
    poses: bool = False
    filmed: ClipConfig = NO_CLIPS
    backend: str | None = None


def measure_gain(
    teacher: str | Path,
    students: Mapping[str, str | Path],
    data: str | Path,
    out: Path,
    config: GainConfig,
    bundles: Mapping[str, str | Path] | None = None,
) -> dict[str, Any]:
    """Measure the teacher at 1, 2, 4 and 8 Euler steps, every student and bundle at its own, and write that to ``out``.

    Args:
        teacher: a path, a shipped name or a factory. Its reference solution is what all are compared with.
        students, bundles: name → path or shipped name; all of one size.
        out: a JSON file; finished chunks and clips lie in ``out.work`` and are continued from there.

    Returns:
        ``teacher`` and each of ``students`` and ``bundles`` (by name, precision and backend): steps →
        ``against_teacher``, ``against_truth``, ``detail`` and ``pose``; ``reference`` and ``ground_truth``: those of
        them that there are; ``flicker`` of the reference, the bundles and the truth; ``truth``: see
        ``compare_truth``; and the circumstances.
    """
    engines = _engines(bundles or {}, config.backend)
    size, latent_shape = _common_shape(students, engines)
    test, names = open_splits(data).test, config.metrics or _computable()
    settings = {k: v for k, v in asdict(config).items() if k not in ("pairs", "filmed")}
    settings |= {"metrics": names, "poses": config.poses and not missing_pose()}
    models = {"teacher": identity(teacher), **{name: identity(path) for name, path in students.items()}}
    models |= {name: bundle.digest for name, (bundle, _) in engines.items()}
    key = json_digest({"models": models, "data": str(data), "settings": settings})[:12]
    job = _Job(teacher, students, engines, config, names, out.with_name(out.name + ".work") / key)
    clips = open_clips(test, config.filmed, size, latent_shape, config.seed)
    found = merge(_measure_pairs(job, test, size, latent_shape)) | _measure_clips(job, clips)
    found |= {"seed": config.seed, "data": str(data), "settings": settings, "machine": where()}
    found |= {"missing": {**metrics.missing_metrics(), **_missing(found, test, config)}}
    rows = [compare_truth(found[kind], found["reference"], config.seed) for kind in ("students", "bundles")]
    found["truth"] = rows[0] + [{**row, "target": None} for row in rows[1]]  # targets are of distillation alone
    write_text(out, json.dumps(found, indent=1))
    return found  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Job:
    """What is measured on every chunk and clip; the names of the files that keep it begin with ``kept``."""

    teacher: str | Path
    students: Mapping[str, str | Path]
    engines: Mapping[str, Engine]
    config: GainConfig
    names: Sequence[str]
    kept: Path


def _computable() -> tuple[str, ...]:
    return tuple(name for name in metrics.METRICS if name not in metrics.missing_metrics())


def _engines(bundles: Mapping[str, str | Path], backend: str | None) -> dict[str, Engine]:
    """Name, precision and backend, in words → the bundle and the backend, which is installed."""
    found = {}
    for name, path in bundles.items():
        bundle = artifact.load(shipped.resolve(path), "bundle")
        chosen = backend or default_backend(bundle)
        require_engine(bundle, chosen)
        found[f"{name}, {bundle.config['precision']}, {chosen}"] = bundle, chosen
    return found


def _common_shape(
    students: Mapping[str, str | Path], engines: Mapping[str, Engine]
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """(H, W) of the pictures and the shape of the latents, which all students and bundles must share."""
    shapes = {name: (tuple(b.config["size"]), tuple(b.config["latent_shape"])) for name, (b, _) in engines.items()}
    for name, path in students.items():
        config = artifact.load(shipped.resolve(path), "student", verify=False).config
        shapes[name] = (tuple(config["size"]), latent_shape(config))
    if not students or len(set(shapes.values())) != 1:
        words = ", ".join(f"{name} of {shape[0]}" for name, shape in shapes.items()) if students else "no students"
        raise ConfigError(words, expected="students of one size", fix="judge those of one teacher together")
    size, shape = next(iter(shapes.values()))
    return (int(size[0]), int(size[1])), shape


def draw_chunks(split: Split, latent_shape: Sequence[int], config: GainConfig) -> Iterator[tuple[Indices, np.ndarray]]:
    """The pairs and noises of ``validate.draw_pairs``, in chunks, without their pictures."""
    if config.pairs < 1 or config.chunk < 1:
        raise ConfigError(
            f"{config.pairs} pairs in chunks of {config.chunk}", expected="at least 1 of each", fix="ask for more"
        )
    rng = np.random.default_rng(config.seed)
    chosen = shuffled_pairs(split, config.pairs, rng)
    for start in range(0, len(chosen), config.chunk):
        indices = chosen[start : start + config.chunk]
        yield indices, rng.standard_normal((len(indices), *latent_shape), dtype=np.float32)


def _measure_pairs(job: _Job, test: Split, size: tuple[int, int], latent_shape: Sequence[int]) -> list[dict[str, Any]]:
    """The result of every chunk of pairs, without what is said of the whole."""
    parts = []
    with progress("pairs", total=job.config.pairs) as advance:
        for number, (indices, noise) in enumerate(draw_chunks(test, latent_shape, job.config)):
            drawn = {"pairs": [[test.names[source], test.names[target]] for source, target in indices]}
            file = job.kept.with_name(f"{job.kept.name}-{number:05d}.json")
            parts.append(_once(file, drawn, partial(_measure_chunk, job, test, indices, noise, size)))
            advance(sum(len(part["pairs"]) for part in parts))
    return parts


def _once(file: Path, of: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``of`` and what was measured of it: as ``file`` keeps it, if it is of the same, or measured now and kept."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if {name: kept.get(name) for name in of} != of:  # nothing yet, or the last chunk of a shorter measurement
        kept = {**of, **make()}
        write_text(file, json.dumps(kept))
    return kept


def _measure_chunk(
    job: _Job, test: Split, indices: Indices, noise: np.ndarray, size: tuple[int, int]
) -> dict[str, Any]:
    """What is measured on the pairs of one chunk."""
    from distill.reference import REFERENCE_SOLVER, REFERENCE_STEPS

    pairs, reference = read_pairs(test, indices, noise, size), (REFERENCE_STEPS, REFERENCE_SOLVER)

    def beside(images: np.ndarray) -> dict[str, Any]:
        return sharpness(images, pairs.truths) | (pose_accuracy(images, pairs.poses) if job.config.poses else {})

    def compared(images: np.ndarray) -> dict[str, Any]:
        return {
            "against_teacher": metrics.compare(slow[reference], images, job.names),
            "against_truth": metrics.compare(pairs.truths, images, job.names),
            **beside(images),
        }

    slow, made = _torch_images(job, pairs, [reference, *((n, "euler") for n in STEPS)])
    bundles: dict[str, Any] = {}
    for name, (bundle, backend) in job.engines.items():
        bundles[name] = {str(bundle.config["steps"]): compared(images_of(bundle, backend, pairs))}
    return {
        "teacher": {str(n): compared(slow[n, "euler"]) for n in STEPS},
        "students": {name: {str(n): compared(images) for n, images in fast.items()} for name, fast in made.items()},
        "bundles": bundles,
        "reference": {
            "against_truth": metrics.compare(pairs.truths, slow[reference], job.names),
            **beside(slow[reference]),
        },
        "ground_truth": beside(pairs.truths),
    }


def _torch_images(job: _Job, pairs: Pairs, budgets: Sequence[tuple[int, str]]) -> tuple[Any, dict[str, Any]]:
    """The teacher's pictures by (steps, solver), and those of every student by steps."""
    from distill.reference import student_images, teacher_images

    inputs, options = pairs.inputs, (job.config.batch, job.config.precision)
    made = {}
    for name, path in job.students.items():
        steps = student_steps(artifact.load(shipped.resolve(path), "student", verify=False).config) or STEPS
        made[name] = student_images(path, *inputs, steps, *options)
    return teacher_images(job.teacher, *inputs, budgets, *options), made


def _video(bundle: Artifact, backend: str, clip: Clip) -> list[np.ndarray]:
    with Pipeline.open(bundle, backend) as pipe:
        return bundle_videos(pipe, [clip])


def _measure_clips(job: _Job, clips: Sequence[Clip]) -> dict[str, Any]:
    """``clips``, and ``flicker`` on them of the teacher's reference, the bundles and the ground truth."""

    def film(clip: Clip) -> dict[str, Any]:
        videos = {"teacher, reference": teacher_videos(job.teacher, [clip])}
        videos |= {name: _video(bundle, backend, clip) for name, (bundle, backend) in job.engines.items()}
        videos["ground truth"] = [clip.truth]
        return {"flicker": {name: steadiness(video, [clip])["flicker"] for name, video in videos.items()}}

    parts: list[dict[str, Any]] = [] if clips else [{"clips": [], "flicker": {}}]
    for clip in clips:
        shown = {"clips": [{"name": clip.name, "frames": len(clip.truth)}]}
        parts.append(_once(job.kept.with_name(f"{job.kept.name}-{clip.name}.json"), shown, partial(film, clip)))
    return merge(parts)  # type: ignore[no-any-return]


def _missing(found: Mapping[str, Any], test: Split, config: GainConfig) -> dict[str, str]:
    """What was not measured beside distances, and why."""
    reasons = {}
    if "pose" not in found["ground_truth"]:
        reasons["pck"] = missing_pose() or "no pose has neck and hip" if config.poses else "poses were not asked for"
    if "detail" not in found["ground_truth"]:
        reasons["detail"] = NOBODY
    if why := missing_clips(test, config.filmed):
        reasons["flicker"] = why
    return reasons


def merge(parts: Sequence[Any]) -> Any:
    """The results of several chunks as one: lists are joined, and statistics made again from their values.

    What a chunk lacks (detail, where nobody can be scored) comes from the others."""
    first = parts[0]
    if isinstance(first, list):
        return [entry for part in parts for entry in part]
    if "values" in first:
        return metrics.statistics([value for part in parts for value in part["values"]])
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: merge([part[key] for part in parts if key in part]) for key in keys}


def compare_truth(students: Mapping[str, Any], reference: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """Each student's error against the ground truth beside that of the teacher's reference.

    Returns:
        one entry for each student and number of steps: ``student``, ``steps``, ``target`` (the largest ratio that
        counts as no loss, or None), and for each error that was measured (``mse`` of pixels in [0, 255], ``flip``,
        ``lpips``) the ``teacher``'s mean, the ``ratio`` of the means, and the 95 % ``interval`` of that ratio, from a
        paired bootstrap (None for a single pair).
    """
    theirs = errors(reference["against_truth"])
    rows = []
    for name, by_steps in students.items():
        for steps, found in by_steps.items():
            own = errors(found["against_truth"])
            ratios = {metric: _ratio(own[metric], theirs[metric], seed) for metric in own}
            rows.append({"student": name, "steps": int(steps), "target": TARGETS.get(int(steps)), **ratios})
    return rows


def errors(summary: Mapping[str, Any]) -> dict[str, list[float]]:
    """The errors of a summary, image by image; the mean squared error follows from PSNR."""
    squared = [255**2 / 10 ** (value / 10) for value in summary["psnr_db"]["values"]] if "psnr_db" in summary else None
    found = {"mse": squared} | {name: summary[name]["values"] for name in ERRORS[1:] if name in summary}
    return {name: values for name, values in found.items() if values is not None}


def _ratio(own: Sequence[float], theirs: Sequence[float], seed: int) -> dict[str, Any]:
    teacher = float(np.mean(theirs))
    interval = list(metrics.ratio_bootstrap(own, theirs, seed)) if len(own) > 1 else None
    return {"teacher": teacher, "ratio": float(np.mean(own)) / teacher, "interval": interval}
