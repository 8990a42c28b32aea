"""A small decoder for any latent space, trained against the decoder that a teacher came with.

Stable Diffusion's decoder is 99 % of a frame on a CPU. This one is of ``SmallAutoencoder``'s kind: convolutions at low
resolution beside a linear path from latents to patches, which is fitted by least squares before the training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.autoencoder import Autoencoder, reconstruction_loss
from distill.blocks import ResidualBlock
from distill.train import History, TrainConfig, fit
from rpfm_edge.core.errors import ConfigError

SHARES = (1, 2, 3, 4)  # of the first width, at 1/2, 1/4, 1/8 and 1/16 of the pictures
BLOCKS = (1, 2, 2, 2)
STEP = 4  # widths are multiples of it
SIZES = (0.5, 1.0, 2.0, 4.0)  # GFLOP


@dataclass(frozen=True, slots=True)
class SmallDecoderConfig:
    """Latent channels, pixels per latent, and the width at half of the pictures' size."""

    latent_channels: int
    factor: int
    width: int

    @property
    def levels(self) -> int:
        """How often the size is doubled."""
        return self.factor.bit_length() - 1


class SmallDecoder(nn.Module):
    """(B, C, h, w) → (B, 3, f h, f w) in about [-1, 1]."""

    def __init__(self, config: SmallDecoderConfig) -> None:
        super().__init__()
        self.config, channels, levels = config, config.latent_channels, config.levels
        self.latent_to_patches = nn.Conv2d(channels, 3 * config.factor**2, 1)
        widths = [config.width * share for share in SHARES[:levels]]
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 3, padding=1)]
        for level in reversed(range(levels)):
            layers += [ResidualBlock(widths[level]) for _ in range(BLOCKS[level])]
            if level:
                layers += [nn.Conv2d(widths[level], 4 * widths[level - 1], 1), nn.PixelShuffle(2)]
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(widths[0], 12, 3, padding=1), nn.PixelShuffle(2))
        last = self.layers[-2]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, latent: Tensor) -> Tensor:
        """The picture of a latent."""
        return F.pixel_shuffle(self.latent_to_patches(latent), self.config.factor) + self.layers(latent)


class WithDecoder(nn.Module):
    """A codec with the encoder of one and a small decoder."""

    def __init__(self, encoder: nn.Module, decoder: SmallDecoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.latent_channels, self.factor = encoder.latent_channels, encoder.factor

    def encode(self, image: Tensor) -> Tensor:
        """As the encoder's codec does."""
        latent: Tensor = self.encoder.encode(image)
        return latent

    def decode(self, latent: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The latent is all it looks at."""
        picture: Tensor = self.decoder(latent)
        return picture


def multiplications(config: SmallDecoderConfig, size: tuple[int, int]) -> int:
    """Multiply-adds of a picture of ``size``."""
    pixels = size[0] * size[1]
    total = config.latent_channels * (3 * config.factor**2) * pixels // config.factor**2
    widths = [config.width * share for share in SHARES[: config.levels]]
    total += 9 * config.latent_channels * widths[-1] * pixels // config.factor**2 + 9 * widths[0] * 12 * pixels // 4
    for level, width in enumerate(widths):
        here = pixels // 4 ** (level + 1)
        total += 18 * BLOCKS[level] * width**2 * here
        total += 4 * width * widths[level - 1] * here if level else 0
    return total


def sized(codec: Autoencoder, size: tuple[int, int], gflop: float) -> SmallDecoderConfig:
    """The widest decoder of a codec's latents that takes at most ``gflop`` for a picture of ``size``."""
    if codec.factor not in (4, 8, 16):
        raise ConfigError(
            f"a codec with {codec.factor} pixels per latent", expected="4, 8 or 16", fix="its own decoder stays"
        )
    fitting = [
        config
        for width in range(STEP, 257, STEP)
        if 2e-9 * multiplications(config := SmallDecoderConfig(codec.latent_channels, codec.factor, width), size)
        <= gflop
    ]
    if not fitting:
        raise ConfigError(f"{gflop:g} GFLOP for a decoder", expected=f"such as {SIZES}", fix="ask for more")
    return fitting[-1]


@dataclass(frozen=True, slots=True)
class SmallDecoderTraining:
    """Crops of ``crop`` latents, with noise of up to ``noise`` of their deviation: a student's latents are never
    exact."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=2e-3, warmup_steps=50, ema=0.995))
    batch: int = 8
    crop: int = 16
    noise: float = 0.1


class _Loss(nn.Module):
    def __init__(self, decoder: SmallDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latent: Tensor, wanted: Tensor) -> Tensor:
        made = self.decoder(latent).float()
        return reconstruction_loss(made, wanted) + F.mse_loss(made, wanted)


def train_small_decoder(
    decoder: SmallDecoder,
    codec: Autoencoder,
    latents: Tensor,
    config: SmallDecoderTraining,
    checkpoint: Path,
    others: Tensor | None = None,
) -> tuple[SmallDecoder, History]:
    """Train on latents (n, C, h, w) against what the codec decodes of the same, and return the EMA. Resumes from
    ``checkpoint``. Of every batch half is from ``others``, such as a student's, where they are given."""

    def draw(rng: np.random.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        half = config.batch // 2 if others is not None else config.batch
        some = latents[torch.from_numpy(rng.integers(0, len(latents), half))]
        if others is not None:
            some = torch.cat([some, others[torch.from_numpy(rng.integers(0, len(others), config.batch - half))]])
        top, left = (int(rng.integers(0, max(0, side - config.crop) + 1)) for side in some.shape[2:])
        exact = some[:, :, top : top + config.crop, left : left + config.crop].to(device).float()
        noise = torch.from_numpy(rng.standard_normal(exact.shape, dtype=np.float32)).to(device)
        noisy = exact + config.noise * float(rng.random()) * noise
        with torch.no_grad():
            return noisy, codec.decode(exact).float()

    def step_loss(model: nn.Module, step: int, rng: np.random.Generator) -> Tensor:
        return model(*draw(rng, next(model.parameters()).device))

    if not checkpoint.exists():
        _fit_linear_path(decoder, *draw(np.random.default_rng(config.train.seed), torch.device("cpu")))
    ema, history = fit(_Loss(decoder), step_loss, config.train, checkpoint, "decoder")
    return ema.decoder, history


@torch.no_grad()
def _fit_linear_path(decoder: SmallDecoder, latent: Tensor, wanted: Tensor) -> None:
    """From latents to patches, by least squares."""
    patches = F.pixel_unshuffle(wanted, decoder.config.factor).permute(0, 2, 3, 1).flatten(0, 2).double()
    given = latent.permute(0, 2, 3, 1).flatten(0, 2).double()
    given = torch.cat([given, torch.ones(len(given), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(given, patches).solution.float()
    decoder.latent_to_patches.weight.copy_(solution[:-1].T[:, :, None, None])
    decoder.latent_to_patches.bias.copy_(solution[-1])


@torch.no_grad()
def seconds_of(decode: Callable[[Tensor], Any], latent: Tensor, runs: int = 5) -> float:
    """The median time of a call, after one that does not count."""
    decode(latent)
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        decode(latent)
        times.append(time.perf_counter() - begun)
    return float(np.median(times))
