"""Quality on held-out identities: a bundle against its teacher at the same noise, and both against the ground truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge import measure, metrics
from rpfm_edge.artifact import Artifact
from rpfm_edge.bundle import add_evidence
from rpfm_edge.data import Split
from rpfm_edge.errors import ConfigError, InputError
from rpfm_edge.metrics import Budget
from rpfm_edge.pipeline import Pipeline
from rpfm_edge.pose import draw_skeleton
from rpfm_edge.progress import progress


@dataclass(frozen=True, slots=True)
class Pairs:
    """Held-out pairs with a noise for each: n sources, skeletons and ground truths (n, H, W, 3) uint8."""

    names: list[tuple[str, str]]
    sources: np.ndarray
    skeletons: np.ndarray
    truths: np.ndarray
    noise: np.ndarray  # (n, C, h, w) float32


def draw_pairs(split: Split, count: int, size: tuple[int, int], latent_shape: Iterable[int], seed: int = 0) -> Pairs:
    """``count`` pairs of a split drawn without replacement, and noise from the same seed.

    Pairs without a visible joint in the target are left out.
    """
    if count < 1:
        raise ConfigError(f"{count} pairs", expected="at least 1", fix="ask for more, such as 32")
    rng = np.random.default_rng(seed)
    visible = [pair for pair in split.pairs if np.isfinite(split.keypoints[pair[1]]).any()]
    if not visible:
        raise InputError(f"{split.root} has no pairs", expected="pairs to validate on", fix="check its pairs file")
    order = rng.permutation(len(visible))[:count]
    chosen = [visible[i] for i in order]
    return Pairs(
        names=[(split.names[s], split.names[t]) for s, t in chosen],
        sources=np.stack([split.image(int(s), size) for s, _ in chosen]),
        skeletons=np.stack([draw_skeleton(split.pose(int(t), size), size) for _, t in chosen]),
        truths=np.stack([split.image(int(t), size) for _, t in chosen]),
        noise=rng.standard_normal((len(chosen), *latent_shape), dtype=np.float32),
    )


def bundle_images(bundle: str | Path, backend: str, pairs: Pairs) -> np.ndarray:
    """What the bundle makes of the pairs: (n, H, W, 3) uint8."""
    images = []
    with Pipeline.open(bundle, backend) as pipe, progress(backend, total=len(pairs.names)) as advance:
        for index in range(len(pairs.names)):
            person = pipe.prepare(pairs.sources[index])
            noise = pairs.noise[index : index + 1]
            images.append(pipe.render_skeleton(person, pairs.skeletons[index], noise))
            advance(index + 1)
    return np.stack(images)


def drift(images: np.ndarray, teacher: np.ndarray, truths: np.ndarray) -> dict[str, Any]:
    """A stage's distances to the teacher's images and to the ground truth."""
    return {"against_teacher": metrics.compare(teacher, images), "against_truth": metrics.compare(truths, images)}


def teacher_stages(teacher: str | Path, pairs: Pairs, steps: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """The teacher's reference images, and the first stages of every drift table.

    These are the reference against the truth, and the teacher with ``steps`` Euler steps: what one gets without
    distilling.
    """
    from distill.reference import REFERENCE_SOLVER, REFERENCE_STEPS, teacher_images

    reference, few = (REFERENCE_STEPS, REFERENCE_SOLVER), (steps, "euler")
    made = teacher_images(teacher, pairs.sources, pairs.skeletons, pairs.noise, {reference, few})
    return made[reference], [
        {"stage": "teacher, reference", "against_truth": metrics.compare(pairs.truths, made[reference])},
        {"stage": f"teacher, {plural(steps)}", **drift(made[few], made[reference], pairs.truths)},
    ]


def circumstances(pairs: Pairs) -> dict[str, Any]:
    """What stands beside every drift figure: the pairs, the reference solution, what was not measured, the machine."""
    from distill.reference import REFERENCE_SOLVER, REFERENCE_STEPS

    return {
        "pairs": pairs.names,
        "reference": {"steps": REFERENCE_STEPS, "solver": REFERENCE_SOLVER},
        "missing": metrics.missing_metrics(),
        "machine": measure.where(),
    }


def validate(
    bundle: Artifact,
    teacher: str | Path,
    split: Split,
    backends: Iterable[str],
    count: int,
    budget: Budget,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure drift on ``count`` pairs for each backend, keep it in the bundle as evidence, and judge it by ``budget``.

    Stages: those of the teacher (``teacher_stages``), then the bundle on each backend; all against the teacher's
    reference solution. The violations of the budget are those of the bundle.
    """
    steps = int(bundle.config["steps"])
    pairs = draw_pairs(split, count, tuple(bundle.config["size"]), bundle.config["latent_shape"], seed)
    reference, stages = teacher_stages(teacher, pairs, steps)
    violations = []
    for backend in backends:
        stage = drift(bundle_images(bundle.path, backend, pairs), reference, pairs.truths)
        stages.append({"stage": f"bundle, {plural(steps)}, {bundle.config['precision']}, {backend}", **stage})
        violations += [f"{backend}: {text}" for text in budget.check(stage["against_teacher"])]
    evidence = {
        **circumstances(pairs),
        "stages": stages,
        "teacher": str(teacher),
        "seed": seed,
        "budget": {k: v for k, v in asdict(budget).items() if v is not None},
        "violations": violations,
    }
    add_evidence(bundle, "drift", evidence)
    return evidence


def plural(steps: int) -> str:
    """``1 step``, ``4 steps``."""
    return f"{steps} step{'s' if steps > 1 else ''}"
