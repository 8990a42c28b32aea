"""What distillation gained: teacher and students at few steps, against the teacher's reference and the ground truth.

Pairs are measured in chunks. The pictures of one chunk are in memory at a time, and a finished chunk is kept beside the
result, so that a measurement that takes long can be stopped, continued and made longer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rpfm_edge import artifact, assets, measure, metrics
from rpfm_edge.artifact import json_digest, write_text
from rpfm_edge.data import Split
from rpfm_edge.errors import ConfigError
from rpfm_edge.flow import student_steps
from rpfm_edge.progress import progress
from rpfm_edge.splits import open_splits
from rpfm_edge.stages import identity
from rpfm_edge.validate import Pairs, read_pairs, shuffled_pairs

STEPS = (1, 2, 4, 8)
TARGETS = {1: 1.05, 4: 1.01}  # steps → error against the truth, in multiples of the teacher's
ERRORS = ("mse", "flip", "lpips")
Indices = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class GainConfig:
    """``pairs`` held-out pairs drawn by ``seed``; ``chunk`` of them are in memory, ``batch`` in the network at a time.

    ``precision`` is that of the networks. ``metrics``: keys of ``metrics.METRICS``; None: all that can be computed."""

    pairs: int = 32
    seed: int = 0
    chunk: int = 32
    batch: int = 8
    precision: Literal["fp32", "bf16"] = "fp32"
    metrics: tuple[str, ...] | None = None


def measure_gain(
    teacher: str | Path, students: Mapping[str, str | Path], data: str | Path, out: Path, config: GainConfig
) -> dict[str, Any]:
    """Measure the teacher at 1, 2, 4 and 8 Euler steps and every student at its own steps, and write that to ``out``.

    Args:
        teacher: a path, a shipped name or a factory. Its reference solution is what all are compared with.
        students: name → path or shipped name; all of one size.
        out: a JSON file; finished chunks lie in ``out.work`` and are continued from there.

    Returns:
        ``teacher`` and each of ``students``: steps → ``against_teacher`` and ``against_truth``; ``reference``:
        ``against_truth``; ``truth``: see ``compare_truth``; and the circumstances.
    """
    size, latent_shape = _common_shape(students)
    names = config.metrics or tuple(n for n in metrics.METRICS if n not in metrics.missing_metrics())
    test = open_splits(data).test
    models = {"teacher": identity(teacher), **{name: identity(path) for name, path in students.items()}}
    settings = {k: v for k, v in asdict(config).items() if k != "pairs"} | {"metrics": names}
    key = json_digest({"models": models, "data": str(data), "settings": settings})[:12]
    work, parts = out.with_name(out.name + ".work"), []
    with progress("pairs", total=config.pairs) as advance:
        for number, (indices, noise) in enumerate(draw_chunks(test, latent_shape, config)):
            file = work / f"{key}-{number:05d}.json"
            part = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"pairs": []}
            if len(part["pairs"]) != len(indices):  # the last chunk of a shorter measurement
                part = _measure_chunk(teacher, students, read_pairs(test, indices, noise, size), config, names)
                write_text(file, json.dumps(part))
            parts.append(part)
            advance(sum(len(p["pairs"]) for p in parts))
    found = merge(parts)
    found |= {"seed": config.seed, "data": str(data), "settings": settings, "machine": measure.where()}
    found["truth"] = compare_truth(found["students"], found["reference"], config.seed)
    write_text(out, json.dumps(found, indent=1))
    return found  # type: ignore[no-any-return]


def _common_shape(students: Mapping[str, str | Path]) -> tuple[tuple[int, int], tuple[int, ...]]:
    """(H, W) of the pictures and the shape of the latents, which all students must share."""
    shapes = {}
    for name, path in students.items():
        config = artifact.load(assets.resolve(path), "student", verify=False).config
        network, size = config["network"], config["size"]
        shapes[name] = (tuple(size), (network["latent_channels"], *network["latent_size"]))
    if len(set(shapes.values())) != 1:
        words = ", ".join(f"{name} of {shape[0]}" for name, shape in shapes.items()) or "no students"
        raise ConfigError(words, expected="students of one size", fix="judge those of one teacher together")
    size, latent_shape = next(iter(shapes.values()))
    return (int(size[0]), int(size[1])), latent_shape


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


def _measure_chunk(
    teacher: str | Path,
    students: Mapping[str, str | Path],
    pairs: Pairs,
    config: GainConfig,
    names: Sequence[str],
) -> dict[str, Any]:
    """The result of ``measure_gain`` for one chunk, without what is said of the whole."""
    from distill.reference import REFERENCE_SOLVER, REFERENCE_STEPS, student_images, teacher_images

    def compared(images: np.ndarray) -> dict[str, Any]:
        return {
            "against_teacher": metrics.compare(slow[reference], images, names),
            "against_truth": metrics.compare(pairs.truths, images, names),
        }

    inputs, options = pairs.inputs, (config.batch, config.precision)
    reference = (REFERENCE_STEPS, REFERENCE_SOLVER)
    slow = teacher_images(teacher, *inputs, [reference, *((n, "euler") for n in STEPS)], *options)
    measured = {}
    for name, path in students.items():
        steps = student_steps(artifact.load(assets.resolve(path), "student", verify=False).config) or STEPS
        fast = student_images(path, *inputs, steps, *options)
        measured[name] = {str(n): compared(fast[n]) for n in steps}
    return {
        "pairs": [list(pair) for pair in pairs.names],
        "teacher": {str(n): compared(slow[n, "euler"]) for n in STEPS},
        "students": measured,
        "reference": {"against_truth": metrics.compare(pairs.truths, slow[reference], names)},
    }


def merge(parts: Sequence[Any]) -> Any:
    """The results of several chunks as one: lists are joined, and statistics made again from their values."""
    first = parts[0]
    if isinstance(first, list):
        return [entry for part in parts for entry in part]
    if "values" in first:
        return metrics.statistics([value for part in parts for value in part["values"]])
    return {key: merge([part[key] for part in parts]) for key in first}


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
