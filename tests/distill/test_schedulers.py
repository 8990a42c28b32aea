"""diffusers' schedulers: what is read of them, and paths of their samplers, against theirs and against closed forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from distill.predictions import Adapted, Kind, Prediction
from distill.schedulers import read_scheduler, sampler_path
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.flow import solve, time_grid
from tests.distill.gaussian import CONFIGS, Gaussian, gaussian_flow

SAMPLERS = (
    *("sd", "sd-v", "sd-sample", "sd-zero-v", "sd-dpm", "sd-dpm-zero-v", "sd-unipc", "sd-deis", "sd-euler", "svd"),
    *("edm", "edm-v", "edm-solver", "sd3", "flux", "mochi", "wan", "wan-dpm", "wan-sample"),
)


def noise(count: int = 64) -> Tensor:
    return torch.randn(count, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def prepared(name: str, steps: int, **more: Any) -> Any:
    """The scheduler of a config, with steps."""
    config = CONFIGS[name] | more
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps, **({"mu": 1.15} if "use_dynamic_shifting" in config else {}))
    return scheduler


def adapted(name: str) -> Adapted:
    return Adapted(Gaussian(name), *read_scheduler(CONFIGS[name]))


def loop(network: Callable[[Tensor, Tensor], Tensor], scheduler: Any, x: Tensor) -> Tensor:
    """What a pipeline of diffusers does."""
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for tau in scheduler.timesteps:
        given = scheduler.scale_model_input(x, tau) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(given, tau.expand(len(x))), tau, x, return_dict=False)[0]
    return x


def mixture(x: Tensor, tau: Tensor) -> Tensor:
    """The exact ε of Stable Diffusion's schedule for data that is 0.8 or -0.8, ± 0.3: paths that curve."""
    squares = prepared("sd", 1).alphas_cumprod.double()
    at = torch.arange(len(squares), dtype=torch.float64)
    given = tau.double().view(-1, 1, 1, 1)
    alpha = torch.from_numpy(np.interp(given, at, squares.sqrt()))
    sigma = (1 - alpha**2).sqrt()
    spread = (0.3 * alpha) ** 2 + sigma**2
    centre = 0.8 * torch.tanh(0.8 * alpha * x / spread)
    image = centre + 0.09 * alpha / spread * (x - alpha * centre)
    return (x - alpha * image) / sigma


def psnr(a: Tensor, b: Tensor) -> float:
    """In a range of 2."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_last_state_is_the_samplers_result_and_the_first_are_the_noise(name: str) -> None:
    scheduler, network = prepared(name, 10), Gaussian(name)
    t_first, start = adapted(name).t_first, adapted(name).start(noise())
    first, begin, last = sampler_path(network, scheduler, noise(), [0.0, t_first, 1.0])
    again = sampler_path(network, scheduler, noise(), [1.0])[0]
    expected = loop(network, scheduler, noise())  # the same object: it was left as it was
    torch.testing.assert_close(last, expected)
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(first, noise(), atol=2e-4, rtol=2e-4)  # a schedule that ends at α = 2⁻¹² begins there
    torch.testing.assert_close(begin, start, atol=1e-2 if "euler" in name else 1e-4, rtol=0)  # Euler: σ z


@pytest.mark.parametrize("name", SAMPLERS)
def test_its_states_follow_the_exact_flow(name: str) -> None:
    scheduler, network = prepared(name, 500), adapted(name)
    times = np.linspace(max(0.07, network.t_first), 1, 21).tolist()
    states = sampler_path(network.network, scheduler, noise(), times)
    for t, state in zip(times, states, strict=True):
        torch.testing.assert_close(state, gaussian_flow(states[0], times[0], t), atol=2e-2, rtol=0, msg=f"t = {t}")


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_ddim_is_eulers_method_on_the_adapted_velocity_so_its_states_lie_on_straight_lines(
    kind: Kind, steps: int
) -> None:
    name = {"epsilon": "sd", "sample": "sd-sample", "v_prediction": "sd-v"}[kind]
    scheduler, network = prepared(name, steps, timestep_spacing="trailing"), adapted(name)
    schedule, _ = read_scheduler(scheduler)
    times = [float(schedule.t[len(schedule.t) - 1 - int(tau)]) for tau in scheduler.timesteps] + [1.0]
    euler = solve(network, network.start(noise()), times, "euler")
    path = sampler_path(network.network, scheduler, noise(), times)
    for got, expected in zip(path, euler, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    halfway = [(a + b) / 2 for a, b in pairwise(times)]
    for k, got in enumerate(sampler_path(network.network, scheduler, noise(), halfway)):
        torch.testing.assert_close(got, (euler[k] + euler[k + 1]) / 2, atol=1e-5, rtol=1e-5)


def test_many_steps_of_ddim_and_of_heun_on_the_velocity_arrive_at_the_same() -> None:
    schedule, prediction = read_scheduler(CONFIGS["sd"])

    class Mixture(torch.nn.Module):
        def forward(self, x: Tensor, tau: Tensor) -> Tensor:
            return mixture(x, tau)

    network = Adapted(Mixture(), schedule, prediction)
    grid = np.linspace(network.t_first, 1, 1001).tolist()
    heun = solve(network, network.start(noise()), grid, "heun")[-1]
    found = []
    for steps in (10, 100, 1000):
        scheduler = prepared("sd", steps, timestep_spacing="trailing")
        ddim = sampler_path(mixture, scheduler, noise(), [1.0])[0]
        assert psnr(ddim, loop(mixture, scheduler, noise())) > 50
        found.append(psnr(ddim, heun))
    assert found[0] < found[1] < found[2]
    assert found[2] > 50


def test_where_a_path_begins_decides() -> None:
    """Eight uniform steps from t = 0 find the teacher's own sample worse than eight from its first time."""
    network = adapted("sd")
    expected = sampler_path(network.network, prepared("sd", 500, timestep_spacing="trailing"), noise(), [1.0])[0]
    from_zero = solve(network, noise(), time_grid(8), "heun")[-1]
    from_first = solve(network, network.start(noise()), np.linspace(network.t_first, 1, 9).tolist(), "heun")[-1]
    assert psnr(from_first, expected) > psnr(from_zero, expected) + 3


def test_a_learnt_variance_is_dropped_before_the_sampler_sees_it() -> None:
    network, x = Gaussian("sd-dpm"), torch.cat([noise(), 1 - noise()], 1)  # more channels than a picture has

    def both(x: Tensor, tau: Tensor) -> Tensor:
        return torch.cat([network(x, tau), torch.ones_like(x)], 1)

    got = sampler_path(both, prepared("sd-dpm", 5, variance_type="learned_range"), x, [1.0])[0]
    torch.testing.assert_close(got, loop(network, prepared("sd-dpm", 5), x))


@pytest.mark.parametrize(
    ("name", "prediction", "first", "t_first", "t_last"),
    [
        ("sd", Prediction("epsilon"), 999, 0.06404, 0.97166),
        ("sd-zero-v", Prediction("v_prediction"), 999, 0, 0.97166),
        ("sd-dpm-zero-v", Prediction("v_prediction"), 999, 0.000244, 0.97166),
        ("trained", Prediction("epsilon"), 499, None, None),
        ("svd", Prediction("v_prediction"), np.log(700) / 4, 1 / 701, 1 / 1.002),
        ("edm", Prediction("edm", 0.5), np.log(80) / 4, 1 / 81, 1 / 1.002),
        ("edm-v", Prediction("v_prediction", 1.0), np.log(80) / 4, 1 / 81, 1 / 1.002),
        ("sd3", Prediction("flow_prediction"), 1000, 0, 1),
        ("flux", Prediction("flow_prediction"), 1000, 0, 1),
        ("mochi", Prediction("velocity"), 0, 0, 1),
        ("wan", Prediction("flow_prediction"), 1000, 0, 1),
    ],
)
def test_what_is_read(
    name: str, prediction: Prediction, first: float, t_first: float | None, t_last: float | None, tmp_path: Path
) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps(CONFIGS[name]))
    for source in (CONFIGS[name], tmp_path, str(tmp_path), prepared(name, 3)):
        schedule, found = read_scheduler(source)
        assert found == prediction
        assert schedule.times[0] == pytest.approx(first)
        if t_first is not None:
            assert schedule.t[[0, -1]] == pytest.approx([t_first, t_last], abs=1e-5)


def test_what_the_sampler_leaves_out_is_left_out() -> None:
    config = {**CONFIGS["sd-dpm"], "beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}
    schedule, _ = read_scheduler(config)
    assert schedule.times[0] < 999
    assert schedule.t[0] == pytest.approx(1 / (1 + np.exp(5.1)), rel=0.05)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"beta_start": 0.1}, "_class_name 'None' of a scheduler: expected one of"),
        ({"_class_name": "LCMScheduler"}, "_class_name 'LCM'"),
        ({**CONFIGS["sd"], "prediction_type": "eps"}, "prediction_type 'eps' of a scheduler: expected one of epsilon"),
        ({**CONFIGS["sd"], "beta_schedule": "cosine"}, "beta_schedule 'cosine'"),
        ({**CONFIGS["sd"], "predicton_type": "sample"}, "'predicton_type' of a DDIMScheduler: expected one of"),
        ({**CONFIGS["sd"], "beta_start": "small"}, "refuses its config"),
        ({**CONFIGS["sd"], "beta_schedule": "sigmoid"}, "refuses its config"),
        ({**CONFIGS["edm"], "prediction_type": "sample"}, "prediction_type 'sample'"),
        ({**CONFIGS["edm"], "sigma_schedule": "linear"}, "sigma_schedule 'linear'"),
        ({**CONFIGS["sd-dpm"], "prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ("missing", "scheduler_config.json cannot be read"),
        (diffusers.LCMScheduler(), "_class_name 'LCM'"),
    ],
)
def test_configs_that_are_not_understood(config: Any, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_scheduler(config)
    assert found in str(caught.value)


@pytest.mark.parametrize(
    ("scheduler", "found"),
    [
        (diffusers.DDIMScheduler(), "a DDIMScheduler without steps"),
        (diffusers.DDPMScheduler(), "DDPMScheduler, which has no simple path"),
        (diffusers.PNDMScheduler(), "PNDMScheduler, which has no simple path"),
        (diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "draws noise"),
        (diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "draws noise"),
    ],
)
def test_samplers_without_a_path(scheduler: Any, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sampler_path(Gaussian("sd"), scheduler, noise(), [1.0])
    assert found in str(caught.value)


def test_a_result_with_nan_is_refused() -> None:
    with pytest.raises(ConfigError, match="the DDIMScheduler's result is not finite"):
        sampler_path(Gaussian("sd-zero"), prepared("sd-zero", 5), noise(), [1.0])
