"""Every target against the closed-form flow of a Gaussian: y ~ N(m, s²) per element, z ~ N(0, 1)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill import targets
from rpfm_edge.core.flow import interpolate, solve, target_velocity, time_grid

MEAN, DEVIATION, GRID = 0.7, 0.4, 8


def amplitude(t: torch.Tensor) -> torch.Tensor:
    """a(t): the standard deviation of x_t."""
    return ((1 - t) ** 2 + (t * DEVIATION) ** 2).sqrt()


def flow_map(x: torch.Tensor, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """X_{t→s}(x) = s m + a(s)/a(t) (x - t m)."""
    return s * MEAN + amplitude(s) / amplitude(t) * (x - t * MEAN)


def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """The marginal velocity m + a'(t)/a(t) (x - t m)."""
    time = torch.tensor(t, dtype=torch.float64)
    slope = (time * DEVIATION**2 - (1 - time)) / amplitude(time)
    return MEAN + slope / amplitude(time) * (x - time * MEAN)


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    """512 exact paths on the stored grid, float64."""
    noise = torch.randn(512, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack(
        [flow_map(noise, zero, torch.tensor(k / GRID, dtype=torch.float64)) for k in range(GRID + 1)], dim=1
    )


def test_solver_reaches_the_closed_form(states: torch.Tensor) -> None:
    end = solve(velocity, states[:, 0], time_grid(1024), "heun")[-1]
    torch.testing.assert_close(end, states[:, -1], atol=1e-5, rtol=0)


def test_flowmap_target_is_the_average_velocity_of_the_exact_flow(states: torch.Tensor) -> None:
    target = targets.flowmap(states, np.random.default_rng(0))
    t, d = (v.view(-1, 1, 1, 1) for v in (target.t, target.d))
    torch.testing.assert_close(target.x + d * target.velocity, flow_map(target.x, t, t + d), atol=1e-12, rtol=0)
    assert set(target.d.tolist()) == {1.0, 0.5, 0.25, 0.125}
    assert (target.t % target.d == 0).all()


def test_flowmap_favours_few_steps(states: torch.Tensor) -> None:
    many = states[torch.zeros(20000, dtype=torch.long), :, :1, :1, :1]
    drawn = targets.flowmap(many, np.random.default_rng(1)).d
    shares = [float((drawn == d).double().mean()) for d in (1.0, 0.5, 0.25, 0.125)]
    np.testing.assert_allclose(shares, targets.STEP_ODDS, atol=0.02)


def test_average_velocities_compose(states: torch.Tensor) -> None:
    """(s - t) u_ts = (m - t) u_tm + (s - m) u_ms after X_tm."""
    ends = np.full(len(states), 2), np.full(len(states), 6), np.full(len(states), 5)
    whole = targets.segment(states, ends[0], ends[1])
    first, second = targets.segment(states, ends[0], ends[2]), targets.segment(states, ends[2], ends[1])
    composed = (first.velocity * 3 + second.velocity * 1) / 4
    torch.testing.assert_close(whole.velocity, composed, atol=1e-12, rtol=0)


def test_short_segments_tend_to_the_velocity() -> None:
    fine = 64
    noise = torch.randn(8, 1, 2, 2, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    path = torch.stack(
        [flow_map(noise, zero, torch.tensor(k / fine, dtype=torch.float64)) for k in range(fine + 1)], dim=1
    )
    target = targets.segment(path, np.full(8, 31), np.full(8, 33))
    torch.testing.assert_close(target.velocity, velocity(path[:, 32], 0.5), atol=1e-3, rtol=0)


def test_reflow_target_is_the_chord_of_the_pair(states: torch.Tensor) -> None:
    target = targets.reflow(states, np.random.default_rng(0))
    t = target.t.view(-1, 1, 1, 1)
    torch.testing.assert_close(target.x - t * target.velocity, states[:, 0], atol=1e-12, rtol=0)
    torch.testing.assert_close(target.x + (1 - t) * target.velocity, states[:, -1], atol=1e-12, rtol=0)


def test_reflow_times_follow_the_u_shape() -> None:
    t = targets.reflow(torch.zeros(200_000, 2, 1, 1, 1), np.random.default_rng(0)).t.double().numpy()
    density, edges = np.histogram(t, bins=20, range=(0, 1), density=True)
    centre = (edges[:-1] + edges[1:]) / 2
    a = targets.U_SHAPE
    expected = a * (np.exp(a * (centre - 1)) + np.exp(-a * centre)) / (2 * (1 - np.exp(-a)))
    np.testing.assert_allclose(density, expected, rtol=0.06)


def test_endpoint_states_lie_on_the_path(states: torch.Tensor) -> None:
    wanted = targets.endpoint(states, 2)
    assert [w.shape for w in wanted] == [states[:, 0].shape] * 3
    half = torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(wanted[1], flow_map(wanted[0], torch.zeros_like(half), half), atol=1e-12, rtol=0)


def test_marginal_velocity_is_the_mean_of_the_conditional_one() -> None:
    """What flow matching regresses averages to the velocity that the solver follows: E[v | x_t] by linear
    regression."""
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(400_000, dtype=torch.float64, generator=generator) for _ in range(2))
    y = MEAN + DEVIATION * y
    t = 0.6
    x, v = interpolate(z, y, t), target_velocity(z, y)
    slope = ((x - x.mean()) * (v - v.mean())).mean() / x.var()
    exact = velocity(torch.tensor([0.0, 1.0], dtype=torch.float64), t)
    assert float(slope) == pytest.approx(float(exact[1] - exact[0]), abs=0.01)
    assert float(v.mean() - slope * x.mean()) == pytest.approx(float(exact[0]), abs=0.01)


def test_pseudo_huber_is_quadratic_then_linear() -> None:
    def loss(size: float) -> float:
        return float(targets.pseudo_huber(torch.full((3, 2, 2), size, dtype=torch.float64)))

    assert loss(1e-4) == pytest.approx(1e-8 / (2 * 0.03), rel=1e-3)
    assert loss(50.0) == pytest.approx(50.0 - 0.03, rel=1e-4)
