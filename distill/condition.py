"""What a network is conditioned on: the source of an identity, the pose of a frame, and the named tensors that it makes
of them.

A network is slotted in by five things (``Network``). What ``source`` returns becomes the outputs of ``prepare.onnx``,
by name, and those that ``frame.onnx`` takes its inputs; so a person is computed once, whatever the network keeps of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rpfm_edge.core.signature import PoseKind
from rpfm_edge.people.pose import MISSING

Tensors = dict[str, Tensor]


class Source(NamedTuple):
    """S sources.

    A missing joint is nan in data, and ``MISSING`` in a graph, where the joints may all be missing: see ``visible``.
    """

    latent: Tensor  # (S, C, h, w)
    pixels: Tensor  # (S, 3, H, W) in [-1, 1]
    joints: Tensor  # (S, 18, 2) pixels x, y

    def to(self, device: torch.device | str) -> Source:
        """On a device."""
        return Source(*(part.to(device) for part in self))

    def first(self, count: int) -> Source:
        """The first ``count`` of them."""
        return Source(*(part[:count] for part in self))


class Network(Protocol):
    """What the distiller and the exporter need of a network, an ``nn.Module``.

    Attributes:
        pose_kind: what ``pose`` gets, "skeleton" (B, 3, H, W) in [-1, 1] or "keypoints" (B, 18, 2) pixels x, y with
            ``MISSING``, never nan. With "keypoints" its ``prepare`` takes the source's keypoints, too.

    Optional attributes: ``encodes_pose`` (the autoencoder encodes the skeletons before ``pose`` gets them),
    ``frame_tensors`` (names of those tensors of ``source`` that a frame takes; all, if it is not there) and ``step``
    (None in a network that knows no step size).
    """

    pose_kind: PoseKind
    config: Any

    def source(self, source: Source, keep: Tensor | None = None) -> Tensors:
        """Once per identity: name → tensor, all with S in front. Where ``keep`` (S,) is False, the learned null.

        ``joints`` (S, 18, 2) and ``joint_scores`` (S, 18) among them tell a user what was found.
        """

    def pose(self, pose: Tensor, tensors: Tensors) -> Tensors:
        """Once per frame: name → tensor, all with B in front; ``tensors`` are those of ``source`` for B sources."""

    def start(self, noise: Tensor, tensors: Tensors) -> Tensor:
        """Where the flow starts, at t = 0, from (B, C, h, w) noise and the tensors of both: the noise, for most."""

    def __call__(self, x: Tensor, t: Tensor, d: Tensor | None = None, **tensors: Tensor) -> Tensor:
        """Velocity at (B, C, h, w) and times (B,), or the average one over [t, t + d]; all tensors of both by name."""


def visible(points: Tensor) -> Tensor:
    """(…, 18) bool of (…, 18, 2): neither nan nor ``MISSING``."""
    return points[..., 0] > MISSING / 2  # false for nan


def with_missing(points: Tensor) -> Tensor:
    """(…, 18, 2) with ``MISSING`` where a joint is nan, as graphs and ``Network.pose`` take it."""
    return torch.where(visible(points)[..., None], points, torch.full_like(points, MISSING))


def per_target(tensors: Tensors, count: int) -> Tensors:
    """Those of S sources for ``count`` frames each, grouped by source."""
    return {name: tensor.repeat_interleave(count, dim=0) for name, tensor in tensors.items()}


def encoded(autoencoder: Any, pixels: Tensor, joints: Tensor) -> Source:
    """The source of pictures (S, 3, H, W) in [-1, 1] and their joints."""
    return Source(autoencoder.encode(pixels), pixels, joints)


def encode_pose(network: Any, autoencoder: Any, pose: Tensor, tensors: Tensors) -> Tensors:
    """``Network.pose``, after the autoencoder where the network asks for it."""
    if getattr(network, "encodes_pose", False):
        with torch.no_grad():
            pose = autoencoder.encode(pose)
    return network.pose(pose, tensors)
