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

from rpfm_edge.people.pose import MISSING

HEIGHT = 256.0  # of the frame that lengths are measured in
PARTS = 10
_TORSO_LENGTH = 66.0  # where neck or hips are missing
_BACKGROUND = 9.9  # weighs as much as a part at a squared distance of 2.2

# fmt: off
_STARTS, _ENDS = (2, 3, 5, 6, 8, 9, 11, 12), (3, 4, 6, 7, 9, 10, 12, 13)
_TORSO, _HEAD = (1, 2, 5, 8, 11), (0, 1, 14, 15, 16, 17)
_FACE = (0, 14, 15, 16, 17)
# half widths of limbs, torso and head in torsos; how far a segment reaches beyond its end (hands, feet, the skull)
_WIDTHS = (0.13, 0.11, 0.13, 0.11, 0.17, 0.14, 0.17, 0.14, 0.22, 0.28)
_REACH = (0.0, 0.45, 0.0, 0.45, 0.0, 0.35, 0.0, 0.35, 0.05, -0.5)
_IS_TORSO = (0.0,) * 8 + (1.0, 0.0)  # the shoulders may be wider than its half width
# a missing joint is put where it is seen from its parent in a person who stands still, in torsos
_PARENTS = (1, 1, 1, 2, 3, 1, 5, 6, 1, 8, 9, 1, 11, 12, 0, 0, 14, 15)
_STANDING = (
    (0, -.37), (0, 0), (-.29, 0), (-.31, .41), (-.04, .13), (.29, 0), (.31, .41), (.04, .13), (-.17, 1),
    (-.17, .77), (-.14, .75), (.17, 1), (.17, .78), (.14, .76), (-.06, -.06), (.06, -.06), (-.09, .05), (.09, .05),
)
# fmt: on


def _matrix() -> Tensor:
    """(35, 18): the joints' shares in each mark, which ``_Marks`` divides."""
    one = torch.eye(18)
    neck, hips, head = one[1:2], one[[8, 11]].mean(0, keepdim=True), one[list(_FACE)].mean(0, keepdim=True)
    starts, ends = (torch.cat([one[list(a)], b, c]) for a, b, c in ((_STARTS, neck, head), (_ENDS, hips, neck)))
    torso, face = (one[list(chosen)] for chosen in (_TORSO, _HEAD))
    middles = [part.mean(0, keepdim=True) for part in (torso, face)]
    around = [torso - middles[0], torch.zeros(1, 18), face - middles[1]]
    return torch.cat([starts, ends - starts, *middles, *around, one[5:6] - one[2:3]])


_MATRIX = _matrix()


class Joints(NamedTuple):
    """A pose in frame units, with nothing missing."""

    points: Tensor  # (B, 18, 2)
    known: Tensor  # (B, 18, 1) float: 1 where the joint was given
    torso: Tensor  # (B, 1, 1): neck to the middle of the hips

    def parts(self, count: int) -> list[Joints]:
        """Those of B / ``count`` poses each, in order."""
        chunks = (part.chunk(count) for part in self)
        return [Joints(*parts) for parts in zip(*chunks, strict=True)]


class _Marks(NamedTuple):
    """What the map needs of a pose's joints and is linear in them, so that one product makes all of it."""

    starts: Tensor  # (B, 10, 2) of the parts
    ways: Tensor  # (B, 10, 2) from there to their ends
    middles: Tensor  # (B, 2, 2) of torso and head
    around: Tensor  # (B, 12, 2): six joints of each around its middle; the torso has five and a zero
    shoulders: Tensor  # (B, 1, 2) from one to the other


def _marks(pose: Joints) -> _Marks:
    return _Marks(*(_MATRIX.to(pose.points) @ pose.points).split((PARTS, PARTS, 2, 12, 1), dim=1))


def complete(joints: Tensor, height: int) -> Joints:
    """(B, 18, 2) pixels of pictures of this height, nan or ``MISSING`` where missing → all 18 in frame units."""
    known = joints[..., :1] > MISSING / 2  # nan compares false
    points = torch.where(known, joints * (HEIGHT / height), 0.0)
    weight = known.float()
    middle = points.sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    has_torso = known[:, 1:2] & known[:, 8:9] & known[:, 11:12]
    length = torch.where(has_torso, _torso(points), _TORSO_LENGTH)
    others = torch.arange(18, device=points.device)[None, :, None] != 1
    points = torch.where(known | others, points, middle)  # the neck, from which all others hang
    offset = points.new_tensor(_STANDING) * length
    parents = torch.tensor(_PARENTS, device=points.device)
    for _ in range(3):  # a missing joint's parent may be missing, too
        points = torch.where(known, points, points[:, parents] + offset)
    return Joints(points, weight, _torso(points).clamp(min=20.0))


def limb_map(target: Joints, source: Joints, places: Tensor) -> tuple[Tensor, Tensor]:
    """Where (N, 2) places of the target come from.

    Returns:
        (B, 2, N) places in the source, the target's own where nobody is near; (B, 11, N) weights of the ten parts and,
        last, of the background, which sum to 1. All lengths in frame units.
    """
    wanted, given = _marks(target), _marks(source)
    x, y = places[:, 0], places[:, 1]
    share = torch.exp(_BACKGROUND - 4.5 * _squares(target, wanted, x, y))  # (B, 10, N), where the background has 1
    # The parts' maps are blended, not their results: (B, 7, 10) is small. Its last row sums the shares.
    maps = _transforms(wanted, given, source.torso / target.torso)
    maps = torch.cat([maps, torch.ones_like(maps[..., :1])], dim=2)
    a, b, c, d, e, f, total = (maps.transpose(1, 2) @ share).split(1, dim=1)
    every = 1 / (1 + total)
    moved = torch.cat([(a * x + b * y + c + x) * every, (d * x + e * y + f + y) * every], dim=1)
    return moved, torch.cat([share * every, every], dim=1)


def _transforms(target: _Marks, source: _Marks, ratio: Tensor) -> Tensor:
    """(B, 10, 6): an affine map from target to source for each part, its two rows; ``ratio`` of the bodies' sizes."""
    limbs = _limbs(target.ways[:, :8], source.ways[:, :8], ratio)
    moments = _moments(target.around, source.around)
    matrices = torch.cat([limbs, _affine(moments[:, 0]), _similarity(moments[:, 1])], dim=1)  # (B, 10, 4)
    before, after = (torch.cat([pose.starts[:, :8], pose.middles], dim=1) for pose in (target, source))
    x, y = before[..., :1], before[..., 1:]
    a, b, c, d = matrices.split(1, dim=2)
    return torch.cat([a, b, after[..., :1] - a * x - b * y, c, d, after[..., 1:] - c * x - d * y], dim=2)


def _limbs(target: Tensor, source: Tensor, ratio: Tensor) -> Tensor:
    """Ways (B, 8, 2) twice → (B, 8, 4) matrices: along a limb as its length says, across as the two bodies' sizes."""
    lengths = [_length(way).clamp(min=4.0) for way in (target, source)]
    (tx, ty), (sx, sy) = ((way / length).split(1, dim=2) for way, length in zip((target, source), lengths, strict=True))
    along_x, along_y = (lengths[1] / lengths[0] * part for part in (sx, sy))
    across_x, across_y = ratio * sx, ratio * sy
    rows = (along_x * tx + across_y * ty, along_x * ty - across_y * tx)
    return torch.cat([*rows, along_y * tx - across_x * ty, along_y * ty + across_x * tx], dim=2)


def _moments(target: Tensor, source: Tensor) -> Tensor:
    """(B, 12, 2) twice → (B, 2, 8) of torso and head: sums of the target's x and y, times x and y of both poses."""
    both = torch.cat([target, source], dim=2).unflatten(1, (2, 6))[..., None, :]
    return (target.unflatten(1, (2, 6))[..., None] * both).sum(2).flatten(2)


def _affine(moments: Tensor) -> Tensor:
    """(B, 8) → (B, 1, 4): least squares, drawn towards no change, for a torso seen from the side."""
    ridge = moments.new_tensor([60.0, 0.0, 60.0, 0.0, 0.0, 60.0, 0.0, 60.0])
    a, b, px, py, _, d, qx, qy = (moments + ridge).split(1, dim=1)
    found = torch.cat([d * px - b * qx, a * qx - b * px, d * py - b * qy, a * qy - b * py], dim=1)
    return (found / (a * d - b * b))[:, None]


def _similarity(moments: Tensor) -> Tensor:
    """(B, 8) → (B, 1, 4): turned, scaled and shifted, least squares."""
    xx, _, xu, xv, _, yy, yu, yv = moments.split(1, dim=1)
    cosine, sine = xu + yv + 30.0, xv - yu
    return (torch.cat([cosine, -sine, sine, cosine], dim=1) / (xx + yy + 30.0))[:, None]


def _squares(pose: Joints, marks: _Marks, x: Tensor, y: Tensor) -> Tensor:
    """(B, 10, N): squared distances of N places from the parts, in half widths of each."""
    shoulders = 0.45 * _length(marks.shoulders).clamp(min=16.0)
    width = pose.points.new_tensor(_WIDTHS)[:, None] * pose.torso
    at_least = (pose.points.new_tensor(_IS_TORSO)[:, None] * shoulders).expand_as(width)
    start_x, start_y = marks.starts.split(1, dim=2)
    way = marks.ways * (1 + pose.points.new_tensor(_REACH)[:, None])
    way_x, way_y = way.split(1, dim=2)
    x, y = x - start_x, y - start_y
    share = (x * way_x + y * way_y) / way.square().sum(2, keepdim=True).clamp(min=1.0)
    share = share.clamp(0, 1)
    return ((x - share * way_x).square() + (y - share * way_y).square()) / torch.maximum(width, at_least).square()


def _torso(points: Tensor) -> Tensor:
    """(B, 1, 1): neck to the middle of the hips."""
    return _length(points[:, 1:2] - 0.5 * (points[:, 8:9] + points[:, 11:12]))


def _length(way: Tensor) -> Tensor:
    return (way.square().sum(-1, keepdim=True) + 1e-6).sqrt()
