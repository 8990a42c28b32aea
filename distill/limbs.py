"""The limb map: from the joints of two poses, where in the source each place of the target comes from.

No weights: ten body parts (eight limb segments, torso, head), each moved by a transform of its own that follows from
its joints, blended by the distance to the part. ``distill.alignment`` refines it. Every operation exports to ONNX, so
the pose enters a graph as keypoints, and a joint that moves by a tenth of a pixel moves the map by as much.

Inside, lengths are in units of a frame 256 high, whatever the size of the pictures. A joint is missing where it is not
above ``MISSING / 2``: nan, or the constant that stands for it at the boundary of a graph.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rpfm_edge.pose import MISSING

HEIGHT = 256.0  # of the frame that lengths are measured in
PARTS = 10
_TORSO_LENGTH = 66.0  # where neck or hips are missing

# fmt: off
_STARTS, _ENDS = (2, 3, 5, 6, 8, 9, 11, 12), (3, 4, 6, 7, 9, 10, 12, 13)
_TORSO, _HEAD = (1, 2, 5, 8, 11), (0, 1, 14, 15, 16, 17)
# half widths of limbs, torso and head in torsos; how far a segment reaches beyond its end (hands, feet, the skull)
_WIDTHS = (0.13, 0.11, 0.13, 0.11, 0.17, 0.14, 0.17, 0.14, 0.22, 0.28)
_REACH = (0.0, 0.45, 0.0, 0.45, 0.0, 0.35, 0.0, 0.35, 0.05, -0.5)
# a missing joint is put where it is seen from its parent in a person who stands still, in torsos
_PARENTS = (1, 1, 1, 2, 3, 1, 5, 6, 1, 8, 9, 1, 11, 12, 0, 0, 14, 15)
_STANDING = (
    (0, -.37), (0, 0), (-.29, 0), (-.31, .41), (-.04, .13), (.29, 0), (.31, .41), (.04, .13), (-.17, 1),
    (-.17, .77), (-.14, .75), (.17, 1), (.17, .78), (.14, .76), (-.06, -.06), (.06, -.06), (-.09, .05), (.09, .05),
)
# fmt: on


class Joints(NamedTuple):
    """A pose in frame units, with nothing missing."""

    points: Tensor  # (B, 18, 2)
    known: Tensor  # (B, 18, 1) float: 1 where the joint was given
    torso: Tensor  # (B, 1, 1): neck to the middle of the hips


def complete(joints: Tensor, height: int) -> Joints:
    """(B, 18, 2) pixels of pictures of this height, nan or ``MISSING`` where missing → all 18 in frame units."""
    known = joints[..., :1] > MISSING / 2  # nan compares false
    points = torch.where(known, joints * (HEIGHT / height), 0.0)
    weight = known.float()
    middle = points.sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    has_torso = known[:, 1:2] & known[:, 8:9] & known[:, 11:12]
    length = torch.where(has_torso, _distance(points[:, 1:2], _mean(points, (8, 11))), _TORSO_LENGTH)
    points = torch.cat([points[:, :1], torch.where(known[:, 1:2], points[:, 1:2], middle), points[:, 2:]], dim=1)
    offset = points.new_tensor(_STANDING) * length
    parents, settled = torch.tensor(_PARENTS, device=points.device), known
    for _ in range(3):  # a missing joint's parent may be missing, too
        points = torch.where(settled, points, points[:, parents] + offset)
        settled = known | (torch.arange(18, device=points.device) == 1)[None, :, None]
    return Joints(points, weight, _distance(points[:, 1:2], _mean(points, (8, 11))).clamp(min=20.0))


def limb_map(target: Joints, source: Joints, places: Tensor) -> tuple[Tensor, Tensor]:
    """Where (N, 2) places of the target come from.

    Returns:
        (B, 2, N) places in the source, the target's own where nobody is near; (B, 11, N) weights of the ten parts and,
        last, of the background, which sum to 1. All lengths in frame units.
    """
    transforms = _transforms(target, source)  # (B, 10, 2, 3)
    x, y = places[:, 0], places[:, 1]
    across, down = (
        transforms[:, :, row, 0:1] * x + transforms[:, :, row, 1:2] * y + transforms[:, :, row, 2:3] for row in (0, 1)
    )  # (B, 10, N) each
    near = 4.5 * _distances(target, places).square()
    weights = torch.softmax(torch.cat([-near, torch.full_like(near[:, :1], -9.9)], dim=1), dim=1)
    rest = weights[:, PARTS]
    moved = [(weights[:, :PARTS] * part).sum(1) + rest * own for part, own in ((across, x), (down, y))]
    return torch.stack(moved, dim=1), weights


def _transforms(target: Joints, source: Joints) -> Tensor:
    """(B, 10, 2, 3): an affine map from target to source for each part."""
    limbs = _limbs(target, source)
    parts = [(_affine, _TORSO), (_similarity, _HEAD)]
    others = [fit(target.points[:, list(chosen)], source.points[:, list(chosen)]) for fit, chosen in parts]
    return torch.cat([limbs, torch.stack(others, dim=1)], dim=1)


def _limbs(target: Joints, source: Joints) -> Tensor:
    """(B, 8, 2, 3): along a limb as its length says, across as the two bodies' sizes say."""
    starts = [pose.points[:, list(_STARTS)] for pose in (target, source)]
    ways = [pose.points[:, list(_ENDS)] - start for pose, start in zip((target, source), starts, strict=True)]
    lengths = [_length(way).clamp(min=4.0) for way in ways]
    along_target, along_source = (way / length for way, length in zip(ways, lengths, strict=True))
    stretch, ratio = lengths[1] / lengths[0], source.torso / target.torso
    matrix = _outer(stretch * along_source, along_target) + _outer(ratio * _turn(along_source), _turn(along_target))
    return _with_shift(matrix, starts[0], starts[1])


def _affine(target: Tensor, source: Tensor) -> Tensor:
    """(B, n, 2) twice → (B, 2, 3): least squares, drawn towards no change, for a torso seen from the side."""
    middles = target.mean(1), source.mean(1)
    t, s = target - middles[0][:, None], source - middles[1][:, None]
    ridge = 60.0 * torch.eye(2, device=t.device, dtype=t.dtype)
    square, cross = t.transpose(1, 2) @ t + ridge, t.transpose(1, 2) @ s + ridge
    a, b, d = square[:, 0, 0], square[:, 0, 1], square[:, 1, 1]
    inverse = torch.stack([torch.stack([d, -b], 1), torch.stack([-b, a], 1)], 1) / (a * d - b * b)[:, None, None]
    return _with_shift((inverse @ cross).transpose(1, 2), *middles)


def _similarity(target: Tensor, source: Tensor) -> Tensor:
    """(B, n, 2) twice → (B, 2, 3): turned, scaled and shifted, least squares."""
    middles = target.mean(1), source.mean(1)
    t, s = target - middles[0][:, None], source - middles[1][:, None]
    size = t.square().sum((1, 2)) + 30.0
    cosine = ((t * s).sum((1, 2)) + 30.0) / size
    sine = (t[..., 0] * s[..., 1] - t[..., 1] * s[..., 0]).sum(1) / size
    matrix = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    return _with_shift(matrix, *middles)


def _distances(target: Joints, places: Tensor) -> Tensor:
    """(B, 10, N): how far (N, 2) places are from the parts, in half widths of each."""
    points = target.points
    head = points[:, [0, 14, 15, 16, 17]].mean(1, keepdim=True)
    start = torch.cat([points[:, list(_STARTS)], points[:, 1:2], head], dim=1)
    end = torch.cat([points[:, list(_ENDS)], _mean(points, (8, 11)), points[:, 1:2]], dim=1)
    way = (end - start) * (1 + points.new_tensor(_REACH)[:, None])
    shoulders = 0.45 * _distance(points[:, 2:3], points[:, 5:6]).clamp(min=16.0)
    width = points.new_tensor(_WIDTHS)[:, None] * target.torso
    width = torch.cat([width[:, :8], torch.maximum(width[:, 8:9], shoulders), width[:, 9:]], dim=1)  # (B, 10, 1)
    x, y = (places[:, axis] - start[..., axis : axis + 1] for axis in (0, 1))
    share = (x * way[..., :1] + y * way[..., 1:]) / way.square().sum(2, keepdim=True).clamp(min=1.0)
    share = share.clamp(0, 1)
    return ((x - share * way[..., :1]).square() + (y - share * way[..., 1:]).square()).sqrt() / width


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def _turn(way: Tensor) -> Tensor:
    """By a right angle."""
    return torch.stack([-way[..., 1], way[..., 0]], dim=-1)


def _with_shift(matrix: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """(…, 2, 2) → (…, 2, 3): the map that takes the place ``target`` to ``source``."""
    return torch.cat([matrix, (source - (matrix * target[..., None, :]).sum(-1))[..., None]], dim=-1)


def _length(way: Tensor) -> Tensor:
    return (way.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return _length(a - b)


def _mean(points: Tensor, chosen: tuple[int, ...]) -> Tensor:
    return points[:, list(chosen)].mean(1, keepdim=True)
