"""Networks that predict noise, images or velocities on schedules of their own, as velocities of our straight path.

A network knows times τ of its own: at τ it is given ``x = α x₀ + σ ε``. In our coordinates (``core.flow``: t = 0 noise,
t = 1 image) that is the state ``x_flow = x / (α + σ)`` at ``t = α / (α + σ)``, and its velocity is ``x̂₀ - ε̂``, whatever
the schedule. For every kind of prediction F the two divisions by α or σ cancel into

    velocity = a(t) x_flow + b(t) F((α + σ) x_flow, τ)

where only ε has a pole, at t = 0, and x₀ one, at t = 1. The estimates are ``x̂₀ = x_flow + (1 - t) velocity`` and
``ε̂ = x_flow - t velocity``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from rpfm_edge.core.errors import ConfigError

Kind = Literal["epsilon", "sample", "v_prediction", "edm", "flow_prediction", "velocity"]
NOISY_PROBES = (0.0, 0.001, 0.01, 0.03, 0.1)  # after the first time
LATE_PROBES = (0.5, 0.999, 1.0)
JUMP = 0.5  # of a velocity between two probes, relative: a smooth one changes by a tenth


@dataclass(frozen=True, eq=False)
class Schedule:
    """At its own time ``times[k]`` a network is given ``alphas[k] x₀ + sigmas[k] ε``.

    Between the nodes τ and α + σ are linear in t. A continuous schedule is a fine table:
    ``tau = np.linspace(0, np.pi / 2, 4096); Schedule(tau, np.cos(tau), np.sin(tau))``.

    Args:
        times: (n,) τ, n ≥ 2, from noise to image or back; kept from noise to image.
        alphas, sigmas: (n,), not negative, as the network's input is scaled: after a ``c_in``, if there is one.

    Raises:
        ConfigError: arrays that do not fit, or an α / σ that is not monotone.
    """

    times: np.ndarray
    alphas: np.ndarray
    sigmas: np.ndarray

    def __post_init__(self) -> None:
        arrays = times, alphas, sigmas = [
            np.asarray(array, np.float64) for array in (self.times, self.alphas, self.sigmas)
        ]
        fix = "give α and σ for each time of the network"
        if times.ndim != 1 or len(times) < 2 or not times.shape == alphas.shape == sigmas.shape:
            shapes = ", ".join(str(list(array.shape)) for array in arrays)
            raise ConfigError(f"a schedule of {shapes} times, α and σ", expected="each (n,), n ≥ 2", fix=fix)
        finite = all(np.isfinite(array).all() for array in arrays)
        if not finite or alphas.min() < 0 or sigmas.min() < 0 or not (alphas + sigmas).min() > 0:
            raise ConfigError("a schedule with α or σ below 0, both 0 or not finite", expected="α, σ ≥ 0", fix=fix)
        slope = np.diff((alphas / (alphas + sigmas)).astype(np.float32))  # that is how the network's copy tells them
        if not ((slope > 0).all() or (slope < 0).all()):
            at = times[1:][np.sign(slope) != np.sign(slope.sum())][0]
            raise ConfigError(f"α / σ stands or turns at τ = {at:g}", expected="one that rises or falls", fix=fix)
        for name, array in zip(("times", "alphas", "sigmas"), arrays, strict=True):
            object.__setattr__(self, name, array if slope[0] > 0 else array[::-1].copy())

    @property
    def scale(self) -> np.ndarray:
        """(n,) α + σ."""
        return self.alphas + self.sigmas

    @property
    def t(self) -> np.ndarray:
        """(n,) our times of the nodes, rising."""
        return self.alphas / self.scale

    def only(self, nodes: np.ndarray) -> Schedule:
        """The schedule of these ``nodes``, (n,) of bool."""
        return Schedule(self.times[nodes], self.alphas[nodes], self.sigmas[nodes])


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a network says of ``x = α x₀ + σ ε``.

    - ``epsilon``: ε
    - ``sample``: x₀
    - ``v_prediction``: α ε - σ x₀, or EDM's with c_out < 0, as diffusers has it
    - ``edm``: EDM's F with c_out > 0: x̂₀ = c_skip x + c_out F (arXiv 2206.00364)
    - ``flow_prediction``: ε - x₀, as SD3, Flux and Wan do
    - ``velocity``: x₀ - ε, as this kit does

    ``sigma_data`` is of EDM; 1 is a variance-preserving v.
    """

    kind: Kind
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            known = f"one of {', '.join(get_args(Kind))}"
            raise ConfigError(f"prediction {self.kind!r}", expected=known, fix="check the spelling")

    def coefficients(self, t: Any, scale: Any) -> tuple[Any, Any]:
        """a and b of the velocity at t where α + σ is ``scale``, for floats, arrays or tensors."""
        if self.kind == "epsilon":
            return 1 / t, -1 / t
        if self.kind == "sample":
            return -1 / (1 - t), 1 / (1 - t)
        if self.kind in ("v_prediction", "edm"):
            d = self.sigma_data
            square = (1 - t) ** 2 + (d * t) ** 2
            return (d * d * t - (1 - t)) / square, (d if self.kind == "edm" else -d) / (scale * square)
        return 0 * t, 0 * t + (1 if self.kind == "velocity" else -1)

    def usable(self, schedule: Schedule) -> Schedule:
        """Where the prediction says something of the image, or of the noise."""
        if self.kind == "epsilon" and schedule.alphas[0] == 0:
            return schedule.only(schedule.alphas > 0)
        if self.kind == "sample" and schedule.sigmas[-1] == 0:
            return schedule.only(schedule.sigmas > 0)
        return schedule


class Adapted(nn.Module):
    """The velocity of a network: ``Adapted(network, …)(x_flow, t, **tensors)`` → dx/dt in float32.

    Before the first and after the last time of the schedule, the velocity is that of this time. A student is the same
    adapter around a copy of the network: its weights then mean what they meant.

    Args:
        network: ``network(x, τ, **tensors)`` of x (B, C, …) and τ (B,) → (B, C, …), or (B, 2 C, …) with a learnt
            variance, which is dropped; or diffusers' output or a tuple that begins with it.
        fractional: between two times of a table the network gets a fraction, as diffusers' Euler gives it; else, for
            a network that looks its times up, it gets the nearer one as an integer, and the velocity is that of it.

    Attributes:
        t_first, t_last: our times of the schedule's ends. ``start(noise)`` is the state at ``t_first``: solve from it.
    """

    table: Tensor  # (3, n): t, τ, α + σ

    def __init__(self, network: nn.Module, schedule: Schedule, prediction: Prediction, fractional: bool = True) -> None:
        super().__init__()
        self.network, self.prediction, self.fractional = network, prediction, fractional
        self.schedule = nodes = prediction.usable(schedule)
        self._exact = np.stack([nodes.t, nodes.times, nodes.scale])
        self.t_first, self.t_last = float(nodes.t[0]), float(nodes.t[-1])
        self.register_buffer("table", torch.from_numpy(self._exact).float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapted:
        table = self.table
        super()._apply(fn, recurse)
        self.table = table.to(self.table.device)  # half precision could not tell its times apart
        return self

    def start(self, noise: Tensor) -> Tensor:
        """The state at ``t_first`` for noise of variance 1, where a sampler of this schedule begins."""
        return noise * float(np.hypot(self.t_first, 1 - self.t_first))

    def forward(self, x: Tensor, t: Tensor | float, **tensors: Any) -> Tensor:
        """x (B, C, …), t a float, which leaves constants in a graph, or (B,)."""
        if isinstance(t, Tensor):
            t, tau, scale = self._look_up(t.float().reshape(-1).expand(len(x)))
            shape = (-1, *[1] * (x.ndim - 1))
            t, scale = t.view(shape), scale.view(shape)
        else:
            t, at, scale = self._exact_at(t)
            tau = torch.full((len(x),), at, device=x.device)
        a, b = self.prediction.coefficients(t, scale)
        output = self.network((x * scale).to(x.dtype), tau if self.fractional else tau.long(), **tensors)
        output = b * image_part(output if isinstance(output, Tensor) else output[0], x.shape[1])
        return output if self.prediction.kind in ("flow_prediction", "velocity") else a * x + output

    def _exact_at(self, t: float) -> tuple[float, float, float]:
        """t within the schedule, τ and α + σ, in double precision."""
        at, times, scale = self._exact
        if not self.fractional:
            k = int(np.abs(at - t).argmin())
            return float(at[k]), float(times[k]), float(scale[k])
        t = min(max(t, self.t_first), self.t_last)
        return t, float(np.interp(t, at, times)), float(np.interp(t, at, scale))

    def _look_up(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for t (B,)."""
        at = self.table[0]
        t = t.clamp(self.t_first, self.t_last)
        left = (t[:, None] >= at[1:-1]).sum(1)  # searchsorted has no ONNX
        low, high = self.table[:, left], self.table[:, left + 1]
        weight = (t - low[0]) / (high[0] - low[0])
        if not self.fractional:
            weight = (weight > 0.5).float()
        t, tau, scale = (low + weight * (high - low)).unbind()
        return t, tau, scale


def image_part(output: Tensor, channels: int) -> Tensor:
    """A network's output without its second half, if that is a learnt variance."""
    if output.ndim < 2 or output.shape[1] not in (channels, 2 * channels):
        raise ConfigError(
            f"a network's output {list(output.shape)} for {channels} channels",
            expected=f"{channels} channels, or {2 * channels} with a learnt variance",
            fix="return the prediction's tensor",
        )
    return output if output.shape[1] == channels else output[:, :channels]


@torch.no_grad()
def check_ends(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, t_first: float = 0.0) -> None:
    """Refuse a velocity that is not finite or explodes or jumps near the noise, before anything is made of it.

    Args:
        velocity: with its condition: (B, C, …) at a float t, from ``t_first`` to 1.
        noise: (B, C, …), of variance 1.
        t_first: where its paths begin.

    Raises:
        ConfigError: naming the time.
    """
    fix = "let predictions.Adapted begin at the first time that the network learnt, or give its sampler's path"
    probes, found = [t_first + step for step in NOISY_PROBES], []
    for t in (*probes, *LATE_PROBES):
        found.append(velocity(float(np.hypot(t, 1 - t)) * noise, t).float())
        if not found[-1].isfinite().all():
            problem = f"the velocity at t = {t:g} is not finite"
            raise ConfigError(problem, expected="numbers from noise to image", fix=fix)
    for k in range(1, len(probes)):
        before, after = found[k - 1 : k + 1]
        # A schedule of guidance may set in at the first time: there only the size must not change.
        step = (after - before).norm() if k > 1 else (after.norm() - before.norm()).abs()
        change = float(step / torch.maximum(after.norm(), before.norm()).clamp_min(1e-12))
        if change > JUMP:
            problem = f"the velocity changes by {change:.0%} from t = {probes[k - 1]:g} to {probes[k]:g}"
            raise ConfigError(problem, expected="one that is continuous at the noise", fix=fix)
