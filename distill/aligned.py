"""The RPFM network whose pose is keypoints.

The source, aligned with the target pose (``distill.alignment``), joins the tokens as features; its own tokens carry
what the source encoder knows of its body, so that attention finds by itself what the map does not move.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.alignment import CONTEXT, Aligned, Alignment, enlarge, fetch
from distill.autoencoder import FEATURES, MASKS
from distill.blocks import stack
from distill.condition import Source, Tensors, visible
from distill.rpfm import RPFM, RPFMConfig

PHOTO_TENSORS = ("photo", "fine", "coarse", "summary", "joints")  # of the source, that a frame aligns


def create_network(config: RPFMConfig) -> RPFM:
    """The network of a config, by the kind of its pose."""
    return AlignedRPFM(config) if config.pose == "keypoints" else RPFM(config)


class Conditioner(nn.Module):
    """The moved source as features at the latent's resolution."""

    def __init__(self, channels: int, factor: int = 8, width: int = 64) -> None:
        super().__init__()
        self.factor = factor
        quarter, half = factor // 4, factor // 2
        joined = 3 * factor**2 + FEATURES * quarter**2 + MASKS * half**2 + CONTEXT * (factor // 8) ** 2
        self.layers = nn.Sequential(nn.Conv2d(joined, width, 1), *stack(width, 2), nn.Conv2d(width, channels, 1))

    def forward(self, moved_photo: Tensor, moved_features: Tensor, masks: Tensor, context: Tensor) -> Tensor:
        """The moved photo and features, masks, and the aligner's context → (B, channels, H/f, W/f)."""
        given = ((moved_photo, 1), (moved_features, 4), (masks, 2), (context, 8))
        return self.layers(torch.cat([F.pixel_unshuffle(part, self.factor // scale) for part, scale in given], dim=1))


class AlignedRPFM(RPFM):
    """RPFM with an alignment. ``alignment`` is trained before, and frozen while the rest is trained."""

    pose_kind = "keypoints"
    encodes_pose = False
    frame_tensors = ("source_kv", *PHOTO_TENSORS)

    def __init__(self, config: RPFMConfig) -> None:
        super().__init__(config)
        height, width = config.latent_size
        self.alignment = Alignment((config.factor * height, config.factor * width)).requires_grad_(False)
        self.conditioner = Conditioner(config.pose_channels, config.factor)
        joined = config.latent_channels + FEATURES * (config.factor // 8) ** 2
        self.embed_source = nn.Linear(joined * config.patch**2, config.dim)

    def source(self, source: Source, keep: Tensor | None = None) -> Tensors:
        """``source_kv``; the photo with its features and joints, for the alignment; and ``joint_scores``, in [0, 1].

        A joint that is not given is the one that the encoder finds.
        """
        seen = self.alignment.encoder(source.pixels)
        given = visible(source.joints)[..., None]
        body = F.pixel_unshuffle(seen.coarse, self.config.factor // 8)
        return {
            "source_kv": self.keys_and_values(torch.cat([source.latent, body], dim=1), keep),
            "photo": source.pixels,
            "fine": seen.fine,
            "coarse": seen.coarse,
            "summary": seen.summary,
            "joints": torch.where(given, source.joints, seen.joints),
            "joint_scores": torch.sigmoid(seen.scores),
        }

    def pose(self, pose: Tensor, tensors: Tensors) -> Tensors:
        """``pose``: features (B, P, h, w) of keypoints (B, 18, 2); the moved photo and features and the masks besides,
        for the decoder."""
        aligned = self.alignment.aligner(pose, tensors["joints"], tensors["coarse"], tensors["summary"])
        moved = move(aligned, tensors["photo"], tensors["fine"])
        return {"pose": self.conditioner(**moved, context=aligned.context), **moved}


def move(aligned: Aligned, photo: Tensor, fine: Tensor) -> Tensors:
    """``moved_photo`` (B, 3, H, W): the photo as the target wants it; ``moved_features`` (B, 32, H/4, W/4): its
    features; ``masks`` (B, 9, H/2, W/2): whether the source shows the place, and which layer is there."""
    quarter = F.avg_pool2d(aligned.grid.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    masks = torch.cat([torch.sigmoid(aligned.seen), torch.softmax(aligned.layers, dim=1)], dim=1)
    return {
        "moved_photo": fetch(photo, enlarge(aligned.grid)),
        "moved_features": fetch(fine, quarter),
        "masks": masks,
    }
