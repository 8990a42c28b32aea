"""Maps of a pose, for networks that want pictures of it: drawn of keypoints by operations that export to ONNX.

So the pose enters a graph as keypoints, whatever the network looks at. All take (B, 18, 2) pixels x, y of ``size``,
``MISSING`` where there is none, and give (B, channels, *out) in [0, 1]; ``out`` is the size of the maps, the pictures'
if it is not given. Widths and deviations are in pixels of ``size``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.condition import visible
from rpfm_edge.people.pose import BONES, COLOURS

Size = tuple[int, int]
_STARTS, _ENDS = (list(ends) for ends in zip(*BONES, strict=True))
SHADE = 0.6  # of a joint's colour, for the bone of its number


def heat_maps(keypoints: Tensor, size: Size, sigma: float = 6.0, out: Size | None = None) -> Tensor:
    """18 channels: a Gaussian of deviation ``sigma`` around each joint, 0 where it is missing."""
    squared = _squared_distances(keypoints, _places(keypoints, size, out))
    return torch.exp(-squared / (2 * sigma**2)) * visible(keypoints)[..., None, None]


def limb_maps(keypoints: Tensor, size: Size, width: float = 4.0, out: Size | None = None) -> Tensor:
    """17 channels: each bone as a stroke of half width ``width`` whose edge is one pixel soft."""
    places = _places(keypoints, size, out)
    there = visible(keypoints)
    starts, ends = keypoints[:, _STARTS], keypoints[:, _ENDS]
    along = (ends - starts)[:, :, None, None]
    from_start = places - starts[:, :, None, None]
    share = ((from_start * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)).clamp(0, 1)
    distance = (from_start - share[..., None] * along).square().sum(-1).clamp(min=1e-12).sqrt()
    stroke = (width + 0.5 - distance).clamp(0, 1)
    return stroke * (there[:, _STARTS] & there[:, _ENDS])[..., None, None]


def skeletons(keypoints: Tensor, size: Size, width: float = 4.0, out: Size | None = None) -> Tensor:
    """3 channels, OpenPose's picture: bones in darkened colours, joints as discs on top of them, on black."""
    distance = _squared_distances(keypoints, _places(keypoints, size, out)).clamp(min=1e-12).sqrt()
    discs = (width + 0.5 - distance).clamp(0, 1) * visible(keypoints)[..., None, None]
    colours = torch.tensor(COLOURS, dtype=keypoints.dtype, device=keypoints.device) / 255
    layers = torch.cat([limb_maps(keypoints, size, width, out), discs], dim=1).unbind(1)
    canvas = torch.zeros_like(discs[:, :3])
    for layer, colour in zip(layers, [*(SHADE * colours[: len(BONES)]), *colours], strict=True):
        canvas = canvas + layer[:, None] * (colour[:, None, None] - canvas)
    return canvas


def _places(keypoints: Tensor, size: Size, out: Size | None) -> Tensor:
    """(h, w, 2): x and y, in pixels of ``size``, of the middles of a map's pixels."""
    rows, columns = out or size
    y = (torch.arange(rows, device=keypoints.device) + 0.5) * (size[0] / rows) - 0.5
    x = (torch.arange(columns, device=keypoints.device) + 0.5) * (size[1] / columns) - 0.5
    return torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1).to(keypoints.dtype)


def _squared_distances(keypoints: Tensor, places: Tensor) -> Tensor:
    """(B, 18, h, w): a Gaussian's or a disc's arguments; by axis, which is less to compute than by place."""
    x = (places[0, :, 0] - keypoints[..., :1]).square()
    y = (places[:, 0, 1] - keypoints[..., 1:]).square()
    return y[..., :, None] + x[..., None, :]
