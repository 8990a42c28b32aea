"""Quantization-aware distillation: a float student trains itself until its rounded self makes the same pictures.

In training the layers that ``quantize`` quantizes round as it does: INT8 weights per output channel and inputs per
tensor and call, or INT4 weights in groups. The result is a student as any other: since the rule is the same, export and
quantization find the same integers again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from distill.condition import encoded
from distill.student import Student
from distill.train import History, TrainConfig, fit
from rpfm_edge.core.progress import progress
from rpfm_edge.core.signature import PoseKind
from rpfm_edge.people.data import Split, draw_batch
from rpfm_edge.people.image import to_model
from rpfm_edge.people.pose import MISSING, flip, pose_input

Precision = Literal["int8", "int4-weights"]
INPUT_LEVELS = 127
LEVELS = {"int8": (63.5, 64), "int4-weights": (7.0, 7)}  # steps to a row's largest weight, and the last integer
GROUP = 32  # weights of a sum that have one INT4 scale
SHRINKS = torch.linspace(1.0, 0.7, 13)  # of the INT4 scale at which no weight of a group is clipped
PICTURE = 10.0
Batch = tuple[Tensor, Tensor, Tensor]  # sources, poses, noise


@dataclass(frozen=True, slots=True)
class QadConfig:
    """How a student is fine-tuned: ``steps`` are unrolled with gradient, on ``targets`` poses of one source at a time.

    bf16 would drown what is learnt here: it rounds as coarsely as INT8.
    """

    steps: int
    precision: Precision
    train: TrainConfig
    targets: int = 4
    samples: int = 32  # that the ranges of the inputs are taken from


class Rendering(nn.Module):
    """From source to picture as the two graphs of a student compute it, but for several targets per source."""

    def __init__(self, student: Student, steps: int) -> None:
        super().__init__()
        self.student, self.steps = student, steps

    def forward(self, source: Tensor, pose: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """(S, 3, H, W) in [-1, 1], B poses, (B, C, h, w), B a multiple of S → (B, 3, H, W) and the latent after each
        step. The source is the photo alone, as from a user."""
        joints = source.new_full((len(source), 18, 2), MISSING)
        condition = self.student.condition(encoded(self.student.autoencoder, source, joints), pose)
        begin = self.student.network.start(noise, condition)
        _, *states = self.student.path(begin, condition, self.steps)
        return (self.student.autoencoder.decode(states[-1], condition), *states)


def int8_layers(student: Student) -> dict[str, nn.Module]:
    """The modules that ``quantize`` turns into INT8, by name: the rule of ``quantize.layers``, told of modules.

    A network or an autoencoder that does not name its own stays in float here, so what quantization does to it is not
    trained against.
    """
    parts = {"network": student.network, "autoencoder": student.autoencoder}
    return {
        f"{part}.{name}": layer
        for part, module in parts.items()
        for name, layer in getattr(module, "int8_layers", dict)().items()
    }


# Rounding ------------------------------------------------------------------------------------------------------------


class RoundedWeight(nn.Module):
    """A parametrization: weights rounded to a grid for each row of them, which is an output channel or an INT4 group.

    The gradient passes as if nothing had been rounded. The largest weight of a row gives its grid. With INT4 the grid
    is smaller, by what had the least squared error for ``weight`` at the start, and the largest weight is on it once it
    is rounded, so that the quantizer finds the same grid again.
    """

    def __init__(self, weight: Tensor, precision: Precision) -> None:
        super().__init__()
        self.levels, self.top = LEVELS[precision]
        self.width = GROUP if precision == "int4-weights" else weight[0].numel()
        self.register_buffer("shrink", torch.ones(weight.numel() // self.width, 1, device=weight.device))
        if precision == "int4-weights":
            rows, errors = weight.detach().reshape(-1, self.width), []
            for shrink in SHRINKS:
                self.shrink.fill_(shrink)
                errors.append((self._rounded(rows) - rows).square().sum(1, keepdim=True))
            self.shrink.copy_(SHRINKS.to(weight.device)[torch.stack(errors).argmin(0)])

    def forward(self, weight: Tensor) -> Tensor:
        rounded = self._rounded(weight.detach().reshape(-1, self.width))
        return weight + (rounded.view_as(weight) - weight).detach()

    def _rounded(self, rows: Tensor) -> Tensor:
        largest = rows.abs().amax(1, keepdim=True)
        scale = torch.where(largest > 0, self.shrink * largest / self.levels, 1.0)
        return (rows / scale).round().clamp(-self.top, self.top) * scale


class RoundedInput:
    """A forward pre-hook that rounds a layer's input, with a range for each of its calls in one rendering."""

    def __init__(self, ranges: list[float]) -> None:
        self.scales, self.calls = [limit / INPUT_LEVELS or 1.0 for limit in ranges], 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale = self.scales[self.calls % len(self.scales)]
        self.calls += 1
        return (torch.fake_quantize_per_tensor_affine(inputs[0], scale, 0, -INPUT_LEVELS - 1, INPUT_LEVELS),)


@torch.no_grad()
def input_ranges(
    rendering: Rendering, layers: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> dict[str, list[float]]:
    """Layer → for each of its calls the mean of the largest magnitudes that ``batches`` (one picture each) show."""
    seen: dict[str, list[float]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(float(x[0].abs().max())))
        for name, layer in layers.items()
    ]
    with progress("ranges", len(batches)) as advance:
        for done, batch in enumerate(batches, 1):
            rendering(*batch)
            advance(done, "")
    for handle in handles:
        handle.remove()
    return {name: np.mean(np.reshape(values, (len(batches), -1)), axis=0).tolist() for name, values in seen.items()}


def round_layers(rendering: Rendering, precision: Precision, batches: Sequence[Batch]) -> None:
    """Let the layers of a rendering round their weights from now on, and with INT8 their inputs."""
    layers = int8_layers(rendering.student)
    if precision == "int8":
        for name, ranges in input_ranges(rendering, layers, batches).items():
            layers[name].register_forward_pre_hook(RoundedInput(ranges))
    for layer in layers.values():
        if precision == "int8" or (isinstance(layer, nn.Linear) and layer.in_features % GROUP == 0):
            parametrize.register_parametrization(layer, "weight", RoundedWeight(layer.weight, precision))


# Training ------------------------------------------------------------------------------------------------------------


def draw(
    split: Split,
    size: tuple[int, int],
    targets: int,
    latent: tuple[int, ...],
    rng: np.random.Generator,
    kind: PoseKind = "skeleton",
) -> Batch:
    """A source, some of its targets' poses, mirrored with it half of the time, and their noise, on the CPU."""
    (source,), (row,), (mirrored,) = draw_batch(split, 1, targets, rng)
    picture = split.image(int(source), size)[:, :: -1 if mirrored else 1]
    poses = [split.pose(int(target), size) for target in row]
    given = np.concatenate([pose_input(flip(pose, size[1]) if mirrored else pose, kind, size) for pose in poses])
    pose = torch.from_numpy(to_model(given) if kind == "skeleton" else given)
    noise = torch.from_numpy(rng.standard_normal((targets, *latent), dtype=np.float32))
    return torch.from_numpy(to_model(picture[None])), pose, noise


class QadLoss(nn.Module):
    """How far the rounded rendering is from the float one on the same inputs: squared error of picture and latents.

    ``PICTURE`` weighs the picture so that both count alike: what is wrong in a latent is a tenth of it in the picture.
    """

    def __init__(self, rounded: Rendering, exact: Rendering) -> None:
        super().__init__()
        self.rounded = rounded
        self._exact = [exact]  # in a list: it is frozen, not a part of the training state

    def forward(self, source: Tensor, pose: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._exact[0](source, pose, noise)
        made = self.rounded(source, pose, noise)
        picture, *latents = (F.mse_loss(a, b) for a, b in zip(made, wanted, strict=True))
        return PICTURE * picture + torch.stack(latents).mean()


def train_rounded(
    student: Student, split: Split, size: tuple[int, int], config: QadConfig, checkpoint: Path
) -> tuple[Student, History]:
    """Fine-tune a float student on ``split`` and return its EMA. Resumes from ``checkpoint``."""
    device, latent = next(student.parameters()).device, student.network.latent_shape
    exact = Rendering(deepcopy(student).eval().requires_grad_(False), config.steps)
    rounded = Rendering(student.requires_grad_(True), config.steps)
    for name in student.network.frozen:
        getattr(student.network, name).requires_grad_(False)

    def batch(targets: int, rng: np.random.Generator) -> Batch:
        source, pose, noise = draw(split, size, targets, latent, rng, student.network.pose_kind)
        return source.to(device), pose.to(device), noise.to(device)

    count = config.samples if config.precision == "int8" else 0
    samples = [batch(1, np.random.default_rng([config.train.seed, k])) for k in range(count)]
    round_layers(rounded, config.precision, samples)

    def step_loss(model: nn.Module, step: int, rng: np.random.Generator) -> Tensor:
        return model(*batch(config.targets, rng))

    ema, history = fit(QadLoss(rounded, exact), step_loss, config.train, checkpoint, "qad")
    trained, settled = ema.rounded.student, exact.student
    for layer in int8_layers(trained).values():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=config.precision == "int4-weights")
    settled.load_state_dict(trained.state_dict())
    return settled, history
