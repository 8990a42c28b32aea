"""Alignment: what a source photo shows, moved to where the target pose wants it.

Two networks. ``SourceEncoder`` looks at the photo, once per identity: features of it at 1/4 and 1/8, a summary, and the
joints of the person. ``Aligner`` runs for every frame: it starts from the limb map (``distill.limbs``), corrects it,
looks at what the source shows there, and corrects it again; and it says for each place of the target whether the source
shows it, and which layer (skin, top, hair, …) is there. The source's pixels and features are then fetched by that map,
with one ``grid_sample`` each.

Where a data set has surface maps (``distill.surface``) the map is taught exactly; otherwise the pictures teach it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.autoencoder import FEATURES
from distill.blocks import ResidualBlock, by_parts, down, stack, unshuffled, up
from distill.limbs import HEIGHT, PARTS, Joints, complete, limb_map
from distill.surface import LAYERS

REACH = 30.0  # frame units that a correction of 1 is worth
SUMMARY, CONTEXT = 128, 64  # channels of a source's summary, and of the aligner's features


class Seen(NamedTuple):
    """What the encoder sees in S photos."""

    fine: Tensor  # (S, 32, H/4, W/4) features
    coarse: Tensor  # (S, 32, H/8, W/8) features
    summary: Tensor  # (S, 128)
    joints: Tensor  # (S, 18, 2) pixels
    scores: Tensor  # (S, 18) logits: that the joint is there
    heat: Tensor  # (S, 18, H/4 W/4) logits of the joints' places
    surface: Tensor  # (S, 3 + 8, H/4, W/4): the body's point in metres, logits of its layer


class SourceEncoder(nn.Module):
    """A U-Net over the photo, from 1/4 to 1/16 and back; 1.7 GFLOP for 256 × 176, once per identity."""

    def __init__(self, widths: tuple[int, int, int] = (48, 96, SUMMARY)) -> None:
        super().__init__()
        a, b, c = widths
        self.stem = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, a, 3, padding=1), ResidualBlock(a))
        self.fall, self.fall_again = nn.Sequential(down(a, b), stack(b, 2)), nn.Sequential(down(b, c), stack(c, 3))
        self.rise, self.coarse_blocks = up(c, b), stack(b, 1)
        self.rise_again, self.fine_blocks = up(b, a), stack(a, 1)
        self.fine, self.coarse = nn.Conv2d(a, FEATURES, 1), nn.Conv2d(b, FEATURES, 1)
        self.heat, self.surface = nn.Conv2d(a, 18, 1), nn.Conv2d(a, 3 + len(LAYERS), 1)
        self.scores = nn.Linear(c, 18)

    def forward(self, pixels: Tensor) -> Seen:
        """(S, 3, H, W) in [-1, 1]."""
        first = self.stem(pixels)
        second = self.fall(first)
        third = self.fall_again(second)
        second = self.coarse_blocks(second + self.rise(third))
        first = F.relu(self.fine_blocks(first + self.rise_again(second)))
        summary, heat = F.relu(third).mean((2, 3)), self.heat(first).float()
        return Seen(
            fine=self.fine(first),
            coarse=self.coarse(F.relu(second)),
            summary=summary,
            joints=expected_places(heat),
            scores=self.scores(summary),
            heat=heat.flatten(2),
            surface=self.surface(first),
        )


def expected_places(heat: Tensor) -> Tensor:
    """(S, 18, h, w) logits at 1/4 → (S, 18, 2) pixels x, y: the mean place under the softmax."""
    share = torch.softmax(heat.flatten(2), dim=2).view(heat.shape)
    x = (share.sum(2) * _centres(heat.shape[3], heat)).sum(2)
    y = (share.sum(3) * _centres(heat.shape[2], heat)).sum(2)
    return 4 * torch.stack([x, y], dim=-1)


def _centres(count: int, like: Tensor) -> Tensor:
    """Centres of ``count`` cells, the first at 0.5."""
    return torch.arange(count, device=like.device, dtype=torch.float32) + 0.5


class Aligned(NamedTuple):
    """What a target pose takes from its source; (B, …) at half the size of the pictures."""

    grid: Tensor  # (B, H/2, W/2, 2): places in the source, as ``grid_sample`` wants them, in [-1, 1]
    seen: Tensor  # (B, 1, H/2, W/2) logits: the source shows it
    layers: Tensor  # (B, 8, H/2, W/2) logits
    context: Tensor  # (B, 64, H/8, W/8) features
    first: Tensor  # (B, H/4, W/4, 2): the grid before the source was looked at, which training teaches, too
    points: Tensor  # (B, 3, H/4, W/4): the body's point in metres, as far as the poses tell


class Aligner(nn.Module):
    """The limb map, corrected twice: a U-Net from 1/4 to 1/16 and back, then a look at the source's features where
    the first correction points, and a second one at 1/2; 0.7 GFLOP a frame for 256 × 176."""

    single = True  # in FP32 in engines of every precision (``runtimes.torch_trt``): a place must not shift

    def __init__(self, size: tuple[int, int], widths: tuple[int, int, int] = (32, CONTEXT, 96)) -> None:
        super().__init__()
        self.size = size
        fine, middle, low = widths
        limbs = PARTS + 1 + 2
        self.pose = nn.Sequential(nn.Linear(4 * 18 + 18, 128), nn.ReLU(), nn.Linear(128, low))
        self.summary = nn.Linear(SUMMARY, low)
        self.stem = nn.Conv2d(4 * limbs + 2 * 18 + 2 + FEATURES, middle, 1)
        self.first, self.fall, self.low = stack(middle, 1), down(middle, low), stack(low, 3)
        self.rise, self.second = up(low, middle), stack(middle, 1)
        self.rise_again, self.join, self.third = up(middle, fine), nn.Conv2d(limbs, fine, 1), stack(fine, 1)
        self.estimate = nn.Conv2d(fine, 2 + 3, 1)
        self.look, self.fourth = nn.Conv2d(FEATURES, fine, 1), stack(fine, 2)
        self.head = nn.Conv2d(fine, 4 * (2 + 1 + len(LAYERS)), 1)
        for layer in (self.estimate, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for scale in (4, 8):
            self.register_buffer(f"places{scale}", places(size, scale), persistent=False)

    def forward(self, target: Tensor, source: Tensor, fine: Tensor, coarse: Tensor, summary: Tensor) -> Aligned:
        """Align B target poses with B sources.

        Args:
            target, source: (B, 18, 2) joints in pixels, nan or ``MISSING`` where missing.
            fine, coarse, summary: of the source, from ``SourceEncoder``.
        """
        height, width = self.size
        with torch.autocast(target.device.type, enabled=False):  # half precision would shift places by a pixel
            poses = complete(torch.cat([target, source]).float(), height)
            wanted, given = poses.parts(2)
            moved, weights = limb_map(wanted, given, self.places4)
        offset = (moved - self.places4.T) / 50
        limbs = torch.cat([weights, offset], dim=1).unflatten(2, (height // 4, width // 4))
        moved = moved.unflatten(2, limbs.shape[2:])
        felt = fetch(coarse, to_grid(F.avg_pool2d(moved, 2), self.size))
        x = self.first(self._stem(limbs, self._around(wanted), felt))
        mood = self.pose(vector(poses)) + self.summary(summary)
        fallen = unshuffled(x, self.fall[1].weight, 2, self.fall[1].bias)
        context = self.second(x + self.rise(self.low(fallen + mood[:, :, None, None])))
        x = self.third(self.rise_again(context) + self.join(limbs))
        shift, points = by_parts(F.relu(x), self.estimate, (2, 3))
        moved = moved + REACH * shift
        first = to_grid(moved, self.size)
        x = self.fourth(x + self.look(fetch(fine, first.detach())))
        parts = by_parts(F.relu(x), self.head, (8, 4, 4 * len(LAYERS)))
        shift, seen, layers = (F.pixel_shuffle(part, 2) for part in parts)
        grid = to_grid(enlarged(moved) + REACH * shift, self.size)
        return Aligned(grid, seen, layers, context, first, points)

    def _stem(self, limbs: Tensor, around: Tensor, felt: Tensor) -> Tensor:
        """The stem over all that is known of a place: the unshuffled limbs first, which are not copied for it."""
        place = (self.places8.T / 100 - 1).expand(len(felt), -1, -1).unflatten(2, felt.shape[2:])
        ours, others = self.stem.weight.split([4 * limbs.shape[1], self.stem.in_channels - 4 * limbs.shape[1]], dim=1)
        rest = F.conv2d(torch.cat([around, place, felt], dim=1), others, self.stem.bias)
        return rest + unshuffled(limbs, ours, 2)

    def _around(self, wanted: Joints) -> Tensor:
        """(B, 36, H/8, W/8): how near each joint is, on two scales."""
        across, down = ((wanted.points[..., axis, None] - self.places8[:, axis]) / wanted.torso for axis in (0, 1))
        square = across.square() + down.square()
        near = torch.cat([torch.exp(-16 * square), torch.exp(-1.5 * square)], dim=1)
        return near.unflatten(2, (self.size[0] // 8, self.size[1] // 8))


def vector(poses: Joints) -> Tensor:
    """(B, 90) of B targets and B sources: both poses around their necks, in torsos, and which joints of the target
    are known."""
    bodies = ((poses.points - poses.points[:, 1:2]) / poses.torso).flatten(1).unflatten(0, (2, -1))
    return torch.cat([bodies.transpose(0, 1).flatten(1), poses.known[: bodies.shape[1]].flatten(1)], dim=1)


def places(size: tuple[int, int], scale: int) -> Tensor:
    """(N, 2) frame units x, y: the centres of the cells of a grid at 1 / scale, row by row."""
    unit = HEIGHT / size[0]
    y, x = (unit * scale * (torch.arange(length // scale) + 0.5) for length in size)
    return torch.stack([x.repeat(len(y)), y.repeat_interleave(len(x))], dim=1)


def to_grid(moved: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 2, h, w) frame units → (B, h, w, 2) in [-1, 1], for ``grid_sample`` without aligned corners."""
    unit = HEIGHT / size[0]
    return (moved * moved.new_tensor([2 / (unit * size[1]), 2 / HEIGHT]).view(1, 2, 1, 1) - 1).permute(0, 2, 3, 1)


def fetch(picture: Tensor, grid: Tensor) -> Tensor:
    """(B, C, h, w) sampled at (B, H, W, 2) places; the border goes on outside."""
    return F.grid_sample(picture.float(), grid.float(), align_corners=False, padding_mode="border")


def enlarge(grid: Tensor) -> Tensor:
    """(B, h, w, 2) places at twice the resolution."""
    return enlarged(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def enlarged(picture: Tensor) -> Tensor:
    """(B, C, h, w) at twice the size: ``F.interpolate`` with "bilinear", spelt out, which engines run faster."""

    def halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        before, here, after = (x.narrow(dim, start, x.shape[dim] - 2) for start in range(3))
        return 0.75 * here + 0.25 * before, 0.75 * here + 0.25 * after

    rows = halves(F.pad(picture, (1, 1, 1, 1), mode="replicate"), 2)
    return F.pixel_shuffle(torch.stack([part for row in rows for part in halves(row, 3)], dim=2).flatten(1, 2), 2)


class Alignment(nn.Module):
    """Encoder and aligner, which are trained together."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.encoder, self.aligner = SourceEncoder(), Aligner(size)

    def forward(self, pixels: Tensor, source: Tensor, target: Tensor) -> tuple[Seen, Aligned]:
        """S photos (S, 3, H, W) in [-1, 1] with their joints (S, 18, 2), and B target poses, grouped by source."""
        seen, repeats = self.encoder(pixels), len(target) // len(pixels)
        given = (part.repeat_interleave(repeats, dim=0) for part in (source, seen.fine, seen.coarse, seen.summary))
        return seen, self.aligner(target, *given)
