"""What the convolutional networks are made of: no normalisation anywhere, so that they are cheap and quantize well."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions around a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # starts as the identity, which lets an unnormalised stack train
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def stack(width: int, count: int) -> nn.Sequential:
    """Residual blocks, one after the other."""
    return nn.Sequential(*(ResidualBlock(width) for _ in range(count)))


def down(before: int, after: int) -> nn.Sequential:
    """Half the size."""
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * before, after, 1))


def up(before: int, after: int) -> nn.Sequential:
    """Twice the size."""
    return nn.Sequential(nn.Conv2d(before, 4 * after, 1), nn.PixelShuffle(2))


def unshuffled(x: Tensor, weight: Tensor, factor: int, bias: Tensor | None = None) -> Tensor:
    """What a 1 × 1 convolution makes of ``x`` unshuffled, by one with strides, which needs no copy of ``x``."""
    return F.conv2d(x, weight.reshape(len(weight), -1, factor, factor), bias, stride=factor)


def by_parts(x: Tensor, layer: nn.Conv2d, parts: tuple[int, ...]) -> list[Tensor]:
    """What a 1 × 1 convolution makes of ``x``, part by part: cutting the whole is slower than that."""
    weights, biases = layer.weight.split(parts), layer.bias.split(parts)
    return [F.conv2d(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def inner_convolutions(layers: nn.Sequential, prefix: str) -> list[tuple[str, nn.Module]]:
    """The convolutions of a sequence by name, but for those right behind an unshuffle."""
    behind = {b for a, b in pairwise(layers) if isinstance(a, nn.PixelUnshuffle)}
    modules = layers.named_modules(prefix=prefix)
    return [(name, m) for name, m in modules if isinstance(m, nn.Conv2d) and m not in behind]
