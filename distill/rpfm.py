"""The RPFM network: a DiT that predicts dz/dt of a latent, given the latent of a source image and a pose (arXiv
2505.03562).

The paper gives no code; what it leaves open is read here so that the device is fast:

- Blocks are DiT's with adaLN-Zero (arXiv 2212.09748), in X-MDPT's sizes (arXiv 2402.01516).
- The pose is aligned with the target in space, so its features are concatenated to ``x_t`` on channels.
- The source runs through the same blocks as tokens of its own, without time and noise, and never sees the target.
  The target
  attends to target and source keys together. So the source's keys and values depend on the identity alone: they are
  computed once per person and are inputs of the per-frame graph.
- adaLN depends on time alone, so in a few-step student, whose times are known, it folds into constants.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.blocks import ResidualBlock, inner_convolutions
from distill.condition import Network, Source, Tensors
from rpfm_edge.core.errors import ConfigError
from rpfm_edge.core.signature import PoseKind


@dataclass(frozen=True, slots=True)
class RPFMConfig:
    """Architecture. ``pose_channels`` 0 means that the pose image goes through the autoencoder, as in the paper;
    otherwise a small convolutional encoder with that many output channels is trained with the network."""

    dim: int
    depth: int
    heads: int
    latent_channels: int = 8
    latent_size: tuple[int, int] = (32, 22)
    factor: int = 8
    patch: int = 2
    mlp_ratio: int = 4
    pose_channels: int = 16
    step_embedding: bool = False
    pose: PoseKind = "skeleton"
    shared_modulation: bool = False  # one adaLN for all blocks, each adding a vector of its own (arXiv 2310.00426)
    start_noise: float = 1.0  # where the flow starts around a prior: the deviation of its noise; latents have 1

    @property
    def tokens(self) -> int:
        """Number of tokens of one latent."""
        return self.latent_size[0] * self.latent_size[1] // self.patch**2

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return (self.latent_channels, *self.latent_size)

    @property
    def source_kv_shape(self) -> tuple[int, ...]:
        """(layers, key or value, heads, tokens, head width): keys and values of one source."""
        return (self.depth, 2, self.heads, self.tokens, self.dim // self.heads)


PRESETS = {
    "xs": RPFMConfig(dim=192, depth=6, heads=3),
    "s": RPFMConfig(dim=384, depth=12, heads=6),
    "b": RPFMConfig(dim=768, depth=12, heads=12),
    "l": RPFMConfig(dim=1024, depth=24, heads=16),
}


# Where the source is aligned, much less is left to the transformer.
_BY_KEYPOINTS = {
    "pose": "keypoints",
    "pose_channels": 48,
    "latent_channels": 12,
    "shared_modulation": True,
    "start_noise": 0.1,
}
_BY_KEYPOINTS_TOO = {"xs": {"depth": 4, "mlp_ratio": 3}}


def preset(name: str, pose: PoseKind = "skeleton", **changes: object) -> RPFMConfig:
    """A named architecture for a kind of pose, with fields replaced."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}", expected=f"one of {sorted(PRESETS)}", fix="check the spelling")
    fields = {**_BY_KEYPOINTS, **_BY_KEYPOINTS_TOO.get(name, {})} if pose == "keypoints" else {}
    return replace(PRESETS[name], **{**fields, **changes})  # type: ignore[arg-type]


class ScalarEmbedding(nn.Module):
    """A number in [0, 1] as sinusoids of 256 frequencies and a two-layer perceptron."""

    def __init__(self, dim: int, zero: bool = False) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.register_buffer(
            "frequencies", 1000 * torch.exp(-math.log(10000) * torch.arange(128) / 128), persistent=False
        )
        if zero:  # a new embedding must not move a trained network
            nn.init.zeros_(self.mlp[2].weight)
            nn.init.zeros_(self.mlp[2].bias)

    def forward(self, value: Tensor) -> Tensor:
        angles = value[:, None].float() * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def zero_linear(before: int, after: int) -> nn.Linear:
    """A linear layer that starts at zero."""
    layer = nn.Linear(before, after)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """Joint attention and a perceptron, each scaled, shifted and gated by adaLN-Zero."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int, shared_modulation: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim), nn.GELU(approximate="tanh"), nn.Linear(mlp_ratio * dim, dim)
        )
        self.modulation = None if shared_modulation else zero_linear(dim, 6 * dim)
        self.table = nn.Parameter(torch.zeros(6 * dim)) if shared_modulation else None

    def forward(self, x: Tensor, condition: Tensor, source: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, N, D) tokens, (B, D) condition, (B, 2, H, N, hd) source keys and values → tokens, own keys and values.

        Where the modulation is shared the condition is (B, 6 D), already modulated.
        """
        modulated = condition + self.table if self.modulation is None else self.modulation(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulated.unsqueeze(1).chunk(6, dim=-1)
        q, k, v = self._heads(self.qkv(self.norm1(x) * (1 + scale1) + shift1))
        own = torch.stack([k, v], dim=1)
        if source is not None:
            k, v = torch.cat([k, source[:, 0]], dim=-2), torch.cat([v, source[:, 1]], dim=-2)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.proj(attended)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2), own

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, width = qkv.shape
        q, k, v = qkv.view(batch, tokens, 3, self.heads, width // (3 * self.heads)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v  # each (B, H, N, hd)


class PoseEncoder(nn.Module):
    """A skeleton image as features at the latent's resolution: cheap, because it runs for every frame."""

    def __init__(self, factor: int, channels: int, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(factor),
            nn.Conv2d(3 * factor**2, width, 1),
            ResidualBlock(width),
            nn.Conv2d(width, channels, 1),
        )

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] → (B, channels, H/f, W/f)."""
        return self.layers(image)


class RPFM(Network):
    """The velocity v(x_t, t | pose, source); with a step embedding the flow map's u(x_t, t, d | pose, source).

    Its pose is a drawn skeleton. Its source's keys and values are the tensor ``source_kv``."""

    frozen: tuple[str, ...] = ("null_source",)

    def __init__(self, config: RPFMConfig) -> None:
        super().__init__()
        self.config, self.latent_shape = config, config.latent_shape
        self.size = (config.factor * config.latent_size[0], config.factor * config.latent_size[1])
        dim, patch, channels = config.dim, config.patch, config.latent_channels
        pose_channels = config.pose_channels or channels
        self.encodes_pose = config.pose == "skeleton" and not config.pose_channels
        by_picture = config.pose == "skeleton" and config.pose_channels
        self.pose_encoder = PoseEncoder(config.factor, pose_channels) if by_picture else None
        self.embed = nn.Linear((channels + pose_channels) * patch**2, dim)
        self.embed_source = nn.Linear(channels * patch**2, dim)
        self.position = nn.Parameter(0.02 * torch.randn(1, config.tokens, dim))
        self.null_source = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.source_condition = nn.Parameter(0.02 * torch.randn(1, dim))
        self.time = ScalarEmbedding(dim)
        self.step = ScalarEmbedding(dim, zero=True) if config.step_embedding else None
        shared = config.shared_modulation
        self.blocks = nn.ModuleList(Block(dim, config.heads, config.mlp_ratio, shared) for _ in range(config.depth))
        self.shared_modulation = zero_linear(dim, 6 * dim) if shared else None
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation, self.head = zero_linear(dim, 2 * dim), zero_linear(dim, channels * patch**2)

    def source(self, source: Source, keep: Tensor | None = None) -> Tensors:
        """``source_kv``: keys and values of every layer for S sources, (S, layers, 2, heads, N, hd).

        ``keep`` (S,) bool: where False the source is replaced by the learned null, for classifier-free guidance.
        """
        return {"source_kv": self.keys_and_values(source.latent, keep)}

    def keys_and_values(self, features: Tensor, keep: Tensor | None) -> Tensor:
        """Of (S, F, h, w) features of the sources, what ``embed_source`` takes."""
        x = self.embed_source(patchify(features, self.config.patch))
        if keep is not None:
            x = torch.where(keep[:, None, None], x, self.null_source.to(x.dtype))
        x = x + self.position
        condition = self._modulated(F.silu(self.source_condition)).expand(len(x), -1)
        collected = []
        for block in self.blocks:
            x, own = block(x, condition, None)
            collected.append(own)
        return torch.stack(collected, dim=1)

    def pose(self, pose: Tensor, tensors: Tensors) -> Tensors:
        """``pose``: features (B, P, h, w) of skeletons (B, 3, H, W), or their latents as they are."""
        return {"pose": pose if self.pose_encoder is None else self.pose_encoder(pose)}

    def null(self, tensors: Tensors) -> Tensors:
        """The learned null in place of the source; zeros in place of the rest."""
        features = self.embed_source.in_features // self.config.patch**2
        nothing = self.position.new_zeros(1, features, *self.config.latent_size)
        learned = self.keys_and_values(nothing, torch.zeros(1, dtype=torch.bool, device=nothing.device))
        return super().null(tensors) | {"source_kv": learned.expand_as(tensors["source_kv"])}

    def as_student(self, step: bool) -> RPFM:
        """A copy whose step embedding, where it gets one, is zero; the null, folded in with the guidance, is frozen."""
        config = replace(self.config, step_embedding=step or self.config.step_embedding)
        student = type(self)(config)
        student.load_state_dict(self.state_dict(), strict=False)
        for name in self.frozen:
            getattr(student, name).requires_grad_(False)
        return student

    def describe(self) -> dict[str, Any]:
        """Its config."""
        return asdict(self.config)

    def int8_layers(self) -> dict[str, nn.Module]:
        """What ``quantize`` turns into INT8, by name: blocks but for the modulation, which becomes a constant of the
        graph, and the pose encoder."""
        found: dict[str, nn.Module] = {}
        for name, block in self.blocks.named_modules(prefix="blocks"):
            if isinstance(block, Block):
                layers = block.named_modules(prefix=name)
                found |= {n: m for n, m in layers if isinstance(m, nn.Linear) and m is not block.modulation}
        if self.pose_encoder is not None:
            found |= dict(inner_convolutions(self.pose_encoder.layers, "pose_encoder.layers")[:-1])
        return found

    def forward(  # type: ignore[override]  # of all tensors it looks at two
        self, x: Tensor, t: Tensor, d: Tensor | None = None, *, pose: Tensor, source_kv: Tensor, **others: Tensor
    ) -> Tensor:
        """Velocity, or average velocity over [t, t + d].

        Args:
            x: (B, C, h, w) latent at time t.
            t: (B,) in [0, 1].
            d: (B,) step size; only with a step embedding, where None means the instantaneous velocity (d = 0).
            pose: (B, P, h, w) from ``pose``.
            source_kv: from ``source``, for B sources.
            others: tensors that it does not look at.
        """
        condition = self.time(t)
        if self.step is not None:
            condition = condition + self.step(torch.zeros_like(t) if d is None else d)
        condition = F.silu(condition)
        tokens = self.embed(patchify(torch.cat([x, pose], dim=1), self.config.patch)) + self.position
        modulated = self._modulated(condition)
        for layer, block in enumerate(self.blocks):
            tokens, _ = block(tokens, modulated, source_kv[:, layer])
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        tokens = self.head(self.norm(tokens) * (1 + scale) + shift)
        return unpatchify(tokens, self.config.patch, self.config.latent_size)

    def _modulated(self, condition: Tensor) -> Tensor:
        return condition if self.shared_modulation is None else self.shared_modulation(condition)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, h, w) → (B, N, C p p), row by row."""
    return F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """(B, N, C p p) → (B, C, h, w): the inverse of ``patchify``."""
    height, width = size[0] // patch, size[1] // patch
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), patch)
