"""Predictions of every kind as velocities, against the flow of a Gaussian, which is known in closed form."""

from __future__ import annotations

import copy
import io
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from distill.condition import Source
from distill.graphs import simplified
from distill.predictions import Adapted, Prediction, Schedule, check_ends
from distill.schedulers import read_scheduler, sampler_path
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.flow import solve
from rpfm_edge.core.signature import Signature, TensorSpec
from tests.distill.gaussian import CONFIGS, MEAN, STD, Gaussian, gaussian_flow, gaussian_velocity
from tests.distill.tiny import toy_teacher

CURVE = np.linspace(0, np.pi / 2, 4096)
STRAIGHT = Schedule(np.array([0.0, 1.0]), np.array([0.0, 1.0]), np.array([1.0, 0.0]))
Function = Callable[[Tensor, float], Tensor]


class Returning(nn.Module):
    """A network that returns what a function makes of x and τ."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, tau: Tensor) -> Any:
        return self.function(x, tau)


class Small(nn.Module):
    """A convolution, and sines of τ as U-Nets have them."""

    def __init__(self, channels: int = 4, learned: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(channels, 16, 3, padding=1)
            self.time, self.last = nn.Linear(16, 16), nn.Conv2d(16, channels * (1 + learned), 3, padding=1)
            self.register_buffer("frequencies", torch.logspace(0, -4, 8))

    def forward(self, x: Tensor, tau: Tensor, bias: Tensor) -> Tensor:
        angles = tau[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype))[:, :, None, None]
        return self.last(torch.tanh(self.convolution(x) + time) + bias)


def adapted(name: str, **options: Any) -> Adapted:
    """The exact network of a config, as a velocity."""
    return Adapted(Gaussian(name), *read_scheduler(CONFIGS[name]), **options)


def states(t: float, count: int = 64) -> Tensor:
    """(count, 2, 1, 1) on the path at t, in double precision."""
    noise, data = torch.randn(2, count, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return t * (MEAN + STD * data) + (1 - t) * noise


def message(schedule: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        schedule()
    return str(caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_exact_prediction_gives_the_exact_velocity_at_the_times_of_the_network(name: str) -> None:
    schedule, prediction = read_scheduler(CONFIGS[name])
    network, at = adapted(name), prediction.usable(schedule).t
    for t in [*at[:: len(at) // 40], at[-1]]:
        torch.testing.assert_close(
            network(states(t), float(t)), gaussian_velocity(states(t), t), atol=1e-5, rtol=1e-5, msg=f"t = {t}"
        )


@pytest.mark.parametrize("name", ["sd", "sd-v", "sd-sample", "cosine", "sd3", "svd", "edm"])
def test_between_them_it_is_near(name: str) -> None:
    network = adapted(name)
    for t in np.linspace(max(network.t_first, 0.03), network.t_last, 38)[1:-1]:
        torch.testing.assert_close(network(states(t), float(t)), gaussian_velocity(states(t), t), atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("name", ["sd", "sd-v", "sd-sample"])
def test_a_network_that_looks_its_times_up_gets_integers_and_is_near_too(name: str) -> None:
    network, seen = adapted(name, fractional=False), []
    network.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    for t in np.linspace(network.t_first, network.t_last, 38):
        velocity = network(states(t), float(t))
        torch.testing.assert_close(velocity, gaussian_velocity(states(t), t), atol=5e-2, rtol=1e-2)
        torch.testing.assert_close(network(states(t), torch.tensor([t])), velocity, atol=1e-4, rtol=1e-3)
    assert {tau.dtype for tau in seen} == {torch.int64}
    assert (int(seen[0][0]), int(seen[-1][0])) == (999, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tensor_of_times_gives_what_each_of_them_gives(name: str) -> None:
    network = adapted(name)
    times = torch.linspace(max(network.t_first, 0.02), network.t_last - 0.01, 9)
    x = torch.cat([states(float(t), 1) for t in times]).float()
    each = torch.cat([network(x[k : k + 1], float(t)) for k, t in enumerate(times)])
    torch.testing.assert_close(network(x, times), each, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_but_numbers_from_noise_to_image(name: str) -> None:
    network = adapted(name)
    for t in (0.0, network.t_first, 1e-4, 0.999, network.t_last, 1.0):
        x = states(t).float()
        assert network(x, t).isfinite().all()
        assert network(x, torch.tensor(t)).isfinite().all()


@pytest.mark.parametrize("name", ["sd", "sd-sample", "sd-zero-v", "ddpm-learned", "edm", "svd", "flux", "mochi"])
def test_solved_from_its_start_it_arrives_where_the_exact_flow_does(name: str) -> None:
    network = adapted(name)
    noise = torch.randn(2000, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    begin = network.start(noise)
    middle = np.linspace(network.t_first, 1, 201)
    end = solve(network, begin, middle.tolist(), "heun")[-1]
    torch.testing.assert_close(end, gaussian_flow(begin, network.t_first, 1.0), atol=2e-2, rtol=1e-2)
    assert float(end.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(end.std()) == pytest.approx(STD, abs=0.05)


def test_times_go_round() -> None:
    for config in CONFIGS.values():
        schedule, _ = read_scheduler(config)
        assert (np.diff(schedule.t) > 0).all()
        np.testing.assert_allclose(schedule.t * schedule.scale, schedule.alphas)
        np.testing.assert_allclose((1 - schedule.t) * schedule.scale, schedule.sigmas, atol=1e-15)
        seen: list[Tensor] = []
        network = Adapted(Returning(lambda x, tau, seen=seen: seen.append(tau) or x), schedule, Prediction("velocity"))
        for k in range(0, len(schedule.t), 97):
            x = torch.zeros(1, 1, 1, 1)
            network(x, float(schedule.t[k]))
            assert float(seen[-1]) == pytest.approx(schedule.times[k], rel=1e-6, abs=1e-6)


def test_a_schedule_of_functions_is_a_fine_table_of_them() -> None:
    schedule = Schedule(CURVE, np.cos(CURVE), np.sin(CURVE))

    def v(x: Tensor, tau: Tensor) -> Tensor:  # the exact one
        alpha, sigma = (f(tau).view(-1, 1, 1, 1) for f in (torch.cos, torch.sin))
        spread = (alpha * STD) ** 2 + sigma**2
        image = MEAN + STD**2 * alpha / spread * (x - alpha * MEAN)
        return alpha * sigma / spread * (x - alpha * MEAN) - sigma * image

    network = Adapted(Returning(v), schedule, Prediction("v_prediction"))
    for t in np.linspace(0, 1, 33):
        torch.testing.assert_close(network(states(t), float(t)), gaussian_velocity(states(t), t), atol=1e-5, rtol=1e-5)


def test_an_unscaled_network_of_noise_is_a_schedule_too() -> None:
    levels = np.geomspace(0.01, 50, 4096)
    schedule = Schedule(levels, np.ones(4096), levels)

    def noise(x: Tensor, tau: Tensor) -> Tensor:
        sigma = tau.double().view(-1, 1, 1, 1)
        return sigma / (STD**2 + sigma**2) * (x - MEAN)

    network = Adapted(Returning(noise), schedule, Prediction("epsilon"))
    for t in np.linspace(network.t_first, network.t_last, 33):
        torch.testing.assert_close(network(states(t), float(t)), gaussian_velocity(states(t), t), atol=2e-5, rtol=2e-5)
    assert float(network.start(torch.ones(1))) == pytest.approx(50 / 51, rel=1e-3)


def test_outputs_with_a_variance_tuples_and_other_shapes() -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for output in (x, torch.cat([x, 9 * x], 1), (x, "more")):
        network = Adapted(Returning(lambda x, tau, output=output: output), STRAIGHT, Prediction("velocity"))
        assert torch.equal(network(x, 0.3), x)
    network = Adapted(Returning(lambda x, tau: x[:, :2]), STRAIGHT, Prediction("velocity"))
    assert "output [2, 2, 4, 4] for 3 channels" in message(lambda: network(x, 0.3))


def test_a_student_is_the_same_adapter_around_a_copy_and_half_precision_keeps_its_times() -> None:
    network = Adapted(Small(), *read_scheduler(CONFIGS["ddpm-learned"]))
    student, x, bias = copy.deepcopy(network), torch.randn(2, 4, 5, 3), torch.zeros(2, 16, 1, 1)
    assert torch.equal(student(x, 0.4, bias=bias), network(x, 0.4, bias=bias))
    assert set(student.state_dict()) == {f"network.{name}" for name in Small().state_dict()}
    student.bfloat16()
    assert student.table.dtype == torch.float32
    assert torch.equal(student.table, network.table)
    got = student(x.bfloat16(), torch.tensor([0.4, 0.41]), bias=bias.bfloat16())
    assert got.dtype == torch.float32
    assert not torch.equal(got, student(x.bfloat16(), torch.tensor([0.4, 0.4]), bias=bias.bfloat16()))


# Export --------------------------------------------------------------------------------------------------------------


class At(nn.Module):
    """The velocity at a fixed time, as a frame unrolls it."""

    def __init__(self, network: Adapted, t: float, tensor: bool) -> None:
        super().__init__()
        self.network, self.t, self.tensor = network, t, tensor

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.network(x, x.new_full((len(x),), self.t) if self.tensor else self.t, bias=bias)


class Timed(nn.Module):
    """The velocity with its time as an input."""

    def __init__(self, network: Adapted) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, bias: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t, bias=bias)


class Plain(nn.Module):
    """The network alone at a fixed τ, to count nodes by."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.network(x, x.new_full((len(x),), 300.0), bias=bias)


EXPORTED = ("sd", "sd-zero-v", "sd-sample", "svd", "edm", "sd3", "ddpm-learned")
BOUNDARY = Signature(
    (TensorSpec("x", (1, 4, 6, 5), "float32"), TensorSpec("bias", (1, 16, 1, 1), "float32")),
    (TensorSpec("velocity", (1, 4, 6, 5), "float32"),),
)


def feeds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {spec.name: rng.standard_normal(spec.shape, dtype=np.float32) for spec in BOUNDARY.inputs}


def run(model: bytes, given: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip((one.name for one in session.get_inputs()), given.values(), strict=True)))[0]


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("tensor", [False, True])
def test_the_graph_of_a_fixed_time_holds_constants(name: str, tensor: bool) -> None:
    network = Adapted(Small(learned="learned" in name), *read_scheduler(CONFIGS[name]))
    model = simplified(At(network, 0.37, tensor), BOUNDARY)
    plain = simplified(Plain(network.network), BOUNDARY)
    given = feeds()
    expected = network(torch.from_numpy(given["x"]), 0.37, bias=torch.from_numpy(given["bias"]))
    np.testing.assert_allclose(run(model.SerializeToString(), given), expected.detach().numpy(), atol=1e-4)
    added = Counter(node.op_type for node in model.graph.node) - Counter(node.op_type for node in plain.graph.node)
    added.pop("Constant", None)
    assert added <= Counter(Mul=3, Add=1, Slice="learned" in name, Sub=1), added  # c x, a x + b F, the dropped half


def test_a_unet_of_diffusers_and_its_graph() -> None:
    """As it is: its output, its times, its condition by name; two steps of it in one graph."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            mid_block_type=None,
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=8,
            norm_num_groups=4,
        )
    scheduler = diffusers.DDIMScheduler.from_config({**CONFIGS["sd-zero-v"], "timestep_spacing": "trailing"})
    scheduler.set_timesteps(2)
    network = Adapted(unet.eval().requires_grad_(False), *read_scheduler(scheduler))

    class Frame(nn.Module):
        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            for t, t_next in pairwise(times):
                x = x + (t_next - t) * network(x, t, encoder_hidden_states=tokens)
            return x

    schedule, _ = read_scheduler(scheduler)
    times = [float(schedule.t[schedule.times == float(tau)][0]) for tau in scheduler.timesteps] + [1.0]
    shapes = {"x": (1, 4, 8, 8), "tokens": (1, 3, 8)}
    boundary = Signature(
        tuple(TensorSpec(name, shape, "float32") for name, shape in shapes.items()),
        (TensorSpec("end", shapes["x"], "float32"),),
    )
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    x, tokens = (torch.from_numpy(array) for array in given.values())
    own = sampler_path(lambda x, tau: unet(x, tau, encoder_hidden_states=tokens)[0], scheduler, x, [1.0])[0]
    torch.testing.assert_close(Frame()(x, tokens), own, atol=1e-4, rtol=1e-4)
    model = simplified(Frame(), boundary)
    np.testing.assert_allclose(run(model.SerializeToString(), given), own.numpy(), atol=1e-4)
    assert not {"Sin", "Cos", "GreaterOrEqual", "Less", "Gather"} & {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("dynamo", [False, True])
def test_the_graph_of_a_time_that_is_an_input(name: str, dynamo: bool) -> None:
    module = Timed(Adapted(Small(learned="learned" in name), *read_scheduler(CONFIGS[name]))).eval()
    given, stream = feeds() | {"t": np.array([0.37], np.float32)}, io.BytesIO()
    inputs = tuple(torch.from_numpy(array) for array in given.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, inputs, None if dynamo else stream, opset_version=20, dynamo=dynamo, verbose=False
        )
    model = program.model_proto.SerializeToString() if dynamo else stream.getvalue()
    for t in (0.0, 0.123, 0.9, 1.0):
        given["t"] = np.array([t], np.float32)
        expected = module(*(torch.from_numpy(array) for array in given.values())).detach().numpy()
        np.testing.assert_allclose(run(model, given), expected, atol=1e-4, rtol=1e-4)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_adapted_networks_pass_the_check_from_their_first_time(name: str) -> None:
    network = adapted(name)
    check_ends(network, torch.randn(64, 2, 1, 1, generator=torch.Generator().manual_seed(0)), network.t_first)


def test_so_does_this_kits_own_teacher_whose_guidance_sets_in_at_zero() -> None:
    teacher = toy_teacher(3.0, "power-cosine")
    noise = torch.randn(4, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    picture = torch.rand(1, 3, *teacher.size, generator=torch.Generator().manual_seed(1))
    condition = teacher.condition(Source(noise[:1], picture, torch.zeros(1, 18, 2)), picture.expand(4, -1, -1, -1))
    check_ends(lambda x, t: teacher.velocity(x, t, condition), noise)


def textbook(held: float) -> Function:
    """Stable Diffusion's ε as a velocity, divided by t down to ``held``."""
    network = Gaussian("sd")
    schedule, _ = read_scheduler(CONFIGS["sd"])

    def velocity(x: Tensor, t: float) -> Tensor:
        k = int(np.abs(schedule.t - t).argmin())
        tau = torch.full((len(x),), int(schedule.times[k]))
        noise = network(x * float(1 / np.hypot(t, 1 - t)), tau)
        return (x - noise) / max(t, held) if held else torch.div(x - noise, t)

    return velocity


@pytest.mark.parametrize(
    ("velocity", "found"),
    [
        (textbook(0), "velocity at t = 0 is not finite"),
        (textbook(1e-3), "changes by"),
        (textbook(1e-2), "changes by"),
        (lambda x, t: (gaussian_velocity(x, t) * t) / torch.tensor(t), "velocity at t = 0 is not finite"),
        (lambda x, t: gaussian_velocity(x, t) * (1 - t) / torch.tensor(1 - t), "velocity at t = 1 is not finite"),
        (lambda x, t: gaussian_velocity(x, t) if t else 0 * x, "changes by 100% from t = 0 to 0.001"),
        (lambda x, t: gaussian_velocity(x, t) if t > 0.02 else -gaussian_velocity(x, t), "from t = 0.01 to 0.03"),
    ],
)
def test_a_velocity_with_a_wrong_end_is_refused(velocity: Function, found: str) -> None:
    noise = torch.randn(64, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    assert found in message(lambda: check_ends(velocity, noise))
    assert "Adapted begin at the first time that the network learnt" in message(lambda: check_ends(velocity, noise))


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        (([0, 1], [0, 1], [1]), "a schedule of [2], [2], [1] times"),
        (([0], [0], [1]), "n ≥ 2"),
        (([0, 1], [0, 1], [1, -0.1]), "below 0"),
        (([0, 1], [0, 1], [0, 1]), "both 0"),
        (([0, 1], [0, np.nan], [1, 0]), "not finite"),
        (([0, 1, 2, 3], [1, 0.5, 0.6, 0], [0, 0.5, 0.4, 1]), "turns at τ = 2"),
        (([0, 1, 2], [1, 1, 0], [0, 0, 1]), "stands or turns at τ = 1"),
    ],
)
def test_schedules_that_are_none(arrays: tuple[list[float], ...], found: str) -> None:
    assert found in message(lambda: Schedule(*(np.array(array) for array in arrays)))


def test_a_prediction_that_is_none() -> None:
    assert "prediction 'eps': expected one of epsilon" in message(lambda: Prediction("eps"))  # type: ignore[arg-type]
