"""The RPFM network whose pose is keypoints, and the autoencoder that goes with it.

The source, aligned with the target pose (``distill.alignment``), joins the tokens as features; its own tokens carry
what the source encoder knows of its body, so that attention finds by itself what the map does not move. The decoder sees
the moved pixels and takes from them what they show, by a learnt mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.alignment import CHANNELS, CONTEXT, MASKS, Aligned, Alignment, enlarge, fetch
from distill.autoencoder import ResidualBlock, SmallAutoencoder, SmallAutoencoderConfig
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
        joined = 3 * factor**2 + CHANNELS * quarter**2 + MASKS * half**2 + CONTEXT * (factor // 8) ** 2
        self.layers = nn.Sequential(
            nn.Conv2d(joined, width, 1), ResidualBlock(width), ResidualBlock(width), nn.Conv2d(width, channels, 1)
        )

    def forward(self, moved: Tensor, fine: Tensor, masks: Tensor, context: Tensor) -> Tensor:
        """The moved photo and features, masks, and the aligner's context → (B, channels, H/f, W/f)."""
        given = ((moved, 1), (fine, 4), (masks, 2), (context, 8))
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
        joined = config.latent_channels + CHANNELS * (config.factor // 8) ** 2
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
        return {"pose": self.conditioner(**moved, context=aligned.context)} | {
            f"{name}_source" if name != "masks" else name: tensor for name, tensor in moved.items()
        }


def move(aligned: Aligned, photo: Tensor, fine: Tensor) -> Tensors:
    """``moved`` (B, 3, H, W): the photo as the target wants it; ``fine`` (B, 32, H/4, W/4): its features; ``masks``
    (B, 9, H/2, W/2): whether the source shows the place, and which layer is there."""
    quarter = F.avg_pool2d(aligned.grid.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    masks = torch.cat([torch.sigmoid(aligned.seen), torch.softmax(aligned.layers, dim=1)], dim=1)
    return {"moved": fetch(photo, enlarge(aligned.grid)), "fine": fetch(fine, quarter), "masks": masks}


class AlignedAutoencoder(SmallAutoencoder):
    """``SmallAutoencoder``'s encoder, and a decoder that sees the moved source; 1.5 GFLOP to decode 256 × 176.

    Without a source, as for a picture that is only encoded and decoded, it sees masks and pixels of zero.
    """

    def __init__(self, config: SmallAutoencoderConfig) -> None:
        super().__init__(config)
        a, b, c = config.widths
        channels = config.latent_channels
        self.decoder = None
        self.low = nn.Sequential(
            nn.Conv2d(channels, c, 3, padding=1), ResidualBlock(c), nn.Conv2d(c, 4 * b, 1), nn.PixelShuffle(2)
        )
        self.join_fine = nn.Conv2d(CHANNELS + MASKS, b, 1)
        self.middle = nn.Sequential(ResidualBlock(b), nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2))
        self.join_moved = nn.Conv2d(12 + MASKS, a, 3, padding=1)
        self.high = nn.Sequential(ResidualBlock(a), nn.ReLU(), nn.Conv2d(a, 16, 3, padding=1), nn.PixelShuffle(2))
        nn.init.zeros_(self.high[2].weight)
        with torch.no_grad():
            self.high[2].bias.copy_(torch.tensor([0.0] * 12 + [-1.0] * 4))

    def raw_decode(self, latent: Tensor, tensors: Tensors | None = None) -> Tensor:
        """The image of a latent that is not normalised."""
        moved, fine, masks = self._moved(latent, tensors or {})
        x = self.low(latent) + self.join_fine(torch.cat([fine, F.avg_pool2d(masks, 2)], dim=1))
        x = self.middle(x) + self.join_moved(torch.cat([F.pixel_unshuffle(moved, 2), masks], dim=1))
        out = self.high(x)
        drawn = F.pixel_shuffle(self.latent_to_patches(latent), self.factor) + out[:, :3]
        return drawn + torch.sigmoid(out[:, 3:]) * (moved - drawn)

    def _moved(self, latent: Tensor, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        if "moved_source" in tensors:
            return tensors["moved_source"], tensors["fine_source"], tensors["masks"]
        batch, _, height, width = latent.shape
        shapes = ((3, 8), (CHANNELS, 2), (MASKS, 4))
        moved, fine, masks = (latent.new_zeros(batch, n, s * height, s * width) for n, s in shapes)
        return moved, fine, masks
