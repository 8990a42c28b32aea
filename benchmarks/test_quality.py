"""Quality on identities that no network has seen: what distillation gains, and what the autoencoder loses.

The flow map and its teacher run with the same number of steps, both against the teacher's reference solution at the
same noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distill.reference import REFERENCE_SOLVER, REFERENCE_STEPS, student_images, teacher_images
from distill.student import load_student
from rpfm_edge.measure.metrics import METRICS, Summary, compare, missing_metrics, paired_bootstrap
from rpfm_edge.people.held_out import draw_pairs
from rpfm_edge.people.image import from_model, to_model
from rpfm_edge.people.splits import open_splits

STEPS, SEED = (1, 2, 4, 8), 0
NEARER_AT, GAIN_DB = (1, 4), 3.0  # steps at which the student must be nearer; by how much at one step
Summaries = dict[int, dict[str, Summary]]  # steps → "teacher" or "student" → metrics against the reference


def measured(chosen: Any) -> Summaries:
    """Both networks at each number of steps, against the reference."""
    student, loaded = load_student(chosen.student)
    size, latent_shape = tuple(loaded.config["size"]), student.network.latent_shape
    pairs = draw_pairs(open_splits(chosen.data).test, chosen.pairs, size, latent_shape, SEED)
    reference = (REFERENCE_STEPS, REFERENCE_SOLVER)
    slow = teacher_images(chosen.teacher, *pairs.inputs, [reference, *((steps, "euler") for steps in STEPS)])
    fast = student_images(chosen.student, *pairs.inputs, STEPS)
    return {
        steps: {
            "teacher": compare(slow[reference], slow[steps, "euler"]),
            "student": compare(slow[reference], fast[steps]),
        }
        for steps in STEPS
    }


def gain(summaries: dict[str, Summary], metric: str) -> tuple[float, float, float]:
    """Median over the pairs of student minus teacher, and the 95 % bootstrap interval of the mean."""
    values = [summaries[who][metric]["values"] for who in ("student", "teacher")]
    return float(np.median(np.subtract(*values))), *paired_bootstrap(*values, seed=SEED)


def test_student_against_teacher(benchmark: Any, conclude: Any, chosen: Any) -> None:
    """PSNR, SSIM and FLIP: medians, and the gain of each pair."""
    found: Summaries = benchmark.pedantic(measured, (chosen,), rounds=1)
    metrics = [name for name in METRICS if name not in missing_metrics()]
    gains = {steps: {name: gain(found[steps], name) for name in metrics} for steps in STEPS}
    rows = []
    for steps in STEPS:
        for name in metrics:
            medians = [f"{found[steps][who][name]['median']:.3f}" for who in ("teacher", "student")]
            middle, low, high = gains[steps][name]
            row = [str(steps), METRICS[name].title, *medians, f"{middle:+.3f}", f"{low:+.3f} … {high:+.3f}"]
            rows.append(row)
    verdicts = {f"nearer than the teacher at {n} step(s): PSNR": gains[n]["psnr_db"][1] > 0 for n in NEARER_AT}
    at_one = gains[1]["psnr_db"][0]
    verdicts[f"{at_one:+.2f} dB PSNR at 1 step, at least {GAIN_DB:+g} dB"] = at_one >= GAIN_DB
    count = len(found[1]["student"]["psnr_db"]["values"])
    conclude(
        f"{count} held-out pairs of {chosen.data}, against the teacher's {REFERENCE_STEPS} {REFERENCE_SOLVER} steps",
        ("steps", "metric", "teacher", "student", "gain, median", "gain, mean (95 %)"),
        rows,
        verdicts,
        summaries={str(steps): found[steps] for steps in STEPS},
        gains={str(steps): gains[steps] for steps in STEPS},
    )


def test_autoencoder(benchmark: Any, conclude: Any, chosen: Any) -> None:
    """Every picture of the validation identities through the student's autoencoder."""
    student, loaded = load_student(chosen.student)
    pictures = open_splits(chosen.data).validation.images(size=tuple(loaded.config["size"]))

    @torch.no_grad()
    def reconstructed() -> np.ndarray:
        batches = np.array_split(pictures, max(1, len(pictures) // 16))
        codec = student.autoencoder
        return np.concatenate(
            [from_model(codec.decode(codec.encode(torch.from_numpy(to_model(b)))).numpy()) for b in batches]
        )

    found = compare(pictures, benchmark.pedantic(reconstructed, rounds=1), ["psnr_db", "ssim"])
    rows = [[METRICS[name].title, f"{found[name]['median']:.3f}", f"{found[name]['mean']:.3f}"] for name in found]
    title = f"{len(pictures)} pictures of the validation identities of {chosen.data}, reconstructed"
    conclude(title, ("metric", "median", "mean"), rows, {}, reconstruction=found)
