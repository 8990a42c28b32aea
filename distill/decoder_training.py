"""Training of a decoder that sees the aligned source: on true latents, and on those of the teacher in few steps.

So it learns where the moved pixels are right, and forgives what the flow gets wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.autoencoder import ALIGNED, LATENT_NOISE, AlignedAutoencoder, SmallAutoencoder, edges, reconstruction_loss
from distill.batches import EncodedSplit
from distill.condition import Tensors
from distill.teacher import NetworkTeacher, sample_teacher
from distill.train import History, TrainConfig, fit
from rpfm_edge.people.data import draw_batch

TEXTURE = 3.0  # weight of textures beside pixels, edges and squares


@dataclass(frozen=True, slots=True)
class DecoderTraining:
    """What a decoder is trained with. ``true_share`` of the latents are the pictures' own, slightly noisy; the others
    are sampled in one of ``steps``, by these odds. ``blank_share`` of the batches see no source."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=1e-3, warmup_steps=50, ema=0.998))
    sources: int = 2
    targets_per_source: int = 6
    true_share: float = 0.25
    blank_share: float = 0.04
    steps: tuple[int, ...] = (1, 2, 4)
    odds: tuple[float, ...] = (0.5, 0.3, 0.2)
    joint_noise_px: float = 1.0


def with_aligned_decoder(autoencoder: SmallAutoencoder) -> AlignedAutoencoder:
    """The same encoder, and a fresh decoder that begins with the linear path."""
    made = AlignedAutoencoder(autoencoder.config)
    made.load_state_dict(autoencoder.state_dict(), strict=False)
    for part in (made.encoder, made.patches_to_latent):  # the latents are those that the teacher learnt
        part.requires_grad_(False)
    return made


class DecoderLoss(nn.Module):
    """The autoencoder's own loss, with twice the weight on squares, and textures."""

    def __init__(self, autoencoder: AlignedAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent: Tensor, truth: Tensor, tensors: Tensors) -> Tensor:
        image = self.autoencoder.decode(latent, tensors).float()
        return reconstruction_loss(image, truth) + F.mse_loss(image, truth) + TEXTURE * texture_loss(image, truth)


def texture_loss(output: Tensor, image: Tensor) -> Tensor:
    """How far edges are too weak or too strong on average over windows of 8 and 16 pixels.

    Where a pattern is a pixel off, errors of pixels are least for a blur; this one forgives the pixel, not the blur.
    """
    losses = [
        F.l1_loss(F.avg_pool2d(a.abs(), window, window // 2), F.avg_pool2d(b.abs(), window, window // 2))
        for window in (8, 16)
        for a, b in zip(edges(output), edges(image), strict=True)
    ]
    return torch.stack(losses).mean()


@torch.no_grad()
def draw_decoding(
    data: EncodedSplit, teacher: NetworkTeacher, config: DecoderTraining, rng: np.random.Generator, steps: int
) -> tuple[Tensor, Tensor, Tensors]:
    """Latents, true pictures and the decoder's tensors for a batch; ``steps`` 0: all latents are true and exact."""
    device = next(teacher.network.parameters()).device
    sources, targets, flips = draw_batch(data.split, config.sources, config.targets_per_source, rng)
    batch = data.batch(sources, targets, flips, device)
    draw = torch.Generator().manual_seed(int(rng.integers(2**63)))
    joints = batch.source.joints
    jitter = config.joint_noise_px * torch.randn(joints.shape, generator=draw).to(device)
    condition = teacher.condition(batch.source._replace(joints=joints + jitter), batch.pose)
    truth = data.pixels(targets.ravel(), flips.repeat(config.targets_per_source)).to(device)
    assert batch.target is not None
    latent = batch.target
    if steps:
        noise = torch.randn(latent.shape, generator=draw).to(device)
        true = torch.rand(len(latent), generator=draw).to(device) < config.true_share
        made = sample_teacher(teacher, noise, condition, steps)[-1]
        latent = torch.where(true[:, None, None, None], latent + LATENT_NOISE * noise, made)
    return latent, truth, {name: condition[name] for name in ALIGNED}


def train_decoder(
    autoencoder: AlignedAutoencoder,
    teacher: NetworkTeacher,
    data: EncodedSplit,
    config: DecoderTraining,
    checkpoint: Path,
    validation: EncodedSplit | None = None,
) -> tuple[AlignedAutoencoder, History]:
    """Train the decoder behind a frozen teacher and return the EMA. Resumes from ``checkpoint``.

    With ``validation`` the history holds the loss there, on latents of one step.
    """

    def step_loss(model: nn.Module, step: int, rng: np.random.Generator) -> Tensor:
        steps = int(rng.choice(config.steps, p=config.odds))
        latent, truth, tensors = draw_decoding(data, teacher, config, rng, steps)
        return model(latent, truth, {} if rng.random() < config.blank_share else tensors)

    watch = held_out_decoding(validation, teacher, config) if validation else None
    ema, history = fit(DecoderLoss(autoencoder), step_loss, config.train, checkpoint, "decoder", watch)
    return ema.autoencoder, history


def held_out_decoding(
    data: EncodedSplit, teacher: NetworkTeacher, config: DecoderTraining
) -> Callable[[nn.Module], float]:
    """The loss on pictures that are always the same, from the teacher's latents of one step."""
    rng, plain = np.random.default_rng(0), DecoderTraining(true_share=0.0, joint_noise_px=0.0)
    batches = [draw_decoding(data, teacher, plain, rng, 1) for _ in range(4)]

    def evaluate(model: nn.Module) -> float:
        return float(np.mean([float(model(*batch)) for batch in batches]))

    return evaluate
