"""Autoencoders: images in [-1, 1] ↔ latents of zero mean and unit deviation, one contract for all.

An autoencoder is a module with ``latent_channels``, ``factor`` (pixels per latent), ``encode`` and ``decode``. Two
are here: a small convolutional one for the device, and diffusers' ``AutoencoderKL`` read from a local folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.blocks import ResidualBlock, by_parts, inner_convolutions, unshuffled, up
from distill.resident import as_model
from distill.train import History, TrainConfig, fit
from rpfm_edge.core.errors import ConfigError

FEATURES, MASKS = 32, 9  # channels of the aligned source's features and masks
ALIGNED = ("moved_photo", "moved_features", "masks")  # at the pictures' size, at a quarter and at half of it


class Autoencoder(Protocol):
    """What the teacher, the distiller and the exporter need of an autoencoder."""

    latent_channels: int
    factor: int

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → (B, C, H/f, W/f), deterministic, normalised."""

    def decode(self, latent: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The inverse of ``encode``; values may leave [-1, 1] slightly. ``tensors``: the frame's, by name, for B
        pictures, where they are at hand; a decoder may look at them."""


@dataclass(frozen=True, slots=True)
class SmallAutoencoderConfig:
    """Widths and residual blocks at 1/2, 1/4 and 1/8 of the image."""

    latent_channels: int = 8
    widths: tuple[int, ...] = (32, 64, 96)
    encoder_blocks: tuple[int, ...] = (1, 1, 2)
    decoder_blocks: tuple[int, ...] = (1, 2, 2)


class SmallAutoencoder(nn.Module):
    """A convolutional autoencoder whose work is done at low resolution; 1.9 GFLOP to decode 256 × 176.

    A linear path (8 × 8 patches to channels and back) runs beside the convolutions, which start at zero: initialised
    with the principal components of the data (``set_principal_components``), training begins at their quality,
    colours included. Latents are normalised by the buffers ``mean`` and ``std`` (per channel), which training measures
    at its end.
    """

    factor = 8

    def __init__(self, config: SmallAutoencoderConfig) -> None:
        super().__init__()
        self.config, self.latent_channels = config, config.latent_channels
        widths, channels = config.widths, config.latent_channels
        self.patches_to_latent = nn.Conv2d(3 * self.factor**2, channels, 1)
        self.latent_to_patches = nn.Conv2d(channels, 3 * self.factor**2, 1)

        encoder: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1)]
        for level, width in enumerate(widths):
            if level:
                encoder += [nn.PixelUnshuffle(2), nn.Conv2d(4 * widths[level - 1], width, 1)]
            encoder += [ResidualBlock(width) for _ in range(config.encoder_blocks[level])]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(widths[-1], channels, 3, padding=1))

        decoder: list[nn.Module] = [nn.Conv2d(channels, widths[-1], 3, padding=1)]
        for level in reversed(range(len(widths))):
            decoder += [ResidualBlock(widths[level]) for _ in range(config.decoder_blocks[level])]
            if level:
                decoder += [nn.Conv2d(widths[level], 4 * widths[level - 1], 1), nn.PixelShuffle(2)]
        self.decoder = nn.Sequential(*decoder, nn.ReLU(), nn.Conv2d(widths[0], 12, 3, padding=1), nn.PixelShuffle(2))

        for layer in (self.encoder[-1], self.decoder[-2]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def raw_encode(self, image: Tensor) -> Tensor:
        """The latent before normalisation."""
        return self.patches_to_latent(F.pixel_unshuffle(image, self.factor)) + self.encoder(image)

    def raw_decode(self, latent: Tensor) -> Tensor:
        """The image of a latent that is not normalised."""
        return F.pixel_shuffle(self.latent_to_patches(latent), self.factor) + self.decoder(latent)

    def int8_layers(self) -> dict[str, nn.Module]:
        """What ``quantize`` turns into INT8, by name: convolutions but for the decoder's ends."""
        return self._inner_layers("decoder")

    def _inner_layers(self, *parts: str) -> dict[str, nn.Module]:
        decoder = [one for part in parts for one in inner_convolutions(getattr(self, part), part)]
        return dict([*inner_convolutions(self.encoder, "encoder"), *decoder[1:-1]])

    def encode(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → (B, C, H/8, W/8), normalised."""
        return (self.raw_encode(image) - self.mean) / self.std

    def decode(self, latent: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """(B, C, h, w) → (B, 3, 8h, 8w); the latent is all it looks at."""
        return self.raw_decode(latent * self.std + self.mean)


class AlignedAutoencoder(SmallAutoencoder):
    """``SmallAutoencoder``'s encoder, and a decoder that sees the aligned source: what that shows is taken from it, by
    a learnt mask; 1.2 GFLOP to decode 256 × 176.

    Without a source, as where a picture is only encoded and decoded, it sees pixels, features and masks of zero.
    """

    def __init__(self, config: SmallAutoencoderConfig) -> None:
        super().__init__(config)
        a, b, c = config.widths
        channels = config.latent_channels
        del self.decoder
        self.low = nn.Sequential(nn.Conv2d(channels, c, 3, padding=1), ResidualBlock(c), up(c, b))
        self.join_fine = nn.Conv2d(FEATURES + MASKS, b, 1)
        self.middle = nn.Sequential(ResidualBlock(b), up(b, a))
        self.join_moved = nn.Conv2d(12 + MASKS, a, 1)
        self.high = nn.Sequential(ResidualBlock(a), nn.ReLU(), nn.Conv2d(a, 24, 1))
        nn.init.zeros_(self.high[2].weight)
        with torch.no_grad():
            self.high[2].bias.copy_(torch.tensor([0.0] * 12 + [-1.0] * 12))

    def int8_layers(self) -> dict[str, nn.Module]:
        """As of the other, in the three parts of its decoder."""
        return self._inner_layers("low", "middle", "high")

    def raw_decode(self, latent: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The image of a latent that is not normalised."""
        moved, fine, masks = _aligned(latent, tensors or {})
        x = self.low(latent) + self.join_fine(torch.cat([fine, F.avg_pool2d(masks, 2)], dim=1))
        pixels, others = self.join_moved.weight.split([12, MASKS], dim=1)
        x = self.middle(x) + unshuffled(moved, pixels, 2, self.join_moved.bias) + F.conv2d(masks, others)
        change, trust = (F.pixel_shuffle(part, 2) for part in by_parts(self.high[:-1](x), self.high[-1], (12, 12)))
        drawn = F.pixel_shuffle(self.latent_to_patches(latent), self.factor) + change
        return drawn + torch.sigmoid(trust) * (moved - drawn)

    def decode(self, latent: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """(B, C, h, w) → (B, 3, 8h, 8w); of the frame's tensors it looks at those of ``ALIGNED``."""
        return self.raw_decode(latent * self.std + self.mean, tensors)


def _aligned(latent: Tensor, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The aligned source, or zeros in its place, for (B, C, h, w) latents at 1/8."""
    batch, _, height, width = latent.shape
    sizes = zip(ALIGNED, (3, FEATURES, MASKS), (8, 2, 4), strict=True)
    return [
        tensors[name] if name in tensors else latent.new_zeros(batch, channels, scale * height, scale * width)
        for name, channels, scale in sizes
    ]


class KLAutoencoder(nn.Module):
    """diffusers' ``AutoencoderKL`` (the SD VAE family), ``AutoencoderTiny`` or ``AutoencoderDC``. Its scaling factor
    and shift, and its channels' means and deviations, if it has any, become our normalisation."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.latent_channels = int(vae.config.latent_channels)
        mean, deviation = (vae.config.get(f"latents_{one}") for one in ("mean", "std"))  # of each channel
        scale = torch.full((self.latent_channels,), float(vae.config.scaling_factor))
        shift = torch.full((self.latent_channels,), float(vae.config.get("shift_factor") or 0.0))
        if mean is not None and deviation is not None:
            scale, shift = scale / torch.tensor(deviation, dtype=torch.float32), torch.tensor(mean, dtype=torch.float32)
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)
        widths = ("block_out_channels", "encoder_block_out_channels")
        self.factor = 2 ** (len(next(vae.config[name] for name in widths if name in vae.config)) - 1)

    def without_decoder(self) -> KLAutoencoder:
        """A copy that encodes and no more, so that nobody carries a large decoder that nobody runs."""
        copy = deepcopy(self)
        copy.vae.decoder, copy.vae.post_quant_conv = nn.Identity(), None
        return copy

    def encode(self, image: Tensor) -> Tensor:
        """The mode of the posterior, if there is one, so that the same image always has the same latent."""
        found = self.vae.encode(image)
        latent = found.latent_dist.mode() if hasattr(found, "latent_dist") else found[0]
        return (latent - self.shift) * self.scale

    def decode(self, latent: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """(B, C, h, w) → (B, 3, f h, f w); the latent is all it looks at."""
        return self.vae.decode(latent / self.scale + self.shift).sample


class Pixels(nn.Module):
    """No autoencoder: pictures are their own latents."""

    latent_channels, factor = 3, 1

    def encode(self, image: Tensor) -> Tensor:
        """The image."""
        return image

    def decode(self, latent: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The latent."""
        return latent


def load_kl(folder: Path | str) -> KLAutoencoder:
    """Read one of diffusers' autoencoders from a local folder (``config.json`` and safetensors); never downloads."""
    import diffusers

    try:
        name = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("_class_name", DIFFUSERS[0])
        if name not in DIFFUSERS:
            raise ValueError(f"it is a {name}")
        vae = getattr(diffusers, name).from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} holds no {', '.join(DIFFUSERS[:-1])} or {DIFFUSERS[-1]} ({str(error).splitlines()[0]})",
            expected="a folder with config.json and diffusion_pytorch_model.safetensors",
            fix="copy the VAE folder of a diffusers model there",
        ) from None
    return KLAutoencoder(vae.eval().requires_grad_(False))


DIFFUSERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")
_CONVOLUTIONAL = {"small": SmallAutoencoder, "aligned": AlignedAutoencoder}


def create(config: dict[str, Any]) -> nn.Module:
    """The autoencoder that a teacher's or student's manifest describes, without its weights."""
    if config["kind"] in _CONVOLUTIONAL:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k != "kind"}
        return _CONVOLUTIONAL[config["kind"]](SmallAutoencoderConfig(**fields))
    if config["kind"] == "kl":
        import diffusers

        made = KLAutoencoder(getattr(diffusers, config.get("class", DIFFUSERS[0])).from_config(config["config"]))
        return made if config.get("decoder", True) else made.without_decoder()
    raise ConfigError(
        f"unknown autoencoder {config['kind']!r}", expected="small, aligned or kl", fix="check the manifest"
    )


def is_known(autoencoder: nn.Module) -> bool:
    """Whether ``describe`` and ``create`` know its kind."""
    return isinstance(autoencoder, SmallAutoencoder | KLAutoencoder)


def describe(autoencoder: nn.Module) -> dict[str, Any]:
    """The config that ``create`` turns into the same architecture."""
    if isinstance(autoencoder, SmallAutoencoder):
        kind = "aligned" if isinstance(autoencoder, AlignedAutoencoder) else "small"
        return {"kind": kind, **asdict(autoencoder.config)}
    if isinstance(autoencoder, KLAutoencoder):
        config = {k: v for k, v in autoencoder.vae.config.items() if not k.startswith("_")}  # where it was read from, …
        whole, name = not isinstance(autoencoder.vae.decoder, nn.Identity), type(autoencoder.vae).__name__
        return {"kind": "kl", "class": name, "config": config, "decoder": whole}
    raise ConfigError(
        f"autoencoder {type(autoencoder).__name__}", expected="SmallAutoencoder or KLAutoencoder", fix="wrap it in one"
    )


LATENT_NOISE = 0.05  # relative to each channel's deviation, during training


def edges(image: Tensor) -> tuple[Tensor, Tensor]:
    """Finite differences down and across."""
    return image[..., 1:, :] - image[..., :-1, :], image[..., :, 1:] - image[..., :, :-1]


def reconstruction_loss(output: Tensor, image: Tensor) -> Tensor:
    """L1 of the pixels and of their differences (edges carry the garment's pattern), and L2 for PSNR."""
    gradient = sum(F.l1_loss(a, b) for a, b in zip(edges(output), edges(image), strict=True))
    return F.l1_loss(output, image) + F.mse_loss(output, image) + gradient


def training_loss(autoencoder: SmallAutoencoder, image: Tensor, noise: Tensor) -> Tensor:
    """Reconstruction through slightly noisy latents: the decoder must forgive what the flow model gets wrong.

    The weak penalty on the latents' size only keeps their scale from drifting. ``noise`` is shaped like the latents.
    """
    latent = autoencoder.raw_encode(image)
    noisy = latent + LATENT_NOISE * latent.detach().std((0, 2, 3), keepdim=True) * noise.to(latent)
    return reconstruction_loss(autoencoder.raw_decode(noisy), image) + 1e-3 * latent.square().mean()


@torch.no_grad()
def set_principal_components(autoencoder: SmallAutoencoder, images: Tensor) -> None:
    """Initialise the linear path with the whitened principal components of the patches of ``images`` (B, 3, H, W)."""
    patches = F.pixel_unshuffle(images, autoencoder.factor).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = patches.mean(0)
    variances, components = torch.linalg.eigh(torch.cov((patches - mean).T))
    basis = components.flip(1)[:, : autoencoder.latent_channels]
    deviation = variances.flip(0)[: autoencoder.latent_channels].sqrt()
    down, up = (basis / deviation).T, basis * deviation
    autoencoder.patches_to_latent.weight.copy_(down[:, :, None, None])
    autoencoder.patches_to_latent.bias.copy_(-down @ mean)
    autoencoder.latent_to_patches.weight.copy_(up[:, :, None, None])
    autoencoder.latent_to_patches.bias.copy_(mean)


@torch.no_grad()
def normalise(autoencoder: SmallAutoencoder, images: list[Tensor]) -> None:
    """Measure the latents of ``images`` (batches in [-1, 1]) and set ``mean`` and ``std`` from them."""
    latents = torch.cat([autoencoder.raw_encode(batch).float() for batch in images])
    autoencoder.mean.copy_(latents.mean((0, 2, 3), keepdim=True))
    autoencoder.std.copy_(latents.std((0, 2, 3), keepdim=True))


@dataclass(frozen=True, slots=True)
class AutoencoderTraining:
    """How a small autoencoder is trained: full height, ``crop_width`` random columns, mirrored half of the time."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=2e-3, warmup_steps=50, ema=0.995))
    batch: int = 8
    crop_width: int = 128


class _Loss(nn.Module):
    def __init__(self, autoencoder: SmallAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        return training_loss(self.autoencoder, image, noise)


def train_autoencoder(
    autoencoder: SmallAutoencoder,
    pictures: Callable[[np.ndarray], Tensor],
    count: int,
    config: AutoencoderTraining,
    checkpoint: Path,
) -> tuple[SmallAutoencoder, History]:
    """Train on ``count`` images and return the EMA, normalised. Resumes from ``checkpoint``.

    ``pictures(indices)`` are those images as (n, H, W, 3) uint8, on any device (``resident.Pictures``).
    """
    factor, channels = autoencoder.factor, autoencoder.latent_channels

    def step_loss(model: nn.Module, step: int, rng: np.random.Generator) -> Tensor:
        device = next(model.parameters()).device
        images = pictures(rng.integers(0, count, config.batch)).to(device)
        left = int(rng.integers(0, max(0, images.shape[2] - config.crop_width) + 1)) // 8 * 8
        images = images[:, :, left : left + config.crop_width]
        images = as_model(images.flip(2) if rng.random() < 0.5 else images)
        draw = torch.Generator(device).manual_seed(int(rng.integers(2**63)))
        shape = (len(images), channels, images.shape[2] // factor, images.shape[3] // factor)
        noise = torch.randn(shape, generator=draw, device=device)
        return model(images.contiguous(memory_format=torch.channels_last), noise)

    few = np.linspace(0, count - 1, min(count, 344)).astype(int)
    if not checkpoint.exists():
        set_principal_components(autoencoder, as_model(pictures(few).cpu()).contiguous())
    module = _Loss(autoencoder.to(memory_format=torch.channels_last))
    ema, history = fit(module, step_loss, config.train, checkpoint, "autoencoder")
    trained = ema.autoencoder
    device = next(trained.parameters()).device
    batches = (few[i : i + 8] for i in range(0, len(few), 8))
    normalise(trained, [as_model(pictures(batch).to(device)).contiguous() for batch in batches])
    return trained, history
