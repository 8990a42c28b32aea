"""What teacher and student make of given pairs at given noise, in torch: the reference of every drift figure."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from distill.student import load_student
from distill.teacher import load_teacher, move, sample_teacher
from rpfm_edge.flow import Solver
from rpfm_edge.image import from_model, to_model
from rpfm_edge.progress import progress

REFERENCE_STEPS, REFERENCE_SOLVER = 8, "heun"  # what the trajectory store is solved with


@torch.no_grad()
def teacher_images(
    teacher_spec: str | Path,
    sources: np.ndarray,
    skeletons: np.ndarray,
    noise: np.ndarray,
    budgets: Iterable[tuple[int, Solver]],
) -> dict[tuple[int, str], np.ndarray]:
    """The teacher's images for each (steps, solver).

    Args:
        sources, skeletons: (n, H, W, 3) uint8.
        noise: (n, C, h, w) float32.

    Returns:
        (steps, solver) → (n, H, W, 3) uint8.
    """
    teacher, device = load_teacher(teacher_spec), PartialState().device
    move(teacher, device)
    wanted = list(budgets)
    images: dict[tuple[int, str], list[np.ndarray]] = {budget: [] for budget in wanted}
    with progress("teacher", total=len(sources)) as advance:
        for index in range(len(sources)):
            source, pose = (torch.from_numpy(to_model(a[index : index + 1])).to(device) for a in (sources, skeletons))
            condition = teacher.condition(teacher.autoencoder.encode(source), pose)
            z = torch.from_numpy(noise[index : index + 1]).to(device)
            for steps, solver in wanted:
                latent = sample_teacher(teacher, z, condition, steps, solver)
                images[steps, solver].append(from_model(teacher.autoencoder.decode(latent).cpu().numpy())[0])
            advance(index + 1)
    return {budget: np.stack(stack) for budget, stack in images.items()}


@torch.no_grad()
def student_images(
    student_path: str | Path, sources: np.ndarray, skeletons: np.ndarray, noise: np.ndarray, steps: Iterable[int]
) -> dict[int, np.ndarray]:
    """A student's images in float32 torch for each number of steps; arguments and results as ``teacher_images``."""
    student, _ = load_student(student_path)
    wanted = list(steps)
    images: dict[int, list[np.ndarray]] = {count: [] for count in wanted}
    with progress("student", total=len(sources)) as advance:
        for index in range(len(sources)):
            source, pose = (torch.from_numpy(to_model(a[index : index + 1])) for a in (sources, skeletons))
            condition = student.condition(student.autoencoder.encode(source), pose)
            z = torch.from_numpy(noise[index : index + 1])
            for count in wanted:
                latent = student.sample(z, condition, count)
                images[count].append(from_model(student.autoencoder.decode(latent).numpy())[0])
            advance(index + 1)
    return {count: np.stack(stack) for count, stack in images.items()}
