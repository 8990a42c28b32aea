"""Training of the alignment: the map against the true one where the data set has it, and the pictures in any case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.align_data import AlignmentBatch, draw_alignment, draw_nobody
from distill.alignment import Aligned, Alignment, Seen, enlarge, fetch
from distill.limbs import HEIGHT
from distill.train import History, TrainConfig, fit
from rpfm_edge.people.data import Split, draw_batch

FARTHEST = 40.0  # frame units: a place that is wrong by more teaches no more
PER_UNIT = 1 / 8  # of loss, for a frame unit of error
AGREE = 0.15  # mean difference of pixels in [-1, 1] below which a place is taken for shown, without surface maps


@dataclass(frozen=True, slots=True)
class AlignmentTraining:
    """What an alignment is trained with. ``jitter_px`` and ``dropped``: the source's joints are as the finder gives
    them, not exact, and a share of the joints of both poses is missing."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(lr=2e-3, ema=0.998, weight_decay=1e-4))
    sources: int = 4
    targets_per_source: int = 7
    jitter_px: float = 1.2
    dropped: float = 0.005


class AlignmentLoss(nn.Module):
    """The sum of all losses over one batch; ``joints`` and ``targets`` as the aligner is shown them."""

    def __init__(self, alignment: Alignment) -> None:
        super().__init__()
        self.alignment = alignment

    def forward(self, batch: AlignmentBatch, joints: Tensor, targets: Tensor, nobody: Tensor) -> Tensor:
        seen, aligned = self.alignment(batch.pixels, joints, targets)
        absent = self.alignment.encoder(nobody).scores.float()
        losses = [*finder_losses(batch, seen).values(), *map_losses(batch, aligned).values()]
        return torch.stack(losses).sum() + F.binary_cross_entropy_with_logits(absent, torch.zeros_like(absent))


def map_losses(batch: AlignmentBatch, aligned: Aligned) -> dict[str, Tensor]:
    """Of the map before and after the source was looked at, of the body's points, of what is seen, of layers and of
    moved pixels."""
    error = map_error(batch, aligned.grid)
    earlier = map_error(batch, enlarge(aligned.first))
    repeats = len(batch.targets) // len(batch.pixels)
    moved = fetch(batch.pixels.repeat_interleave(repeats, 0), aligned.grid).float()
    wrong = (moved - batch.pictures).abs().mean(1, keepdim=True)
    wanted = batch.surfaces[:, 3].long()
    told = (wanted >= 0).any()
    seen = batch.seen if told else (wrong.detach() < AGREE).float()
    found, before = (
        (one.clamp(max=FARTHEST) * batch.weight).sum() / batch.weight.sum().clamp(min=1) for one in (error, earlier)
    )
    layers = F.cross_entropy(aligned.layers.float(), wanted, ignore_index=-1) if told else wrong.new_zeros(())
    trusted, worth = (batch.seen, 0.25) if told else (torch.ones_like(wrong), 1.0)
    return {
        "map": PER_UNIT * found,
        "map before": 0.5 * PER_UNIT * before,
        "points": 2 * _points_apart(aligned.points, batch.surfaces),
        "seen": F.binary_cross_entropy_with_logits(aligned.seen.float(), seen),
        "layers": layers,
        "pixels": worth * (wrong * trusted).sum() / trusted.sum().clamp(min=1),
    }


def map_error(batch: AlignmentBatch, grid: Tensor) -> Tensor:
    """(B, 1, H/2, W/2): how far a map is from the true one, in frame units."""
    width = HEIGHT * batch.pixels.shape[3] / batch.pixels.shape[2]
    found = (grid.permute(0, 3, 1, 2).float() + 1) / 2 * grid.new_tensor([width, HEIGHT]).view(1, 2, 1, 1)
    return ((found - batch.places).square().sum(1, keepdim=True) + 0.01).sqrt()


def finder_losses(batch: AlignmentBatch, seen: Seen) -> dict[str, Tensor]:
    """Of the joints' places, of whether they are there, and of the photo's own surface."""
    height, width = batch.pixels.shape[2:]
    inside = ((batch.joints > 0) & (batch.joints < batch.joints.new_tensor([width, height]))).all(2).float()
    count, where = inside.sum().clamp(min=1), torch.nan_to_num(batch.joints)
    wanted = _heat(where, (height // 4, width // 4))
    surprise = -(wanted * torch.log_softmax(seen.heat, dim=2)).sum(2)
    away = (seen.joints - where).abs().sum(2).clamp(max=FARTHEST)
    layer = batch.surface[:, 3, ::2, ::2].long()
    drawn = F.cross_entropy(seen.surface[:, 3:].float(), layer, ignore_index=-1, reduction="sum")
    return {
        "heat": 0.1 * (surprise * inside).sum() / count,
        "joints": PER_UNIT * (away * inside).sum() / count,
        "scores": F.binary_cross_entropy_with_logits(seen.scores.float(), inside),
        "own points": 2 * _points_apart(seen.surface[:, :3], batch.surface),
        "own layers": 0.5 * drawn / (layer >= 0).sum().clamp(min=1),
    }


def _points_apart(found: Tensor, surface: Tensor) -> Tensor:
    """Mean difference of points (n, 3, H/4, W/4) from those of a surface (n, 4, H/2, W/2), but at edges of layers."""
    wanted, layer = F.avg_pool2d(surface, 2), surface[:, 3:, ::2, ::2]
    inner = ((layer > 0) & ((wanted[:, 3:] - layer).abs() < 1e-3)).float()
    return ((found.float() - wanted[:, :3]).abs() * inner).sum() / (3 * inner.sum()).clamp(min=1)


def _heat(joints: Tensor, cells: tuple[int, int]) -> Tensor:
    """(S, 18, h w): a Gaussian of one cell around each joint, which sums to 1."""
    down, across = (
        torch.exp(-0.5 * (torch.arange(n, device=joints.device) + 0.5 - joints[..., axis : axis + 1] / 4).square())
        for n, axis in zip(cells, (1, 0), strict=True)
    )
    heat = (down[..., :, None] * across[..., None, :]).flatten(2)
    return heat / heat.sum(2, keepdim=True).clamp(min=1e-6)


def disturbed(joints: Tensor, jitter_px: float, dropped: float, draw: torch.Generator) -> Tensor:
    """(n, 18, 2) with noise on them, and a share of them missing."""
    noise = torch.randn(joints.shape, generator=draw, device=draw.device).to(joints)
    gone = torch.rand(joints.shape[:2], generator=draw, device=draw.device).to(joints) < dropped
    return (joints + jitter_px * noise).masked_fill(gone[..., None], float("nan"))


def train_alignment(
    alignment: Alignment,
    split: Split,
    pictures: Callable[[np.ndarray], Tensor],
    config: AlignmentTraining,
    checkpoint: Path,
    validation: tuple[Split, Callable[[np.ndarray], Tensor]] | None = None,
) -> tuple[Alignment, History]:
    """Train on the people of ``split`` and return the EMA. Resumes from ``checkpoint``.

    ``pictures(indices)`` are those of the split, (n, H, W, 3) uint8. With ``validation`` (a split, its pictures) the
    history holds the median error of the map there, or the moved pixels' where it has no surface maps.
    """

    def step_loss(model: nn.Module, step: int, rng: np.random.Generator) -> Tensor:
        device = next(model.parameters()).device
        drawn = draw_batch(split, config.sources, config.targets_per_source, rng)
        batch = AlignmentBatch(*(part.to(device) for part in draw_alignment(split, pictures, drawn, rng)))
        draw = torch.Generator().manual_seed(int(rng.integers(2**63)))
        joints = disturbed(batch.joints, config.jitter_px, config.dropped, draw)
        targets = disturbed(batch.targets, 0.0, config.dropped, draw)
        return model(batch, joints, targets, draw_nobody(1, batch.pixels, rng))

    watch = held_out_error(*validation, config) if validation else None
    ema, history = fit(AlignmentLoss(alignment), step_loss, config.train, checkpoint, "alignment", watch)
    return ema.alignment, history


def held_out_error(
    split: Split, pictures: Callable[[np.ndarray], Tensor], config: AlignmentTraining
) -> Callable[[nn.Module], float]:
    """The map's median error in frame units on people that are always the same; without surface maps ten times the
    moved pixels' mean difference."""
    rng = np.random.default_rng(0)
    batches = [draw_alignment(split, pictures, draw_batch(split, 4, 7, rng), rng, moved=0.0) for _ in range(5)]

    def evaluate(model: nn.Module) -> float:
        device, found = next(model.parameters()).device, []
        for one in batches:
            batch = AlignmentBatch(*(part.to(device) for part in one))
            _, aligned = model.alignment(batch.pixels, batch.joints, batch.targets)
            shown = batch.seen > 0
            apart = map_error(batch, aligned.grid)[shown]
            found.append(apart.median() if shown.any() else 10 * map_losses(batch, aligned)["pixels"])
        return float(torch.stack(found).mean())

    return evaluate
