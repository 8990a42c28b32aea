"""The RPFM network whose pose is keypoints.

The source, aligned with the target pose (``distill.alignment``), joins the tokens as features; its own tokens carry
what the source encoder knows of its body, so that attention finds by itself what the map does not move.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.alignment import CONTEXT, Aligned, Alignment, enlarge, enlarged, fetch
from distill.autoencoder import FEATURES, MASKS, SmallAutoencoder
from distill.blocks import inner_convolutions, stack
from distill.condition import Source, Tensors, visible
from distill.rpfm import RPFM, RPFMConfig

PHOTO_TENSORS = ("photo", "backdrop", "fine", "coarse", "summary", "joints")  # of the source, that a frame aligns
CORNER = 8  # pixels of a photo's upper corners that show what is behind the person


class Conditioner(nn.Module):
    """The moved source as features at the latent's resolution, and as a guess at the latent itself."""

    def __init__(self, channels: int, latent_channels: int, factor: int = 8, width: int = 64) -> None:
        super().__init__()
        self.factor = factor
        quarter, half = factor // 4, factor // 2
        joined = 3 * factor**2 + FEATURES * quarter**2 + MASKS * half**2 + CONTEXT * (factor // 8) ** 2
        self.layers = nn.Sequential(nn.Conv2d(joined, width, 1), *stack(width, 2), nn.Conv2d(width, channels, 1))
        self.patches, self.correction = (
            nn.Conv2d(3 * factor**2, latent_channels, 1),
            nn.Conv2d(width, latent_channels, 1),
        )
        for layer in (self.patches, self.correction):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def see_as(self, autoencoder: SmallAutoencoder) -> None:
        """Begin with the latent that the linear path of an autoencoder gives the moved photo."""
        linear, scale = autoencoder.patches_to_latent, autoencoder.std.flatten()
        self.patches.weight.copy_(linear.weight / scale[:, None, None, None])
        self.patches.bias.copy_((linear.bias - autoencoder.mean.flatten()) / scale)

    def forward(
        self, moved_photo: Tensor, moved_features: Tensor, masks: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The moved photo and features, masks, and the aligner's context → features (B, channels, H/f, W/f), and the
        prior (B, C, H/f, W/f)."""
        given = ((moved_photo, 1), (moved_features, 4), (masks, 2), (context, 8))
        parts = [F.pixel_unshuffle(part, self.factor // scale) for part, scale in given]
        hidden = self.layers[:-1](torch.cat(parts, dim=1))
        return self.layers[-1](hidden), self.patches(parts[0]) + self.correction(hidden)


class AlignedRPFM(RPFM):
    """RPFM with an alignment. ``alignment`` is trained before, and frozen while the rest is trained.

    Its flow does not start from noise alone, but from noise around a prior: the latent that the moved source has, as
    far as a few convolutions see it. So there is less for the flow to do, and less that its noise decides.
    """

    pose_kind, source_keypoints = "keypoints", True
    frame_tensors = ("source_kv", *PHOTO_TENSORS)
    frozen = ("null_source", "alignment")

    def __init__(self, config: RPFMConfig) -> None:
        super().__init__(config)
        height, width = config.latent_size
        self.alignment = Alignment((config.factor * height, config.factor * width)).requires_grad_(False)
        self.conditioner = Conditioner(config.pose_channels, config.latent_channels, config.factor)
        joined = config.latent_channels + FEATURES * (config.factor // 8) ** 2
        self.embed_source = nn.Linear(joined * config.patch**2, config.dim)

    def source(self, source: Source, keep: Tensor | None = None) -> Tensors:
        """``source_kv``; the photo with its features and joints, for the alignment; and ``joint_scores``, in [0, 1].

        A joint that is not given is the one that the encoder finds.
        """
        seen = self.alignment.encoder(source.pixels)
        given = visible(source.joints)[..., None]
        body = F.pixel_unshuffle(seen.coarse, self.config.factor // 8)
        corners = torch.cat([source.pixels[..., :CORNER, :CORNER], source.pixels[..., :CORNER, -CORNER:]], dim=3)
        return {
            "source_kv": self.keys_and_values(torch.cat([source.latent, body], dim=1), keep),
            "photo": source.pixels,
            "backdrop": corners.mean((2, 3), keepdim=True),
            "fine": seen.fine,
            "coarse": seen.coarse,
            "summary": seen.summary,
            "joints": torch.where(given, source.joints, seen.joints),
            "joint_scores": torch.sigmoid(seen.scores),
        }

    def pose(self, pose: Tensor, tensors: Tensors) -> Tensors:
        """``pose``: features (B, P, h, w) of keypoints (B, 18, 2); ``prior`` (B, C, h, w), where the flow starts; for
        the decoder the moved photo and features and the masks."""
        aligned = self.alignment.aligner(pose, *(tensors[name] for name in ("joints", "fine", "coarse", "summary")))
        moved = move(aligned, tensors["photo"], tensors["fine"], tensors["backdrop"])
        features, prior = self.conditioner(**moved, context=aligned.context)
        return {"pose": features, "prior": prior, **moved}

    def start(self, noise: Tensor, tensors: Tensors) -> Tensor:
        """Where the flow starts, at t = 0."""
        return tensors["prior"] + self.config.start_noise * noise

    def as_student(self, step: bool) -> RPFM:
        """A copy whose paths go on starting where the stored ones do."""
        student = super().as_student(step)
        student.conditioner.requires_grad_(False)
        return student

    def int8_layers(self) -> dict[str, nn.Module]:
        """But for the alignment's, whose rounding moves a place by less than a tenth of a pixel."""
        return super().int8_layers() | dict(inner_convolutions(self.conditioner.layers, "conditioner.layers")[1:-1])


def move(aligned: Aligned, photo: Tensor, fine: Tensor, backdrop: Tensor) -> Tensors:
    """``moved_photo`` (B, 3, H, W): the photo as the target wants it, before the backdrop (B, 3, 1, 1);
    ``moved_features`` (B, 32, H/4, W/4): its features; ``masks`` (B, 9, H/2, W/2): whether the source shows the place,
    and which layer is there."""
    quarter = F.avg_pool2d(aligned.grid.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    masks = torch.cat([torch.sigmoid(aligned.seen), torch.softmax(aligned.layers, dim=1)], dim=1)
    person = 1 - enlarged(masks[:, 1:2])
    return {
        "moved_photo": backdrop + person * (fetch(photo, enlarge(aligned.grid)) - backdrop),
        "moved_features": fetch(fine, quarter),
        "masks": masks,
    }
