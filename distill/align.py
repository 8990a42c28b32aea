"""Training of the alignment: the map against the true one where a data set has it, the pictures against each other."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.alignment import Aligned, Aligner, Seen, SourceEncoder, fetch
from distill.limbs import HEIGHT
from distill.surface import correspond, mirrored, read_surface, search_trees
from rpfm_edge.data import Split
from rpfm_edge.pose import flip

JITTER_PX = 1.2  # of the source's joints: those of the finder are no better
DROPPED = 0.03  # of the joints of either pose are missing
MOVED = 0.2  # of the photos are framed otherwise than the data set's
FARTHEST = 40.0  # frame units: a place that is wrong by more teaches no more


class AlignmentBatch(NamedTuple):
    """S photos with M targets each, B = S M; maps are at half the pictures' size."""

    pixels: Tensor  # (S, 3, H, W) in [-1, 1]
    joints: Tensor  # (S, 18, 2) true joints of the photos, in pixels
    surface: Tensor  # (S, 4, H/2, W/2): points in metres and the layer, -1 where it is not known
    targets: Tensor  # (B, 18, 2) joints in pixels
    pictures: Tensor  # (B, 3, H/2, W/2) in [-1, 1]
    places: Tensor  # (B, 2, H/2, W/2) frame units in the source
    weight: Tensor  # (B, 1, H/2, W/2): 1 where the source shows the place, less where it shows its layer, else 0
    seen: Tensor  # (B, 1, H/2, W/2) float
    layers: Tensor  # (B, H/2, W/2) int64


def draw_alignment(
    split: Split, pictures: np.ndarray, sources: np.ndarray, targets: np.ndarray, flips: np.ndarray,
    rng: np.random.Generator, moved: float = MOVED,
) -> AlignmentBatch:
    rows = []
    for source, row, flipped in zip(sources.tolist(), targets.tolist(), flips.tolist(), strict=True):
        rows.append(_example(split, pictures, source, row, flipped, rng, moved))
    one = [torch.from_numpy(np.stack([r[i] for r in rows])) for i in range(3)]
    many = [torch.from_numpy(np.concatenate([np.stack(r[i]) for r in rows])) for i in range(3, 9)]
    pix, joints, surface = one
    t, pics, places, weight, seen, layers = many
    to = lambda p: p.permute(0, 3, 1, 2).float() / 127.5 - 1
    unit = HEIGHT / pictures.shape[1]
    return AlignmentBatch(to(pix), joints, surface.permute(0, 3, 1, 2), t, to(pics), places.permute(0, 3, 1, 2) * unit,
                          weight[:, None], seen[:, None].float(), layers.long())


def _example(split, pictures, source, row, flipped, rng, moved):
    H, W = pictures.shape[1:3]
    turn = (lambda a: a[:, ::-1]) if flipped else (lambda a: a)
    pose = lambda i: flip(split.pose(i), W) if flipped else split.pose(i)
    surf = lambda i: mirrored(read_surface(split, i)) if flipped else read_surface(split, i)
    photo, joints, there = np.ascontiguousarray(turn(pictures[source])), pose(source).copy(), surf(source)
    own = np.concatenate([there.points, there.layers[..., None].astype(np.float32)], 2)
    affine, trees = None, search_trees(there)
    if rng.random() < moved:
        scale = np.exp(rng.uniform(np.log(.75), np.log(1.7))); c = np.array([rng.uniform(.2, .8)*W, rng.uniform(.05, .95)*H])
        d = np.array([W/2, H/2]) + rng.normal(0, .12, 2)*[W, H]
        affine = np.array([[scale, 0, d[0]-scale*c[0]], [0, scale, d[1]-scale*c[1]]], np.float32)
        photo = cv2.warpAffine(photo, affine, (W, H), flags=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        joints = joints @ affine[:, :2].T + affine[:, 2]
        own = np.full_like(own, -1)
    out = [[], [], [], [], [], []]
    for i in row:
        s = surf(i); c = correspond(s, trees)
        places = 2 * c.places + 1  # centre of the two by two pixels, with pixel edges at whole numbers
        seen, known = c.seen, c.known
        if affine is not None:
            places = places @ affine[:, :2].T + affine[:, 2]
            inside = ((places > 0) & (places < [W, H])).all(-1); seen = seen & inside; known = known & inside
        out[0].append(pose(i)); out[1].append(cv2.resize(np.ascontiguousarray(turn(pictures[i])), (W // 2, H // 2), interpolation=cv2.INTER_AREA))
        out[2].append(places.astype(np.float32)); out[3].append((seen + .1 * (known & ~seen)).astype(np.float32)); out[4].append(seen); out[5].append(s.layers.astype(np.uint8))
    return (photo, joints.astype(np.float32), own, *out)


def disturbed(joints: Tensor, jitter: float, dropped: float, draw: torch.Generator) -> Tensor:
    noisy = joints + jitter * torch.randn(joints.shape, generator=draw)
    gone = torch.rand(joints.shape[:2], generator=draw) < dropped
    return noisy.masked_fill(gone[..., None], float("nan"))


class Alignment(nn.Module):
    """Encoder and aligner, trained together."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.encoder, self.aligner = SourceEncoder(), Aligner(size)

    def forward(self, pixels, source, target) -> tuple[Seen, Aligned]:
        seen = self.encoder(pixels)
        m = len(target) // len(pixels)
        many = lambda x: x.repeat_interleave(m, 0)
        return seen, self.aligner(target, many(source), many(seen.coarse), many(seen.summary))


def alignment_losses(batch: AlignmentBatch, seen: Seen, aligned: Aligned, size) -> dict[str, Tensor]:
    H, W = size; unit = HEIGHT / H
    m = len(batch.targets) // len(batch.pixels)
    found = (aligned.grid.permute(0, 3, 1, 2).float() + 1) * torch.tensor([W * unit / 2, HEIGHT / 2]).view(1, 2, 1, 1)
    error = (found - batch.places).square().sum(1, keepdim=True).add(.01).sqrt()
    total = batch.weight.sum().clamp(min=1)
    picture = fetch(batch.pixels.repeat_interleave(m, 0), aligned.grid)
    sure = batch.seen
    wrong = (picture.float() - batch.pictures).abs().mean(1, keepdim=True)
    return {
        "map": (error.clamp(max=FARTHEST) * batch.weight).sum() / total / 8,
        "seen": F.binary_cross_entropy_with_logits(aligned.seen.float(), batch.seen),
        "layers": F.cross_entropy(aligned.layers.float(), batch.layers),
        "pixels": (wrong * sure).sum() / sure.sum().clamp(min=1),
        "_px": (error * batch.seen).flatten()[batch.seen.flatten() > 0].median(),
    } | finder_losses(batch, seen, size)


def finder_losses(batch: AlignmentBatch, seen: Seen, size) -> dict[str, Tensor]:
    H, W = size
    inside = ((batch.joints > 0) & (batch.joints < torch.tensor([W, H]))).all(2).float()
    # heat: a gaussian of one cell around the joint
    h, w = H // 4, W // 4
    x = torch.arange(w) + .5; y = torch.arange(h) + .5
    gx = torch.exp(-.5 * (x - batch.joints[..., :1] / 4).square()); gy = torch.exp(-.5 * (y - batch.joints[..., 1:] / 4).square())
    want = (gy[..., :, None] * gx[..., None, :]).flatten(2); want = want / want.sum(2, keepdim=True).clamp(min=1e-6)
    ce = -(want * torch.log_softmax(seen.heat, 2)).sum(2)
    off = (seen.joints - batch.joints).abs().sum(2).clamp(max=40)
    n = inside.sum().clamp(min=1)
    small = F.avg_pool2d(batch.surface, 2); layer = batch.surface[:, 3, ::2, ::2].long()
    fg = ((layer > 0) & ((small[:, 3] - layer).abs() < 1e-3))[:, None].float()
    return {
        "heat": .1 * (ce * inside).sum() / n, "joints": (off * inside).sum() / n / 8,
        "scores": F.binary_cross_entropy_with_logits(seen.scores.float(), inside),
        "points": 2 * ((seen.surface[:, :3].float() - small[:, :3]).abs() * fg).sum() / (3 * fg.sum()).clamp(min=1),
        "own layers": .5 * F.cross_entropy(seen.surface[:, 3:].float(), layer, ignore_index=-1) if (layer >= 0).any() else torch.zeros(()),
        "_joint px": (off * inside).sum() / n,
    }


def nobody(count: int, size, rng: np.random.Generator, pictures: np.ndarray) -> Tensor:
    """(n, 3, H, W): pictures without a person: plain, gradients, noise, shuffled tiles of people."""
    H, W = size; out = []
    for _ in range(count):
        k = rng.integers(4)
        if k == 0: p = np.tile(rng.uniform(0, 255, 3), (H, W, 1)) + rng.normal(0, rng.uniform(0, 20), (H, W, 3))
        elif k == 1: p = cv2.resize(rng.uniform(0, 255, (rng.integers(2, 12), rng.integers(2, 9), 3)).astype(np.float32), (W, H), interpolation=cv2.INTER_CUBIC)
        elif k == 2: p = rng.uniform(0, 255, (H, W, 3))
        else:
            t = 16; q = pictures[rng.integers(len(pictures))]; tiles = q.reshape(H//t, t, W//t, t, 3).swapaxes(1, 2).reshape(-1, t, t, 3)
            tiles = tiles[rng.permutation(len(tiles))]; p = tiles.reshape(H//t, W//t, t, t, 3).swapaxes(1, 2).reshape(H, W, 3)
        out.append(np.clip(p, 0, 255).astype(np.float32))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2) / 127.5 - 1
