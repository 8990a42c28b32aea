"""Students: the teacher's network, distilled to few steps with the guidance folded in, and their artifact."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill import lora, targets
from distill.autoencoder import edges
from distill.batches import EncodedSplit
from distill.condition import Network, Source, Tensors, encode_pose, per_target
from distill.networks import create, create_network, describe
from distill.rpfm import RPFMConfig
from distill.store import Trajectories
from distill.teacher import Teacher
from distill.train import History, TrainConfig, fit
from distill.weights import load_weights, save_weights
from rpfm_edge.core import artifact, shipped
from rpfm_edge.core.artifact import Artifact, Stage
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.flow import MAP_STEPS, path

Method = Literal["reflow", "flowmap", "endpoint"]
METHODS = ("reflow", "flowmap", "endpoint")


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """``steps`` is what the student is meant to run with; a flow map also serves the other powers of two up to 8."""

    method: Method = "flowmap"
    steps: int = 4
    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=3e-4, warmup_steps=50))
    batch: int = 64
    lora: int = 0  # rank of the adapters that are trained in place of all weights; 0 for none
    gradient_checkpointing: bool = False
    perceptual_weight: float = 0.5  # endpoint: decoded edges, on ``perceptual_images`` of each batch
    perceptual_images: int = 4


class Student(nn.Module):
    """A flow map u(x, t, d) with its autoencoder; one network evaluation per step."""

    def __init__(self, network: Network, autoencoder: nn.Module) -> None:
        super().__init__()
        self.network, self.autoencoder = network, autoencoder

    def condition(self, source: Source, pose: Tensor) -> Tensors:
        """The network's tensors, by name, of S sources and B poses of its kind, B a multiple of S."""
        tensors = per_target(self.network.source(source), len(pose) // len(source.latent))
        return tensors | encode_pose(self.network, self.autoencoder, pose, tensors)

    def average_velocity(self, x: Tensor, t: Tensor, d: Tensor, condition: Tensors) -> Tensor:
        """u over [t, t + d] for t, d (B,); networks without a step embedding ignore d."""
        return self.network(x, t, d if self.network.step is not None else None, **condition)

    def sample(self, noise: Tensor, condition: Tensors, steps: int) -> Tensor:
        """The latent at t = 1 from (B, C, h, w) noise, in ``steps`` evaluations."""
        return self.path(self.network.start(noise, condition), condition, steps)[-1]

    def path(self, begin: Tensor, condition: Tensors, steps: int) -> list[Tensor]:
        """The latents at t = 0 (where the flow starts), 1/steps, …, 1."""

        def average_velocity(x: Tensor, t: float, d: float) -> Tensor:
            return self.average_velocity(x, x.new_full((len(x),), t), x.new_full((len(x),), d), condition)

        return path(average_velocity, begin, steps)


class DistillLoss(nn.Module):
    """The loss of one method; ``forward`` takes sources, poses and what ``examples`` makes of the paths."""

    def __init__(self, student: Student, config: DistillConfig) -> None:
        super().__init__()
        self.network, self.config = student.network, config
        self._student = [student]  # in a list: its autoencoder is frozen, not a part of the training state

    def forward(self, source: Source, pose: Tensor, *examples: Tensor) -> Tensor:
        student = self._student[0]
        condition = student.condition(source, pose)
        if self.config.method == "endpoint":
            return self._endpoint(student, condition, *examples)
        x, t, d, velocity = examples
        return targets.pseudo_huber(student.average_velocity(x, t, d, condition).float() - velocity)

    def _endpoint(self, student: Student, condition: Tensors, *wanted: Tensor) -> Tensor:
        """Unroll all steps with gradient; the end counts fully, the states on the way by half, edges after decoding."""
        states = student.path(wanted[0], condition, self.config.steps)
        errors = [targets.pseudo_huber(made - want) for made, want in zip(states[1:], wanted[1:], strict=True)]
        loss = 0.5 * (torch.stack(errors).sum() + errors[-1])
        if self.config.perceptual_weight:
            few = self.config.perceptual_images
            tensors = {name: tensor[:few] for name, tensor in condition.items()}
            image = student.autoencoder.decode(states[-1][:few], tensors)
            with torch.no_grad():
                reference = student.autoencoder.decode(wanted[-1][:few], tensors)
            perceptual = sum(F.l1_loss(a, b) for a, b in zip(edges(image), edges(reference), strict=True))
            loss = loss + self.config.perceptual_weight * perceptual
        return loss


def examples(
    states: Tensor, config: DistillConfig, rng: np.random.Generator, fixed: bool = False
) -> tuple[Tensor, ...]:
    """What a method learns from paths (B, grid + 1, C, h, w): x, t, d and velocity, or the states of an endpoint.

    ``fixed``: the network knows no step size, so a flow map is learnt for the config's steps alone.
    """
    if config.method == "endpoint":
        return tuple(targets.endpoint(states, config.steps))
    if config.method == "reflow":
        target = targets.reflow(states, rng)
    else:
        target = targets.flowmap(states, rng, config.steps if fixed else None)
    return target.x, target.t, target.d, target.velocity


def create_student(
    teacher: Teacher, config: DistillConfig, network: RPFMConfig | None = None, start: Network | None = None
) -> Student:
    """A student that begins as a copy of ``start``, otherwise of the teacher's network, if it brings one.

    Its architecture is that of these weights, and a ``network`` that differs is refused; without any it is a fresh
    ``network``. With ``flowmap`` it gets a step embedding, if it has none and there is a way, that starts at zero, so
    it begins as what it was.
    """
    if config.method not in METHODS:
        raise ConfigError(f"unknown method {config.method!r}", expected=f"one of {METHODS}", fix="check the spelling")
    if config.method != "reflow" and config.steps not in MAP_STEPS:
        expected = f"1, 2, 4 or 8, which the stored paths have, for {config.method}"
        raise ConfigError(f"{config.steps} steps", expected=expected, fix="choose one of them")
    brought = getattr(teacher, "network", None)
    if isinstance(brought, Network) and (network is None or isinstance(brought, type(create_network(network)))):
        start = start or brought
    if start is not None:
        _check_start(teacher, config, network, start)
    elif network is None:
        raise ConfigError(
            "a teacher that brings no network", expected="the student's architecture", fix="give a preset: --preset xs"
        )
    else:
        start = create_network(network)
    assert isinstance(teacher.autoencoder, nn.Module)
    copy = start.as_student(step=config.method == "flowmap")
    if config.lora:
        lora.add(copy, config.lora)
    if config.gradient_checkpointing:
        lora.checkpoint_gradients(copy)
    return Student(copy, teacher.autoencoder)


def _check_start(teacher: Teacher, config: DistillConfig, network: RPFMConfig | None, start: Network) -> None:
    """A student can start from a network whose latents are the teacher's, and which is the one that was asked for."""
    given: dict[str, Any] = {"latents": tuple(start.latent_shape), "pictures": tuple(start.size)}
    wanted: dict[str, Any] = {"latents": tuple(teacher.latent_shape), "pictures": tuple(teacher.size)}
    if network is not None:
        own, other = start.describe() | {"step_embedding": False}, asdict(network)
        differing = [key for key in other if own.get(key) != other[key]]
        given["architecture"], wanted["architecture"] = ({k: one.get(k) for k in differing} for one in (own, other))
    for name, value in wanted.items():
        if given[name] != value:
            raise ConfigError(
                f"the network to start from has {name} {given[name]}",
                expected=str(value),
                fix="start from another one" + (", or leave the preset out" if name == "architecture" else ""),
            )
    if start.step is not None and config.method == "reflow":
        raise ConfigError(
            "reflow, whose network knows no step size, cannot start from one that does",
            expected="a reflow student, or none",
            fix="distill by flowmap or endpoint from it",
        )


def train_student(
    student: Student, data: EncodedSplit, store: Trajectories, config: DistillConfig, checkpoint: Path
) -> tuple[Student, History]:
    """Distill on stored paths and return the EMA student. Resumes from ``checkpoint``."""
    loss, data = DistillLoss(student, config), replace(data, pose=student.network.pose_kind)
    groups, fixed = len(store.states) // store.targets_per_source, student.network.step is None

    def step_loss(model: nn.Module, step: int, rng: np.random.Generator) -> Tensor:
        device = next(model.parameters()).device
        chosen = rng.choice(groups, size=min(groups, max(1, config.batch // store.targets_per_source)), replace=False)
        rows = (chosen[:, None] * store.targets_per_source + np.arange(store.targets_per_source)).ravel()
        first = rows[:: store.targets_per_source]
        shape = (len(chosen), store.targets_per_source)
        batch = data.batch(store.sources[first], store.targets[rows].reshape(shape), store.flips[first], device)
        paths = store.states[torch.from_numpy(rows).to(store.states.device)].to(device).float()
        return model(batch.source, batch.pose, *examples(paths, config, rng, fixed))

    ema, history = fit(loss, step_loss, config.train, checkpoint, config.method)
    if config.lora:
        lora.merge(ema.network)
    return Student(ema.network, student.autoencoder), history


# Artifact ------------------------------------------------------------------------------------------------------------


def save_student(
    student: Student,
    out: Path,
    config: DistillConfig,
    size: tuple[int, int],
    lineage: tuple[Stage, ...],
    dtype: torch.dtype = torch.float32,
    **facts: Any,
) -> Artifact:
    """Write the artifact of a student; ``facts`` join its config."""
    record = {
        **describe(student.network, student.autoencoder),
        "size": list(size),
        "method": config.method,
        "steps": config.steps,
        "fit": student.network.fit,
        "latent_shape": list(student.network.latent_shape),
        "fixed_steps": config.method == "flowmap" and student.network.step is None,
        **facts,
    }
    with artifact.replacing_folder(out, "student") as folder:
        save_weights(student.network, folder / "network.safetensors", dtype)
        save_weights(student.autoencoder, folder / "autoencoder.safetensors", dtype)
        artifact.seal(folder, "student", record, {}, lineage)
    return artifact.load(out, "student")


def load_student(path: str | Path) -> tuple[Student, Artifact]:
    """The student of an artifact's path or shipped name, with the artifact."""
    loaded = artifact.load(shipped.resolve(path), "student")
    network, autoencoder = create(loaded.config)
    load_weights(network, loaded.file("network.safetensors"))
    load_weights(autoencoder, loaded.file("autoencoder.safetensors"))
    return Student(network, autoencoder).eval().requires_grad_(False), loaded
