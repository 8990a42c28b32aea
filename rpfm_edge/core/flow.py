"""Flow matching, said once: times, paths, guidance and solvers, over any array library.

Time runs from t = 0 (noise z) to t = 1 (image latent y). The conditional path of RPFM (arXiv 2505.03562) is
``x_t = (1 - (1 - sigma_min) t) z + t y`` with velocity ``v = y - (1 - sigma_min) z``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from rpfm_edge.core.errors import ConfigError

Array = Any  # numpy.ndarray or torch.Tensor: only + and * by scalars are used
Velocity = Callable[[Array, float], Array]
Solver = Literal["euler", "heun"]
MAP_STEPS = (1, 2, 4, 8)  # of a flow map


def time_grid(steps: int) -> list[float]:
    """``steps + 1`` equally spaced times from 0 to 1."""
    if steps < 1:
        raise ConfigError(f"{steps} steps", expected="at least 1", fix="give a positive number of steps")
    return [k / steps for k in range(steps + 1)]


def interpolate(noise: Array, data: Array, t: Array, sigma_min: float = 0.0) -> Array:
    """``x_t`` on the conditional path; ``t`` broadcasts against the arrays."""
    return (1 - (1 - sigma_min) * t) * noise + t * data


def target_velocity(noise: Array, data: Array, sigma_min: float = 0.0) -> Array:
    """The velocity of the conditional path, constant in t."""
    return data - (1 - sigma_min) * noise


def euler_step(velocity: Velocity, x: Array, t: float, h: float) -> Array:
    """First order: ``x + h v(x, t)``."""
    return x + h * velocity(x, t)


def heun_step(velocity: Velocity, x: Array, t: float, h: float) -> Array:
    """Second order: the mean of the velocities at both ends."""
    v = velocity(x, t)
    return x + 0.5 * h * (v + velocity(x + h * v, t + h))


STEPPERS: dict[str, Callable[[Velocity, Array, float, float], Array]] = {
    "euler": euler_step,
    "heun": heun_step,
}


def solve(velocity: Velocity, x: Array, times: Sequence[float], solver: Solver = "euler") -> list[Array]:
    """Integrate ``dx/dt = velocity(x, t)`` over ``times`` and return the state at each of them."""
    if solver not in STEPPERS:
        raise ConfigError(f"unknown solver {solver!r}", expected=f"one of {sorted(STEPPERS)}", fix="check the spelling")
    step = STEPPERS[solver]
    states = [x]
    for t, t_next in pairwise(times):
        states.append(step(velocity, states[-1], t, t_next - t))
    return states


def path(average_velocity: Callable[[Array, float, float], Array], noise: Array, steps: int) -> list[Array]:
    """Few-step sampling of a flow map, ``x += d u(x, t, d)``, one call per step: the states on the uniform grid."""
    states = [noise]
    for t in time_grid(steps)[:-1]:
        states.append(states[-1] + (1 / steps) * average_velocity(states[-1], t, 1 / steps))
    return states


def latent_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """(C, h, w) of what a student with this config moves."""
    network = config["network"]  # which alone tells it in older ones
    return tuple(config.get("latent_shape") or (network["latent_channels"], *network["latent_size"]))


def student_steps(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The numbers of steps that a student with this config has learnt; None: any.

    An endpoint student is made for one number, and so is a flow map that knows no step size; others are for the powers
    of two that divide the stored paths.
    """
    if config.get("fixed_steps"):
        return (int(config["steps"]),)
    return {"endpoint": (int(config["steps"]),), "flowmap": MAP_STEPS}.get(config["method"])


def check_steps(config: Mapping[str, Any], steps: int, where: str = "") -> None:
    """Raise ``ConfigError`` unless a student with this config has learnt to run with ``steps``."""
    allowed = student_steps(config)
    if allowed is not None and steps not in allowed:
        raise ConfigError(
            f"{where}steps = {steps} for a student that was distilled by {config['method']} for {config['steps']}",
            expected=" or ".join(map(str, allowed)),
            fix="choose one of them" if len(allowed) > 1 else "leave steps out, or distill another student",
        )


def guidance_scale(t: float, scale: float, schedule: str = "constant") -> float:
    """The scale w(t) of classifier-free guidance ``v = v_null + w (v_cond - v_null)``.

    Schedules: ``constant``; ``power-cosine``, X-MDPT's (arXiv 2402.01516, power 0.01) in our time direction, where the
    scale rises from 1 at noise; ``interval``, guidance for t in [0.2, 0.8] only (arXiv 2404.07724).
    """
    if schedule == "constant":
        return scale
    if schedule == "power-cosine":
        return 1 + (scale - 1) * (1 - math.cos(math.pi * t**0.01)) / 2
    if schedule == "interval":
        return scale if 0.2 <= t <= 0.8 else 1.0
    raise ConfigError(
        f"unknown guidance schedule {schedule!r}",
        expected="constant, power-cosine or interval",
        fix="check the spelling",
    )


def plural(steps: int) -> str:
    """``1 step``, ``4 steps``."""
    return f"{steps} step{'s' if steps > 1 else ''}"
