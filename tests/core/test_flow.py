"""Solvers against closed forms: order of convergence, the Gaussian flow, exact flow maps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from rpfm_edge.core import flow
from rpfm_edge.core.errors import ConfigError

ORDERS = {"euler": 1, "heun": 2}
MEAN, SPREAD, SIGMA_MIN = 1.5, 0.3, 0.1  # of the data, and of the path


def deviation(t: float) -> float:
    """Standard deviation of x_t when noise is N(0, 1) and data N(MEAN, SPREAD²)."""
    return math.hypot(1 - (1 - SIGMA_MIN) * t, t * SPREAD)


def gaussian_flow(x0: Any, t: float) -> Any:
    """The exact solution at t of the marginal flow from x0: an affine map, since all marginals are Gaussian."""
    return t * MEAN + deviation(t) * x0


def gaussian_velocity(x: Any, t: float) -> Any:
    """The marginal velocity ``E[v | x_t = x]``, by the regression of two jointly Gaussian variables."""
    covariance = t * SPREAD**2 - (1 - SIGMA_MIN) * (1 - (1 - SIGMA_MIN) * t)
    return MEAN + covariance / deviation(t) ** 2 * (x - t * MEAN)


@pytest.mark.parametrize("solver", list(flow.STEPPERS))
def test_order_of_convergence(solver: Any) -> None:
    exact = 2 * math.exp(math.sin(5) / 5)  # of dx/dt = x cos 5t, x(0) = 2
    errors = [
        abs(flow.solve(lambda x, t: x * math.cos(5 * t), 2.0, flow.time_grid(steps), solver)[-1] - exact)
        for steps in (256, 512, 1024)
    ]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[solver], abs=0.1)


@pytest.mark.parametrize("solver", list(flow.STEPPERS))
def test_gaussian_flow(solver: Any) -> None:
    x0, times = np.linspace(-3, 3, 13), flow.time_grid(200)
    states = flow.solve(gaussian_velocity, x0, times, solver)
    assert len(states) == len(times)
    for state, t in zip(states, times, strict=True):
        np.testing.assert_allclose(state, gaussian_flow(x0, t), atol=0.05 if solver == "euler" else 5e-4)


def test_path_has_the_marginals_and_the_velocity_of_the_gaussian_flow() -> None:
    rng = np.random.default_rng(0)
    noise, data = rng.standard_normal(400_000), MEAN + SPREAD * rng.standard_normal(400_000)
    for t in (0.0, 0.3, 0.7, 1.0):
        x = flow.interpolate(noise, data, t, SIGMA_MIN)
        slope, offset = np.polyfit(x, flow.target_velocity(noise, data, SIGMA_MIN), 1)
        assert x.mean() == pytest.approx(t * MEAN, abs=0.01)
        assert x.std() == pytest.approx(deviation(t), rel=0.01)
        assert offset == pytest.approx(gaussian_velocity(0.0, t), abs=0.02)
        assert slope == pytest.approx(gaussian_velocity(1.0, t) - gaussian_velocity(0.0, t), abs=0.02)


@pytest.mark.parametrize("sigma_min", [0.0, 0.1])
def test_target_velocity_is_the_slope_of_the_path(sigma_min: float) -> None:
    noise, data = np.random.default_rng(0).standard_normal((2, 5))
    start, end = (flow.interpolate(noise, data, t, sigma_min) for t in (0.0, 1.0))
    np.testing.assert_array_equal(start, noise)
    np.testing.assert_allclose(end, data + sigma_min * noise)
    np.testing.assert_allclose(end - start, flow.target_velocity(noise, data, sigma_min))


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_an_exact_flow_map_is_sampled_exactly(steps: int) -> None:
    x0 = np.linspace(-2, 2, 9)

    def average_velocity(x: Any, t: float, d: float) -> Any:
        start = (x - t * MEAN) / deviation(t)
        return (gaussian_flow(start, t + d) - x) / d

    np.testing.assert_allclose(flow.path(average_velocity, x0, steps)[-1], gaussian_flow(x0, 1.0), atol=1e-12)


@pytest.mark.parametrize("solver", list(flow.STEPPERS))
def test_evaluations_are_counted_right_and_lie_in_the_interval(solver: Any) -> None:
    calls: list[float] = []

    def velocity(x: float, t: float) -> float:
        calls.append(t)
        return x

    flow.solve(velocity, 1.0, flow.time_grid(3), solver)
    assert len(calls) == 3 * ORDERS[solver]  # none takes more than its order
    assert all(0 <= t <= 1 for t in calls)


@pytest.mark.parametrize("solver", list(flow.STEPPERS))
def test_times_need_not_be_equally_spaced(solver: Any) -> None:
    states = flow.solve(lambda x, t: 3.0, 1.0, [0.0, 0.1, 0.7, 1.0], solver)
    assert states == pytest.approx([1.0, 1.3, 3.1, 4.0])


def test_torch_tensors_give_what_numpy_arrays_give() -> None:
    torch = pytest.importorskip("torch")
    x0 = np.linspace(-2, 2, 9)
    for solver in flow.STEPPERS:
        one, other = (flow.solve(gaussian_velocity, x, flow.time_grid(5), solver) for x in (x0, torch.from_numpy(x0)))
        np.testing.assert_allclose(one[-1], other[-1].numpy(), rtol=1e-12)


def test_time_grid() -> None:
    assert flow.time_grid(4) == [0, 0.25, 0.5, 0.75, 1]
    assert flow.time_grid(3)[-1] == 1
    with pytest.raises(ConfigError, match="0 steps: expected at least 1"):
        flow.time_grid(0)


def test_unknown_solver() -> None:
    with pytest.raises(ConfigError, match=r"unknown solver 'rk4': expected one of \['euler', 'heun'\]"):
        flow.solve(lambda x, t: x, 0.0, [0, 1], "rk4")  # type: ignore[arg-type]


def test_guidance_schedules() -> None:
    times = np.linspace(0, 1, 101)
    assert {flow.guidance_scale(t, 2.5) for t in times} == {2.5}
    cosine = [flow.guidance_scale(t, 2.5, "power-cosine") for t in times]
    assert (cosine[0], cosine[-1]) == (1, 2.5)
    assert np.all(np.diff(cosine) >= 0)
    # as MDT writes it, with timesteps that count down from 1000 at noise
    assert cosine[40] == pytest.approx(1 + 1.5 * 0.5 * (1 - math.cos(math.pi * (1 - 600 / 1000) ** 0.01)))
    assert [flow.guidance_scale(t, 2.5, "interval") for t in (0.1, 0.2, 0.5, 0.8, 0.9)] == [1, 2.5, 2.5, 2.5, 1]
    with pytest.raises(ConfigError, match="unknown guidance schedule 'linear': expected constant, power-cosine or"):
        flow.guidance_scale(0.5, 2.5, "linear")
