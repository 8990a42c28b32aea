"""What teacher and student make of given pairs at given noise, in torch: the reference of every drift figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from distill.condition import Source, encoded
from distill.student import load_student
from distill.teacher import Teacher, load_teacher, move, pose_kind, sample_teacher
from rpfm_edge.core.flow import Solver
from rpfm_edge.core.progress import progress
from rpfm_edge.core.signature import PoseKind
from rpfm_edge.people.image import from_model, to_model
from rpfm_edge.people.pose import pose_input

REFERENCE_STEPS, REFERENCE_SOLVER = 8, "heun"  # what the trajectory store is solved with


def teacher_images(
    teacher_spec: str | Path | Teacher,
    sources: np.ndarray,
    source_poses: np.ndarray,
    poses: np.ndarray,
    noise: np.ndarray,
    budgets: Iterable[tuple[int, str]],
    batch: int = 1,
    precision: str = "fp32",
) -> dict[tuple[int, str], np.ndarray]:
    """The teacher's images for each (steps, solver).

    Args:
        sources: (n, H, W, 3) uint8.
        source_poses, poses: (n, 18, 2) pixels x, y, nan where missing: where the sources' joints are, and the poses
            that are asked for, drawn here if the teacher wants them drawn.
        noise: (n, C, h, w) float32.
        batch: pairs in the network at a time.
        precision: of the network, ``fp32`` or ``bf16``; latents and autoencoder stay in float32.

    Returns:
        (steps, solver) → (n, H, W, 3) uint8.
    """
    teacher = load_teacher(teacher_spec) if isinstance(teacher_spec, str | Path) else teacher_spec
    move(teacher, PartialState().device)

    def latent(noise: Tensor, condition: Any, budget: tuple[int, str]) -> Tensor:
        return sample_teacher(teacher, noise, condition, budget[0], cast(Solver, budget[1]))[-1]

    pairs = _batches(_Pairs(sources, source_poses, poses, noise), "teacher", pose_kind(teacher), batch)
    return _images(teacher, pairs, list(budgets), latent, precision)


def student_images(
    student_path: str | Path,
    sources: np.ndarray,
    source_poses: np.ndarray,
    poses: np.ndarray,
    noise: np.ndarray,
    steps: Iterable[int],
    batch: int = 1,
    precision: str = "fp32",
) -> dict[int, np.ndarray]:
    """A student's images in torch for each number of steps; arguments and results as ``teacher_images``."""
    student, _ = load_student(student_path)
    student.to(PartialState().device)
    kind = student.network.pose_kind
    pairs = _batches(_Pairs(sources, source_poses, poses, noise), "student", kind, batch)
    return _images(student, pairs, list(steps), student.sample, precision)


class _Pairs(NamedTuple):
    sources: np.ndarray
    source_poses: np.ndarray
    poses: np.ndarray
    noise: np.ndarray


def _batches(pairs: _Pairs, title: str, kind: PoseKind, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Sources, their joints, poses of a kind and noise as the networks want them, on their device."""
    device, size = PartialState().device, (pairs.sources.shape[1], pairs.sources.shape[2])
    with progress(title, total=len(pairs.sources)) as advance:
        for start in range(0, len(pairs.sources), batch):
            sources, joints, poses, noise = (array[start : start + batch] for array in pairs)
            pose = np.concatenate([pose_input(one, kind, size) for one in poses])
            drawn = to_model(pose) if kind == "skeleton" else pose
            arrays = (to_model(sources), np.asarray(joints, np.float32), drawn, noise)
            source, joint, posed, start_noise = (torch.from_numpy(array).to(device) for array in arrays)
            yield source, joint, posed, start_noise
            advance(start + len(sources))


@torch.no_grad()
def _images(
    model: Any,
    batches: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]],
    wanted: list[Any],
    latent: Callable[[Tensor, Any, Any], Tensor],
    precision: str,
) -> dict[Any, np.ndarray]:
    """Budget → images: what ``latent(noise, condition, budget)`` is when it is decoded."""
    images: dict[Any, list[np.ndarray]] = {budget: [] for budget in wanted}
    for pixels, joints, pose, noise in batches:
        source: Source = encoded(model.autoencoder, pixels, joints)
        with torch.autocast(noise.device.type, torch.bfloat16, enabled=precision == "bf16"):
            condition = model.condition(source, pose)
            ends = {budget: latent(noise, condition, budget) for budget in wanted}
        tensors = condition if isinstance(condition, dict) else None  # a teacher of others may make anything
        for budget, end in ends.items():
            images[budget].append(from_model(model.autoencoder.decode(end.float(), tensors).cpu().numpy()))
    return {budget: np.concatenate(stack) for budget, stack in images.items()}
