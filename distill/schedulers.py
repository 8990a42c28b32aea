"""diffusers' schedulers: what they say of the network, and paths by their samplers."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from distill.predictions import Kind, Prediction, Schedule, image_part
from rpfm_edge.core.errors import ConfigError

NODES = 4096  # of a continuous schedule's table: τ to 1e-6
BETAS = (
    *("DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "UniPCMultistep", "DEISMultistep", "SASolver"),
    *("DPMSolverMultistep", "DPMSolverSinglestep", "EulerDiscrete", "EulerAncestralDiscrete"),
    *("HeunDiscrete", "LMSDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "CogVideoXDDIM", "CogVideoXDPM"),
)
STRAIGHT = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")
EDM = ("EDMEuler", "EDMDPMSolverMultistep")
UNSCALED = ("EulerDiscrete", "EDMEuler", "EDMDPMSolverMultistep")  # samplers with states x₀ + σ ε
VARIANCE_PRESERVING = ("DPMSolverMultistep", "DEISMultistep", "UniPCMultistep")
SAMPLERS = ("DDIM", *UNSCALED, *VARIANCE_PRESERVING, "FlowMatchEulerDiscrete")
KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction")
CHOICES = {
    "prediction_type": KINDS,
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"),
    "sigma_schedule": ("karras", "exponential"),
    "timestep_type": ("discrete", "continuous"),
}


def read_scheduler(source: Any) -> tuple[Schedule, Prediction]:
    """What a diffusers scheduler says of its network.

    What only places the steps of a sampler (``timestep_spacing``, ``use_karras_sigmas``, every shift) changes neither.

    Args:
        source: a scheduler, its config with ``_class_name``, or a folder with ``scheduler_config.json``.

    Raises:
        ConfigError: a class, a key or a value that is not known.
    """
    scheduler = source if hasattr(source, "step") else _create(_config(source))
    name, config = _name(scheduler), dict(scheduler.config)
    if name not in (*BETAS, *STRAIGHT, *EDM):
        raise _unknown("_class_name", name, (*BETAS, *STRAIGHT, *EDM))
    kind, straight = config.get("prediction_type", "flow_prediction"), name in STRAIGHT or config.get("use_flow_sigmas")
    known = ("epsilon", "v_prediction") if name in EDM else KINDS if straight else KINDS[:3]
    if kind not in known:
        raise _unknown("prediction_type", kind, known)
    if name in EDM:
        edm = "edm" if kind == "epsilon" else "v_prediction"
        return _preconditioned(scheduler), Prediction(cast(Kind, edm), config["sigma_data"])
    if straight:
        return _straight(config), Prediction("velocity" if config.get("invert_sigmas") else kind)
    if config.get("timestep_type") == "continuous" and kind == "v_prediction":
        return _continuous(scheduler), Prediction(kind)
    return _discrete(scheduler), Prediction(kind)


def _discrete(scheduler: Any) -> Schedule:
    """A variance-preserving table, without the times that the sampler leaves out (``lambda_min_clipped``)."""
    squares = scheduler.alphas_cumprod.double().numpy()
    alphas, sigmas = np.sqrt(squares), np.sqrt(1 - squares)
    kept = np.flatnonzero(alphas >= math.exp(scheduler.config.get("lambda_min_clipped", -math.inf)) * sigmas)
    return Schedule(kept, alphas[kept], sigmas[kept])


def _preconditioned(scheduler: Any) -> Schedule:
    """EDM (arXiv 2206.00364): x after c_in = 1 / √(σ² + sigma_data²), τ = c_noise(σ)."""
    config = scheduler.config
    sigmas = np.geomspace(config.sigma_min, config.sigma_max, NODES)
    c_in = 1 / np.hypot(sigmas, config.sigma_data)
    return Schedule(scheduler.precondition_noise(torch.from_numpy(sigmas)).numpy(), c_in, c_in * sigmas)


def _straight(config: Mapping[str, Any]) -> Schedule:
    """x = (1 - σ) x₀ + σ ε with τ = σ ``num_train_timesteps``; Mochi (``invert_sigmas``) counts the other way."""
    count = int(config["num_train_timesteps"])
    t = np.arange(count + 1) / count
    return Schedule(count * (t if config.get("invert_sigmas") else 1 - t), t, 1 - t)


def _continuous(scheduler: Any) -> Schedule:
    """SVD: variance-preserving, τ = ln(σ / α) / 4."""
    config, sigmas = scheduler.config, scheduler.sigmas[scheduler.sigmas > 0]
    ends = (config.sigma_min or float(sigmas.min()), config.sigma_max or float(sigmas.max()))
    ratios = np.geomspace(*ends, NODES)
    return Schedule(np.log(ratios) / 4, 1 / np.hypot(1, ratios), ratios / np.hypot(1, ratios))


def _config(source: Any) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source) / "scheduler_config.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = f"{path} cannot be read ({error})"
        raise ConfigError(problem, expected="the config of a diffusers scheduler", fix="give its folder") from None
    return found


def _create(config: dict[str, Any]) -> Any:
    """The scheduler of a config; what diffusers would pass over in silence is refused."""
    import diffusers

    name = str(config.get("_class_name")).removesuffix("Scheduler")
    classes = {one: getattr(diffusers, f"{one}Scheduler", None) for one in (*BETAS, *STRAIGHT, *EDM)}
    known: dict[str, Any] = {one: kind for one, kind in classes.items() if kind}  # an older diffusers has fewer
    if name not in known:
        raise _unknown("_class_name", name, known)
    keys = {key for kind in known.values() for key in inspect.signature(kind.__init__).parameters} - {"self"}
    for key, value in config.items():
        if not key.startswith("_") and key not in keys:
            raise ConfigError(f"{key!r} of a {name}Scheduler", expected=_one_of(keys), fix="correct the key")
        if key in CHOICES and value not in CHOICES[key]:
            raise _unknown(key, value, CHOICES[key])
    try:
        return known[name].from_config(config)
    except Exception as error:  # a wrong type or range may end anywhere in diffusers
        problem = f"diffusers' {name}Scheduler refuses its config ({error})"
        raise ConfigError(problem, expected="what diffusers saved", fix="correct it") from None


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__.removesuffix("Scheduler")


def _one_of(names: Iterable[str]) -> str:
    return "one of " + ", ".join(sorted(names))


def _unknown(key: str, value: object, known: Iterable[str]) -> ConfigError:
    fix = "correct it, or make Schedule and Prediction yourself"
    return ConfigError(f"{key} {value!r} of a scheduler", expected=_one_of(known), fix=fix)


@torch.no_grad()
def sampler_path(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: Any, noise: Tensor, times: Sequence[float]
) -> list[Tensor]:
    """States of a teacher's own sampler in our coordinates.

    At the sampler's own times they are what the network is given, between them they lie on straight lines, as in DDIM.
    Before the first of its times they are the noise, in the scale of the time, as ``Adapted.start`` has it. The last
    state, t = 1, is the sampler's result.

    Args:
        predict: the network's output, guidance included, for x (B, C, …) in its scaling and τ (B,); a learnt variance
            is dropped.
        scheduler: after its ``set_timesteps``; it is left as it is.
        noise: (B, C, …), of variance 1.
        times: ours, from 0 to 1.

    Raises:
        ConfigError: a scheduler without steps, one that draws noise or goes back and forth, or a result with nan.
    """
    scheduler = copy.deepcopy(scheduler)
    at, scales = _levels(scheduler)
    if "variance_type" in scheduler.config:
        scheduler.register_to_config(variance_type=None)  # image_part has dropped it
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else a first time that comes twice, as rounded ones do, would skip a step
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    states = []
    for tau, scale in zip(scheduler.timesteps, scales, strict=True):
        states.append(x / scale)
        given = scheduler.scale_model_input(x, tau) if hasattr(scheduler, "scale_model_input") else x
        output = image_part(predict(given, tau.to(x.device).expand(len(x))), x.shape[1])
        x = scheduler.step(output.to(x.dtype), tau, x).prev_sample
    if not x.isfinite().all():
        problem = f"the {_name(scheduler)}Scheduler's result is not finite"
        fix = "correct prediction_type; noise cannot be predicted from rescale_betas_zero_snr's first time"
        raise ConfigError(problem, expected="numbers", fix=fix)
    at, states = [*at, 1.0], [*states, x]
    return [noise * math.hypot(t, 1 - t) if t < at[0] else _on_polyline(at, states, t) for t in times]


def _levels(scheduler: Any) -> tuple[list[float], list[float]]:
    """Our times of a sampler's steps, and α + σ of its states there."""
    name, config = _name(scheduler), scheduler.config
    draws = config.get("stochastic_sampling") or str(config.get("algorithm_type")).startswith("sde")
    if draws or name not in SAMPLERS:
        problem = f"{name}Scheduler, which {'draws noise' if draws else 'has no simple path from noise to image'}"
        fix = "make one of them by from_config(scheduler.config)"
        raise ConfigError(problem, expected=_one_of(SAMPLERS) + ", drawing no noise", fix=fix)
    if scheduler.num_inference_steps is None:
        raise ConfigError(f"a {name}Scheduler without steps", expected="some", fix="call its set_timesteps first")
    if name == "DDIM":
        squares = scheduler.alphas_cumprod[scheduler.timesteps.cpu()].double()
        alphas, sigmas = squares.sqrt(), (1 - squares).sqrt()
    else:
        sigmas = scheduler.sigmas[:-1].double()
        if name in STRAIGHT or config.get("use_flow_sigmas"):
            alphas = 1 - sigmas
        else:
            alphas = torch.ones_like(sigmas) if name in UNSCALED else (1 + sigmas**2).rsqrt()
            sigmas = alphas * sigmas
        if config.get("invert_sigmas"):
            alphas, sigmas = sigmas, alphas
    return (alphas / (alphas + sigmas)).tolist(), (alphas + sigmas).tolist()


def _on_polyline(at: list[float], states: list[Tensor], t: float) -> Tensor:
    """The state at t on straight lines from state to state."""
    right = max(1, min(int(np.searchsorted(at, t)), len(at) - 1))
    weight = (t - at[right - 1]) / (at[right] - at[right - 1])
    return torch.lerp(states[right - 1], states[right], weight)
