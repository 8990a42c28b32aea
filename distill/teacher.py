"""The teacher: flow-matching training, the guided velocity, and the artifact that holds it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill import autoencoder as autoencoders
from distill.aligned import create_network
from distill.autoencoder import Autoencoder
from distill.batches import EncodedSplit
from distill.condition import Source, Tensors, encode_pose, per_target
from distill.rpfm import RPFM, RPFMConfig
from distill.train import History, TrainConfig, fit
from distill.weights import load_weights, save_weights
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.artifact import Artifact, Stage
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.flow import Solver, guidance_scale, interpolate, solve, target_velocity, time_grid
from rpfm_edge.core.signature import PoseKind
from rpfm_edge.people.data import draw_batch

TOOLS = ("torch", "accelerate", "safetensors")
VALIDATION_SEED = 0
NULL = "null_"  # before the names of tensors of no source, in a condition


class Teacher(Protocol):
    """The velocity contract: all that distillation and validation need. Any ``package.module:factory`` may give one.

    It may have an attribute ``pose``, the kind that it wants: "skeleton" without it.
    """

    autoencoder: Autoencoder
    latent_shape: tuple[int, int, int]
    size: tuple[int, int]

    def condition(self, source: Source, pose: Tensor) -> Any:
        """From S sources and (B, 3, H, W) skeletons or (B, 18, 2) keypoints (B a multiple of S, grouped by source).

        A dict of tensors, all with B in front, is handed on to the decoder.
        """

    def velocity(self, x: Tensor, t: float, condition: Any) -> Tensor:
        """Guided dx/dt of (B, C, h, w) at time t (0 noise, 1 image)."""


@dataclass(frozen=True, slots=True)
class Guidance:
    """Classifier-free guidance: ``v = v_null + w(t) (v_cond - v_null)``; schedules in ``flow.guidance_scale``."""

    scale: float = 1.5
    schedule: str = "constant"


@dataclass(frozen=True, slots=True)
class FlowMatchingConfig:
    """What a teacher is trained with. Times are drawn from a logit-normal distribution: a little towards noise,
    where the conditions decide the picture."""

    train: TrainConfig = field(default_factory=TrainConfig)
    sources: int = 4
    targets_per_source: int = 8
    sigma_min: float = 1e-4
    condition_dropout: float = 0.1
    time_mean: float = -0.3
    time_std: float = 1.2
    joint_noise_px: float = 1.0  # of the sources' keypoints: found by a network, they are never exact


class Example(NamedTuple):
    """A batch with its draws: S sources, B = S M targets, all on one device."""

    source: Source
    pose: Tensor  # (B, 3, H, W) or (B, 18, 2)
    target: Tensor  # (B, C, h, w)
    t: Tensor  # (B,)
    noise: Tensor  # like the target
    keep: Tensor  # (S,) bool: sources whose conditions are not dropped

    def to(self, device: torch.device | str) -> Example:
        """On a device."""
        return Example(*(part.to(device) for part in self))


class FlowMatchingLoss(nn.Module):
    """``E || v(x_t, t | x_s, y_p) - (y - (1 - sigma_min) z) ||²`` (arXiv 2505.03562), over one batch."""

    def __init__(self, network: RPFM, autoencoder: nn.Module, config: FlowMatchingConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        self._autoencoder = [autoencoder]  # in a list: frozen, not a part of the training state

    def forward(self, example: Example) -> Tensor:
        source, pose, target, t, noise, keep = example
        sigma_min, targets_per_source = self.config.sigma_min, len(target) // len(keep)
        tensors = per_target(self.network.source(source, keep), targets_per_source)
        posed = encode_pose(self.network, self._autoencoder[0], pose, tensors)
        kept = keep.repeat_interleave(targets_per_source)
        tensors |= {name: tensor * _beside(kept, tensor) for name, tensor in posed.items()}
        start = self.network.start(noise, tensors).detach().float()
        x_t = interpolate(start, target, t[:, None, None, None], sigma_min)
        velocity = self.network(x_t, t, **tensors)
        loss = F.mse_loss(velocity.float(), target_velocity(start, target, sigma_min))
        if "prior" in posed:  # learnt by itself: the flow takes it as it is
            loss = loss + F.mse_loss(posed["prior"][kept].float(), target[kept]) if kept.any() else loss
        return loss


def _beside(values: Tensor, tensor: Tensor) -> Tensor:
    """(B,) with as many axes as a tensor (B, …)."""
    return values.view(-1, *[1] * (tensor.ndim - 1))


def draw_example(
    data: EncodedSplit, config: FlowMatchingConfig, rng: np.random.Generator, device: torch.device | str
) -> Example:
    """Draw pairs, and for each its time, its noise and whether it loses its conditions; on ``device``."""
    batch = data.batch(*draw_batch(data.split, config.sources, config.targets_per_source, rng), device)
    assert batch.target is not None
    draw = torch.Generator(device).manual_seed(int(rng.integers(2**63)))
    t = torch.sigmoid(config.time_mean + config.time_std * torch.randn(len(batch.pose), generator=draw, device=device))
    noise = torch.randn(batch.target.shape, generator=draw, device=device)
    keep = torch.rand(len(batch.source.latent), generator=draw, device=device) >= config.condition_dropout
    source, joints = batch.source, batch.source.joints
    if data.pose == "keypoints" and config.joint_noise_px:
        joints = joints + config.joint_noise_px * torch.randn(joints.shape, generator=draw, device=device)
    return Example(source._replace(joints=joints), batch.pose, batch.target, t, noise, keep)


def train_teacher(
    network: RPFM,
    autoencoder: nn.Module,
    data: EncodedSplit,
    config: FlowMatchingConfig,
    checkpoint: Path,
    validation: EncodedSplit | None = None,
) -> tuple[RPFM, History]:
    """Train by flow matching and return the EMA network. Resumes from ``checkpoint``.

    With ``validation`` the history holds the loss on it too, every ``config.train.evaluate_every_s``.
    """
    loss, data = FlowMatchingLoss(network, autoencoder, config), replace(data, pose=network.pose_kind)
    validation = replace(validation, pose=network.pose_kind) if validation else None

    def step_loss(model: nn.Module, step: int, rng: np.random.Generator) -> Tensor:
        return model(draw_example(data, config, rng, next(model.parameters()).device))

    watch = held_out_loss(validation, config) if validation else None
    ema, history = fit(loss, step_loss, config.train, checkpoint, "teacher", watch)
    return ema.network, history


def held_out_loss(data: EncodedSplit, config: FlowMatchingConfig) -> Callable[[nn.Module], float]:
    """The training loss on 128 pairs that are always the same, with their times, noises and dropped conditions.

    They depend neither on the run's seed nor on its batches or its device (noise is drawn on the CPU), so the curves
    of several runs can be compared.
    """
    fixed, rng = replace(config, sources=8, targets_per_source=4), np.random.default_rng(VALIDATION_SEED)
    examples = [draw_example(data, fixed, rng, "cpu") for _ in range(4)]

    def evaluate(model: nn.Module) -> float:
        device = next(model.parameters()).device
        return float(np.mean([float(model(one.to(device))) for one in examples]))

    return evaluate


class RPFMTeacher:
    """A trained network with its autoencoder and guidance, behind the velocity contract."""

    def __init__(self, network: RPFM, autoencoder: nn.Module, guidance: Guidance, size: tuple[int, int]) -> None:
        self.network, self.autoencoder, self.guidance = network.eval(), autoencoder.eval(), guidance
        self.latent_shape, self.size, self.pose = network.config.latent_shape, size, network.pose_kind
        self.digest = ""
        self.lineage: tuple[Stage, ...] = ()

    def to(self, device: torch.device | str) -> RPFMTeacher:
        """Move the networks to a device."""
        self.network.to(device)
        self.autoencoder.to(device)
        return self

    @torch.no_grad()
    def condition(self, source: Source, pose: Tensor) -> Tensors:
        """The network's tensors of source and pose, each for B images; with guidance those of no source besides, behind
        ``null_``."""
        count = len(pose)
        tensors = per_target(self.network.source(source), count // len(source.latent))
        tensors |= encode_pose(self.network, self.autoencoder, pose, tensors)
        if self.guidance.scale == 1.0:
            return tensors
        nothing = torch.zeros(1, dtype=torch.bool, device=source.latent.device)
        null = self.network.source(source.first(1), keep=nothing)
        without = {NULL + name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in null.items()}
        return tensors | without

    def start(self, noise: Tensor, condition: Tensors) -> Tensor:
        """Where the network's flow starts."""
        return self.network.start(noise, condition).float()

    @torch.no_grad()
    def velocity(self, x: Tensor, t: float, condition: Tensors) -> Tensor:
        """The guided velocity; one network evaluation where the guidance scale is 1, two elsewhere."""
        scale = guidance_scale(t, self.guidance.scale, self.guidance.schedule)
        time = x.new_full((len(x),), t)
        given = {name: tensor for name, tensor in condition.items() if not name.startswith(NULL)}
        conditional = self.network(x, time, **given)
        if scale == 1.0:
            return conditional
        nothing = {
            name: condition[NULL + name] if NULL + name in condition else torch.zeros_like(tensor)
            for name, tensor in given.items()
        }
        null = self.network(x, time, **nothing)
        return null + scale * (conditional - null)


def pose_kind(teacher: Teacher) -> PoseKind:
    """What a teacher's ``condition`` gets: its attribute ``pose``, or skeletons."""
    return getattr(teacher, "pose", "skeleton")


def move(teacher: Teacher, device: torch.device | str) -> None:
    """Move a teacher to a device, by its own ``to`` if it has one; a teacher without it must find its device itself."""
    if hasattr(teacher, "to"):
        teacher.to(device)


def sample_teacher(teacher: Teacher, noise: Tensor, condition: Any, steps: int, solver: Solver = "euler") -> Tensor:
    """The latent at t = 1 from (B, C, h, w) noise."""
    begin = first_state(teacher, noise, condition)
    return solve(lambda x, t: teacher.velocity(x, t, condition), begin, time_grid(steps), solver)[-1]


def first_state(teacher: Teacher, noise: Tensor, condition: Any) -> Tensor:
    """Where the teacher's paths start: at the noise, unless it says otherwise."""
    begin: Tensor = teacher.start(noise, condition) if hasattr(teacher, "start") else noise
    return begin


# Artifact ------------------------------------------------------------------------------------------------------------


def save_teacher(
    teacher: RPFMTeacher, out: Path, lineage: tuple[Stage, ...], dtype: torch.dtype = torch.float32, **facts: Any
) -> Artifact:
    """Write the artifact of a teacher; ``facts`` join its config."""
    config = {
        "network": asdict(teacher.network.config),
        "autoencoder": autoencoders.describe(teacher.autoencoder),
        "size": list(teacher.size),
        "guidance": asdict(teacher.guidance),
        **facts,
    }
    with artifact.replacing_folder(out, "teacher") as folder:
        save_weights(teacher.network, folder / "network.safetensors", dtype)
        save_weights(teacher.autoencoder, folder / "autoencoder.safetensors", dtype)
        artifact.seal(folder, "teacher", config, {}, lineage)
    return artifact.load(out, "teacher")


def load_teacher(spec: str | Path) -> Teacher:
    """A teacher from an artifact's path, a shipped name (``teacher:xs``) or a factory (``package.module:factory``)."""
    if is_factory(spec):
        return call_factory(str(spec))
    loaded = artifact.load(shipped.resolve(spec), "teacher")
    network = create_network(network_config(loaded.config))
    load_weights(network, loaded.file("network.safetensors"))
    autoencoder = autoencoders.create(loaded.config["autoencoder"])
    load_weights(autoencoder, loaded.file("autoencoder.safetensors"))
    guidance, size = Guidance(**loaded.config["guidance"]), tuple(loaded.config["size"])
    teacher = RPFMTeacher(network.requires_grad_(False), autoencoder.requires_grad_(False), guidance, size)
    teacher.digest, teacher.lineage = loaded.digest, loaded.lineage
    return teacher


def network_config(config: Any) -> RPFMConfig:
    """The network's config from a manifest (JSON has lists where we have tuples)."""
    fields = dict(config["network"])
    return RPFMConfig(**{**fields, "latent_size": tuple(fields["latent_size"])})


def is_factory(spec: str | Path) -> bool:
    """Whether ``spec`` names a factory rather than a folder or a shipped artifact."""
    text = str(spec)
    return text not in shipped.shipped() and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*", text) is not None


def call_factory(spec: str) -> Any:
    """Import ``package.module`` and call its ``factory()``."""
    module, name = spec.split(":")
    try:
        factory: Callable[[], Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"teacher {spec!r} cannot be imported ({error})",
            expected=f"a shipped name out of {sorted(shipped.shipped())}, a folder, or package.module:factory",
            fix="check the spelling and PYTHONPATH",
        ) from None
    teacher = factory()
    missing = [n for n in ("autoencoder", "latent_shape", "size", "condition", "velocity") if not hasattr(teacher, n)]
    if missing:
        raise ConfigError(
            f"teacher {spec!r} has no {', '.join(missing)}",
            expected="the velocity contract of distill.teacher.Teacher",
            fix="add what is missing",
        )
    if pose_kind(teacher) not in get_args(PoseKind):
        raise ConfigError(
            f"teacher {spec!r} wants the pose as {pose_kind(teacher)!r}",
            expected=f"one of {get_args(PoseKind)}",
            fix="correct its attribute pose",
        )
    _check_shapes(spec, teacher)
    return teacher


@torch.no_grad()
def _check_shapes(spec: str, teacher: Any) -> None:
    """Its latents are those of its autoencoder at its size, and so is a velocity: asked now, not amid the paths."""
    encoder, shape, size = teacher.autoencoder, tuple(teacher.latent_shape), tuple(teacher.size)
    wanted = (encoder.latent_channels, *(pixels / encoder.factor for pixels in size))
    problem, fix = f"latent_shape {shape}", "correct latent_shape, size or autoencoder"
    if shape == wanted:
        place = next((weight.device for weight in getattr(encoder, "parameters", list)()), None)
        x = torch.zeros(1, *shape, device=place)
        picture, joints = x.new_zeros(1, 3, *size), x.new_zeros(1, 18, 2)
        pose = picture if pose_kind(teacher) == "skeleton" else joints
        found = teacher.velocity(x, 0.5, teacher.condition(Source(x, picture, joints), pose))
        if isinstance(found, Tensor) and found.shape == x.shape:
            return
        kind = list(found.shape) if isinstance(found, Tensor) else f"of the type {type(found).__name__}"
        wanted, problem, fix = x.shape, f"a velocity {kind} for one latent", "return a torch tensor of the shape of x"
    expected = f"[{', '.join(f'{number:g}' for number in wanted)}]"
    raise ConfigError(f"teacher {spec!r} has {problem}", expected=expected, fix=fix)
