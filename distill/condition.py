"""What a network is conditioned on: the source of an identity, the pose of a frame, and the named tensors that it makes
of them.

A network is slotted in by ``Network``; ``distill.contract`` makes one of other people's. What ``source`` returns
becomes the outputs of ``prepare.onnx``, by name, and those that ``frame.onnx`` takes its inputs; so a person is
computed once, whatever the network keeps of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rpfm_edge.core.signature import PoseKind
from rpfm_edge.people.image import Fit
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


class Network(nn.Module):
    """What the distiller and the exporter need of a network.

    Attributes:
        latent_shape: (C, h, w) of what it moves.
        size: (H, W) of the pictures.
        step: what embeds a step size; None in a network that knows none.
        pose_kind: what ``pose`` gets, "skeleton" (B, 3, H, W) in [-1, 1] or "keypoints" (B, 18, 2) pixels x, y with
            ``MISSING``, never nan.
        source_keypoints: whether ``source`` looks at keypoints, so that ``prepare`` takes them.
        encodes_pose: whether the autoencoder encodes the skeletons before ``pose`` gets them.
        frame_tensors: names of those tensors of ``source`` that a frame takes; None for all.
        fit: how pictures meet ``size``, a data set's and a user's: with margins, or stretched. None, where they have
            its aspect anyway: data is stretched, photos get margins.
        frozen: its parameters and modules, by name, that no student trains.
    """

    latent_shape: tuple[int, int, int]
    size: tuple[int, int]
    step: nn.Module | None
    pose_kind: PoseKind = "skeleton"
    source_keypoints: bool = False
    encodes_pose: bool = False
    frame_tensors: tuple[str, ...] | None = None
    fit: Fit | None = None
    frozen: tuple[str, ...] = ()

    def source(self, source: Source, keep: Tensor | None = None) -> Tensors:
        """Once per identity: name → tensor, all with S in front. Where ``keep`` (S,) is False, what stands for nobody.

        ``joints`` (S, 18, 2) and ``joint_scores`` (S, 18) among them tell a user what was found.
        """
        raise NotImplementedError

    def pose(self, pose: Tensor, tensors: Tensors) -> Tensors:
        """Once per frame: name → tensor, all with B in front; ``tensors`` are those of ``source`` for B sources."""
        raise NotImplementedError

    def null(self, tensors: Tensors) -> Tensors:
        """What stands for ``tensors`` in a picture of nobody in no pose, for guidance: names and shapes as given."""
        return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}

    def start(self, noise: Tensor, tensors: Tensors) -> Tensor:
        """Where the flow starts, at t = 0, from (B, C, h, w) noise and the tensors of both."""
        return noise

    def forward(self, x: Tensor, t: Tensor, d: Tensor | None = None, **tensors: Tensor) -> Tensor:
        """Velocity at (B, C, h, w) and times (B,), or the average one over [t, t + d]; all tensors of both by name."""
        raise NotImplementedError

    def as_student(self, step: bool) -> Network:
        """A copy to distill, which computes what this one does; with ``step`` it can learn a step size, if there is a
        way. What it must keep is frozen."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """What ``distill.networks.create`` makes the same architecture of."""
        raise NotImplementedError

    def int8_layers(self) -> dict[str, nn.Module]:
        """What ``quantize`` turns into INT8, by name, for quantization-aware distillation."""
        return {}


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


def encode_pose(network: Network, autoencoder: Any, pose: Tensor, tensors: Tensors) -> Tensors:
    """``Network.pose``, after the autoencoder where the network asks for it."""
    if network.encodes_pose:
        with torch.no_grad():
            pose = autoencoder.encode(pose)
    return network.pose(pose, tensors)
