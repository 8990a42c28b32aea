"""The exact predictions of data that is N(MEAN, STD²) in every pixel, on the schedules that teachers have."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MEAN, STD = 0.4, 0.6

_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, **_SD}
_ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
_DDPM = {"_class_name": "DDPMScheduler", "clip_sample": False}
_SVD = {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True, **_SD}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
_WAN = {"use_flow_sigmas": True, "flow_shift": 5.0, "prediction_type": "flow_prediction"}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd": _DDIM,
    "sd-v": {**_DDIM, "prediction_type": "v_prediction"},
    "sd-sample": {**_DDIM, "prediction_type": "sample"},
    "sd-zero-v": {**_DDIM, **_ZERO, "prediction_type": "v_prediction"},
    "sd-zero-sample": {**_DDIM, **_ZERO, "prediction_type": "sample"},
    "sd-zero": {**_DDIM, **_ZERO},
    "sd-dpm": {"_class_name": "DPMSolverMultistepScheduler", **_SD},
    "sd-dpm-zero-v": {"_class_name": "DPMSolverMultistepScheduler", **_SD, **_ZERO, "prediction_type": "v_prediction"},
    "sd-unipc": {"_class_name": "UniPCMultistepScheduler", **_SD},
    "sd-deis": {"_class_name": "DEISMultistepScheduler", **_SD},
    "sd-euler": {"_class_name": "EulerDiscreteScheduler", **_SD},
    "ddpm-learned": {**_DDPM, "variance_type": "learned_range"},
    "cosine": {**_DDPM, "beta_schedule": "squaredcos_cap_v2"},
    "trained": {**_DDPM, "trained_betas": np.linspace(0.001, 0.02, 500).tolist()},
    "cogvideox": {**_DDIM, **_ZERO, "_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"},
    "svd": {"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", **_SVD},
    "edm": {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5},
    "edm-v": {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "v_prediction", "sigma_data": 1.0},
    "edm-solver": {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5},
    "sd3": {**_FLOW, "shift": 3.0},
    "flux": {**_FLOW, "use_dynamic_shifting": True},
    "mochi": {**_FLOW, "invert_sigmas": True},
    "wan": {"_class_name": "UniPCMultistepScheduler", **_WAN},
    "wan-dpm": {"_class_name": "DPMSolverMultistepScheduler", **_WAN},
    "wan-sample": {"_class_name": "UniPCMultistepScheduler", **_WAN, "prediction_type": "sample"},
    "wan-epsilon": {"_class_name": "UniPCMultistepScheduler", **_WAN, "prediction_type": "epsilon"},
}


def gaussian_velocity(x: Tensor, t: float) -> Tensor:
    """E[x₀ - ε | x] on the straight path."""
    return MEAN + (t * STD**2 - (1 - t)) / ((t * STD) ** 2 + (1 - t) ** 2) * (x - t * MEAN)


def gaussian_flow(x: Tensor, t: float, t_end: float) -> Tensor:
    """Where the exact flow takes the state x from t to t_end."""

    def deviation(t: float) -> float:
        return float(np.hypot(t * STD, 1 - t))

    return t_end * MEAN + (x - t * MEAN) * deviation(t_end) / deviation(t)


class Gaussian(nn.Module):
    """The exact network of a config: x (B, C, h, w) in its scaling and τ (B,) → the prediction.

    Written out from the definitions of the predictions: x = α x₀ + σ ε with α and σ of τ.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        import diffusers

        self.config = CONFIGS[name]
        self.scheduler = getattr(diffusers, self.config["_class_name"]).from_config(self.config)
        self.kind = self.scheduler.config.get("prediction_type", "flow_prediction")

    def levels(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of τ; between the times of a table as diffusers' Euler has it, ln(σ / α) linear in τ."""
        if "sigma_data" in self.config or "timestep_type" in self.config:
            return torch.ones_like(tau), torch.exp(4 * tau.double())
        if "FlowMatch" in self.config["_class_name"] or "use_flow_sigmas" in self.config:
            level = tau.double() / 1000
            return (level, 1 - level) if "invert_sigmas" in self.config else (1 - level, level)
        squares = self.scheduler.alphas_cumprod.double()
        whole = tau.double().floor().long().clamp(0, len(squares) - 1)
        alphas, sigmas = squares[whole].sqrt(), (1 - squares[whole]).sqrt()
        if (tau == whole).all():
            return alphas, sigmas
        logs = ((1 - squares) / squares.clamp(min=2**-24)).log() / 2
        after = (whole + 1).clamp(max=len(squares) - 1)
        ratio = (logs[whole] + (tau - whole) * (logs[after] - logs[whole])).exp()
        return (1 + ratio**2).rsqrt(), ratio * (1 + ratio**2).rsqrt()

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        alpha, sigma = (level.to(x.dtype).view(-1, 1, 1, 1) for level in self.levels(tau))
        if "sigma_data" in self.config:
            return self._edm(x, sigma, self.config["sigma_data"])
        if "timestep_type" in self.config:
            return self._edm(x, sigma, 1.0)
        spread = (alpha * STD) ** 2 + sigma**2
        image, noise = MEAN + STD**2 * alpha / spread * (x - alpha * MEAN), sigma / spread * (x - alpha * MEAN)
        if self.kind == "flow_prediction":
            return image - noise if "invert_sigmas" in self.config else noise - image
        made = {"epsilon": noise, "sample": image, "v_prediction": alpha * noise - sigma * image}[self.kind]
        return torch.cat([made, 7 * made], 1) if "variance_type" in self.config else made

    def _edm(self, given: Tensor, sigma: Tensor, d: float) -> Tensor:
        """F of the exact denoiser, by EDM's own formulas."""
        c_skip, c_out, c_in = d**2 / (sigma**2 + d**2), sigma * d / (sigma**2 + d**2) ** 0.5, (sigma**2 + d**2) ** -0.5
        x = given / c_in
        denoised = MEAN + STD**2 / (STD**2 + sigma**2) * (x - MEAN)
        return (denoised - c_skip * x) / c_out * (-1 if self.kind == "v_prediction" else 1)
