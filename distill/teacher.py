"""The teacher: flow-matching training, the guided velocity, and the artifact that holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.autoencoder import Autoencoder
from distill.batches import EncodedSplit
from distill.condition import Network, Source, Tensors, encode_pose, per_target
from distill.contract import ContractNetwork, Parts, PathFunction, call_factory, is_factory
from distill.guidance import Branch, Guidance, branches
from distill.networks import create, describe
from distill.train import History, TrainConfig, fit
from distill.weights import load_weights, save_weights
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.artifact import Artifact, Stage
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.flow import Solver, interpolate, solve, target_velocity, time_grid
from rpfm_edge.core.signature import PoseKind
from rpfm_edge.people.data import draw_batch

TOOLS = ("torch", "accelerate", "safetensors")
VALIDATION_SEED = 0
NULL = "null_"  # before the names of tensors of no source, in a condition


class Teacher(Protocol):
    """The velocity contract: all that distillation and validation need. Any ``package.module:factory`` may give one.

    It may have an attribute ``pose``, the kind that it wants, "skeleton" without it; ``start(noise, condition)``, where
    its flow starts, at the noise without it; and ``path(noise, condition, times)``, its own sampler: see
    ``contract.Parts``, by which a teacher brings its modules, too.
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

    def __init__(self, network: Network, autoencoder: nn.Module, config: FlowMatchingConfig) -> None:
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
    network: Network,
    autoencoder: nn.Module,
    data: EncodedSplit,
    config: FlowMatchingConfig,
    checkpoint: Path,
    validation: EncodedSplit | None = None,
) -> tuple[Network, History]:
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


class NetworkTeacher:
    """A trained network with its autoencoder and guidance, behind the velocity contract."""

    def __init__(
        self,
        network: Network,
        autoencoder: nn.Module,
        guidance: Guidance | tuple[Branch, ...],
        size: tuple[int, int],
        path: PathFunction | None = None,
    ) -> None:
        self.network, self.autoencoder, self.guidance = network.eval(), autoencoder.eval(), guidance
        self.latent_shape, self.size, self.pose = network.latent_shape, size, network.pose_kind
        self.path = None if path is None else partial(self._own_path, path)
        self.digest = ""
        self.lineage: tuple[Stage, ...] = ()

    def to(self, device: torch.device | str) -> NetworkTeacher:
        """Move the networks to a device."""
        self.network.to(device)
        self.autoencoder.to(device)
        return self

    @torch.no_grad()
    def condition(self, source: Source, pose: Tensor) -> Tensors:
        """The network's tensors of source and pose, each for B images; with guidance those that stand for nothing
        besides, behind ``null_``."""
        tensors = per_target(self.network.source(source), len(pose) // len(source.latent))
        tensors |= encode_pose(self.network, self.autoencoder, pose, tensors)
        if len(branches(self.guidance, tensors)) == 1:
            return tensors
        return tensors | {NULL + name: tensor for name, tensor in self.network.null(tensors).items()}

    def start(self, noise: Tensor, condition: Tensors) -> Tensor:
        """Where the network's flow starts."""
        return self.network.start(noise, condition).float()

    @torch.no_grad()
    def velocity(self, x: Tensor, t: float, condition: Tensors) -> Tensor:
        """The guided velocity: one network evaluation for each branch that counts at this time."""
        return self._guided(self.network, x, x.new_full((len(x),), t), t, condition)

    def _guided(self, network: nn.Module, x: Tensor, time: Tensor, t: float, condition: Tensors) -> Tensor:
        """The branches' weighted sum at t of what ``network(x, time, **tensors)`` gives."""
        given = {name: tensor for name, tensor in condition.items() if not name.startswith(NULL)}
        total = torch.zeros((), device=x.device)
        for branch in branches(self.guidance, given):
            if weight := branch.at(t):
                nothing = {name: condition[NULL + name] for name in branch.without}
                total = total + weight * network(x, time, **(given | nothing))
        return total

    @torch.no_grad()
    def _own_path(self, path: PathFunction, noise: Tensor, condition: Tensors, times: Sequence[float]) -> list[Tensor]:
        """Of the sampler that came with the parts, whose network tells the noise, the image or whatever it does."""
        network = self.network
        assert isinstance(network, ContractNetwork)

        def predict(x: Tensor, tau: Tensor) -> Tensor:
            return self._guided(network.own, x, tau, network.own_time(float(tau[0])), condition)

        first = network.t_first
        return path(predict, noise, [first + (1 - first) * t for t in times])


def pose_kind(teacher: Teacher) -> PoseKind:
    """What a teacher's ``condition`` gets: its attribute ``pose``, or skeletons."""
    return getattr(teacher, "pose", "skeleton")


def move(teacher: Teacher, device: torch.device | str) -> None:
    """Move a teacher to a device, by its own ``to`` if it has one; a teacher without it must find its device itself."""
    if hasattr(teacher, "to"):
        teacher.to(device)


def sample_teacher(
    teacher: Teacher, noise: Tensor, condition: Any, steps: int, solver: Solver = "euler"
) -> list[Tensor]:
    """The states at t = 0, 1/steps, …, 1, from (B, C, h, w) noise.

    The reference, which is what ``heun`` asks for, is the teacher's own sampler, if it has one.
    """
    own = getattr(teacher, "path", None)
    if own is not None and solver == "heun":
        return [state.float() for state in own(noise, condition, time_grid(steps))]
    begin: Tensor = teacher.start(noise, condition) if hasattr(teacher, "start") else noise
    return solve(lambda x, t: teacher.velocity(x, t, condition).to(x.dtype), begin, time_grid(steps), solver)


# Artifact ------------------------------------------------------------------------------------------------------------


def save_teacher(
    teacher: NetworkTeacher, out: Path, lineage: tuple[Stage, ...], dtype: torch.dtype = torch.float32, **facts: Any
) -> Artifact:
    """Write the artifact of a teacher; ``facts`` join its config."""
    config = {
        **describe(teacher.network, teacher.autoencoder),
        "size": list(teacher.size),
        "guidance": asdict(teacher.guidance) if isinstance(teacher.guidance, Guidance) else None,
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
        return _from_factory(str(spec))
    loaded = artifact.load(shipped.resolve(spec), "teacher")
    network, autoencoder = create(loaded.config)
    load_weights(network, loaded.file("network.safetensors"))
    load_weights(autoencoder, loaded.file("autoencoder.safetensors"))
    guidance, size = Guidance(**loaded.config["guidance"]), tuple(loaded.config["size"])
    teacher = NetworkTeacher(network.requires_grad_(False), autoencoder.requires_grad_(False), guidance, size)
    teacher.digest, teacher.lineage = loaded.digest, loaded.lineage
    return teacher


def _from_factory(spec: str) -> Teacher:
    """The teacher that a factory returns, or that is made of its parts; its shapes are tried."""
    made = call_factory(spec)
    if isinstance(made, Parts):
        network = ContractNetwork(made, spec).requires_grad_(False)
        teacher: Any = NetworkTeacher(network, made.codec, made.guidance, made.size, made.path)
    else:
        teacher = made
    missing = [n for n in ("autoencoder", "latent_shape", "size", "condition", "velocity") if not hasattr(teacher, n)]
    if missing:
        raise ConfigError(
            f"teacher {spec!r} has no {', '.join(missing)}",
            expected="distill.contract.Parts, or the velocity contract of distill.teacher.Teacher",
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
