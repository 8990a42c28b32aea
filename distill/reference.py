"""What teacher and student make of given pairs at given noise, in torch: the reference of every drift figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from distill.student import load_student
from distill.teacher import Teacher, load_teacher, move, sample_teacher
from rpfm_edge.flow import Solver
from rpfm_edge.image import from_model, to_model
from rpfm_edge.progress import progress

REFERENCE_STEPS, REFERENCE_SOLVER = 8, "heun"  # what the trajectory store is solved with


def teacher_images(
    teacher_spec: str | Path | Teacher,
    sources: np.ndarray,
    skeletons: np.ndarray,
    noise: np.ndarray,
    budgets: Iterable[tuple[int, str]],
    batch: int = 1,
    precision: str = "fp32",
) -> dict[tuple[int, str], np.ndarray]:
    """The teacher's images for each (steps, solver).

    Args:
        sources, skeletons: (n, H, W, 3) uint8.
        noise: (n, C, h, w) float32.
        batch: pairs in the network at a time.
        precision: of the network, ``fp32`` or ``bf16``; latents and autoencoder stay in float32.

    Returns:
        (steps, solver) → (n, H, W, 3) uint8.
    """
    teacher = load_teacher(teacher_spec) if isinstance(teacher_spec, str | Path) else teacher_spec
    move(teacher, PartialState().device)

    def latent(noise: Tensor, condition: Any, budget: tuple[int, str]) -> Tensor:
        return sample_teacher(teacher, noise, condition, budget[0], cast(Solver, budget[1]))

    pairs = _batches("teacher", sources, skeletons, noise, batch)
    return _images(teacher, pairs, list(budgets), latent, precision)


def student_images(
    student_path: str | Path,
    sources: np.ndarray,
    skeletons: np.ndarray,
    noise: np.ndarray,
    steps: Iterable[int],
    batch: int = 1,
    precision: str = "fp32",
) -> dict[int, np.ndarray]:
    """A student's images in torch for each number of steps; arguments and results as ``teacher_images``."""
    student, _ = load_student(student_path)
    student.to(PartialState().device)
    pairs = _batches("student", sources, skeletons, noise, batch)
    return _images(student, pairs, list(steps), student.sample, precision)


def _batches(
    title: str, sources: np.ndarray, skeletons: np.ndarray, noise: np.ndarray, batch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Sources, skeletons and noise as the networks want them, on their device."""
    device = PartialState().device
    with progress(title, total=len(sources)) as advance:
        for start in range(0, len(sources), batch):
            part = slice(start, start + batch)
            source, pose = (torch.from_numpy(to_model(a[part])).to(device) for a in (sources, skeletons))
            yield source, pose, torch.from_numpy(noise[part]).to(device)
            advance(min(start + batch, len(sources)))


@torch.no_grad()
def _images(
    model: Any,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    wanted: list[Any],
    latent: Callable[[Tensor, Any, Any], Tensor],
    precision: str,
) -> dict[Any, np.ndarray]:
    """Budget → images: what ``latent(noise, condition, budget)`` is when it is decoded."""
    images: dict[Any, list[np.ndarray]] = {budget: [] for budget in wanted}
    for source, pose, noise in batches:
        encoded = model.autoencoder.encode(source)
        with torch.autocast(noise.device.type, torch.bfloat16, enabled=precision == "bf16"):
            condition = model.condition(encoded, pose)
            ends = {budget: latent(noise, condition, budget) for budget in wanted}
        for budget, end in ends.items():
            images[budget].append(from_model(model.autoencoder.decode(end.float()).cpu().numpy()))
    return {budget: np.concatenate(stack) for budget, stack in images.items()}
