"""What each distillation method regresses: one function per method, all returning the same ``Target``.

Every target comes from stored states of the teacher's guided path, so none needs the teacher, a derivative or a
bootstrap. The closed-form flow of a Gaussian satisfies all of them exactly, which is how they are tested.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_STEPS_LOG2 = 3  # flow maps of 1, 2, 4 and 8 steps
STEP_ODDS = (0.4, 0.25, 0.2, 0.15)  # of drawing 1, 2, 4, 8 steps: few steps are the hardest
U_SHAPE = 4.0


@dataclass(frozen=True, slots=True)
class Target:
    """Regress ``u(x, t, d) → velocity``: x (B, C, h, w), t and d (B,)."""

    x: Tensor
    t: Tensor
    d: Tensor
    velocity: Tensor


def reflow(states: Tensor, rng: np.random.Generator) -> Target:
    """Rectified flow on the teacher's pairs, with the U-shaped times of 2-RF++ (arXiv 2405.20320).

    ``x_t = (1 - t) x_0 + t x_1``, velocity ``x_1 - x_0``; times crowd at both ends, density ∝ e^{at} + e^{-at}, a = 4.
    """
    u, mirror = rng.random(len(states)), rng.random(len(states)) < 0.5
    t = -np.log(1 - u * (1 - math.exp(-U_SHAPE))) / U_SHAPE
    t = torch.from_numpy(np.clip(np.where(mirror, 1 - t, t), 1e-5, 1 - 1e-5)).to(states)
    x_0, x_1 = states[:, 0], states[:, -1]
    time = t.view(-1, 1, 1, 1)
    return Target((1 - time) * x_0 + time * x_1, t, torch.zeros_like(t), x_1 - x_0)


def flowmap(states: Tensor, rng: np.random.Generator, steps: int | None = None) -> Target:
    """Average velocity between stored states of one path: ``(x_{t+d} - x_t) / d`` with d in {1, 1/2, 1/4, 1/8}, or with
    d = 1 / ``steps`` alone."""
    grid = states.shape[1] - 1
    some = rng.choice(MAX_STEPS_LOG2 + 1, size=len(states), p=STEP_ODDS)
    counts = 2**some if steps is None else np.full(len(states), steps)
    start = (rng.random(len(states)) * counts).astype(np.int64) * grid // counts
    return segment(states, start, start + grid // counts)


def segment(states: Tensor, start: np.ndarray, stop: np.ndarray) -> Target:
    """The average velocity of each path between its grid indices ``start`` and ``stop`` (B,)."""
    grid, rows = states.shape[1] - 1, torch.arange(len(states), device=states.device)
    x, x_next = (states[rows, torch.from_numpy(index).to(states.device)] for index in (start, stop))
    t = torch.from_numpy(start / grid).to(states)
    d = torch.from_numpy((stop - start) / grid).to(states)
    return Target(x, t, d, (x_next - x) / d.view(-1, 1, 1, 1))


def endpoint(states: Tensor, steps: int) -> list[Tensor]:
    """The states that an unrolled student of ``steps`` steps must pass through: x at t = 0, 1/steps, …, 1."""
    grid = states.shape[1] - 1
    return [states[:, k * grid // steps] for k in range(steps + 1)]


def pseudo_huber(error: Tensor, c: float = 0.03) -> Tensor:
    """``mean_b( sqrt(mean(e²) + c²) - c )``: quadratic near zero, then linear (arXiv 2405.20320; c per element)."""
    return ((error.flatten(1).square().mean(1) + c**2).sqrt() - c).mean()
