"""The RPFM network whose pose is keypoints: the source, aligned, joins the tokens; see ``distill.alignment``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.alignment import Aligned, Aligner, ResidualBlock, Seen, SourceEncoder, enlarge, fetch
from distill.rpfm import RPFM, RPFMConfig, patchify, unpatchify
from distill.surface import LAYERS


class Conditioner(nn.Module):
    """The aligned source as features at the latent's resolution."""

    def __init__(self, channels: int, width: int = 64, fine: int = 32, context: int = 64) -> None:
        super().__init__()
        joined = 3 * 64 + 4 * fine + 16 * (1 + len(LAYERS)) + context
        self.layers = nn.Sequential(nn.Conv2d(joined, width, 1), ResidualBlock(width), ResidualBlock(width), nn.Conv2d(width, channels, 1))

    def forward(self, moved: Tensor, fine: Tensor, masks: Tensor, context: Tensor) -> Tensor:
        parts = [F.pixel_unshuffle(moved, 8), F.pixel_unshuffle(fine, 2), F.pixel_unshuffle(masks, 4), context]
        return self.layers(torch.cat(parts, dim=1))


class AlignedRPFM(nn.Module):
    def __init__(self, config: RPFMConfig, size: tuple[int, int]) -> None:
        super().__init__()
        core = RPFM(config)
        core.pose_encoder = None
        self.core, self.config = core, config
        self.encoder, self.aligner, self.conditioner = SourceEncoder(), Aligner(size), Conditioner(config.pose_channels)
        core.embed_source = nn.Linear((config.latent_channels + 32) * config.patch**2, config.dim)

    def look(self, pixels: Tensor) -> Seen:
        return self.encoder(pixels)

    def source(self, latent: Tensor, pixels: Tensor, joints: Tensor, seen: Seen, keep: Tensor | None = None) -> dict[str, Tensor]:
        return {"source_kv": self.core.source_kv(torch.cat([latent, seen.coarse.float()], 1), keep), "photo": pixels, "fine": seen.fine,
                "coarse": seen.coarse, "summary": seen.summary, "joints": joints}

    def pose(self, target: Tensor, s: dict[str, Tensor]) -> dict[str, Tensor]:
        aligned = self.aligner(target, s["joints"], s["coarse"], s["summary"])
        return move(aligned, s["photo"], s["fine"])

    def forward(self, x, t, features, source_kv, d=None):
        return self.core(x, t, features, source_kv, d)


def move(aligned: Aligned, photo: Tensor, fine: Tensor) -> dict[str, Tensor]:
    quarter = F.avg_pool2d(aligned.grid.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    masks = torch.cat([torch.sigmoid(aligned.seen), torch.softmax(aligned.layers, dim=1)], dim=1)
    return {"moved": fetch(photo, enlarge(aligned.grid)), "fine": fetch(fine, quarter), "masks": masks, "context": aligned.context}


class AlignedDecoder(nn.Module):
    """Latents and the moved source → pictures: what the source shows is taken from it, by a learnt mask; 1.4 GFLOP."""

    def __init__(self, channels: int, widths: tuple[int, int, int] = (32, 64, 96), fine: int = 32) -> None:
        super().__init__()
        a, b, c = widths
        masks = 1 + len(LAYERS)
        self.to_patches = nn.Conv2d(channels, 3 * 64, 1)
        self.low = nn.Sequential(nn.Conv2d(channels, c, 3, padding=1), ResidualBlock(c), nn.Conv2d(c, 4 * b, 1), nn.PixelShuffle(2))
        self.join_fine = nn.Conv2d(fine + masks, b, 1)
        self.middle = nn.Sequential(ResidualBlock(b), nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2))
        self.join_moved = nn.Conv2d(12 + masks, a, 3, padding=1)
        self.high = nn.Sequential(ResidualBlock(a), nn.ReLU(), nn.Conv2d(a, 16, 3, padding=1), nn.PixelShuffle(2))
        nn.init.zeros_(self.high[2].weight)
        with torch.no_grad():
            self.high[2].bias.copy_(torch.tensor([0.0] * 12 + [-1.0] * 4))

    def forward(self, latent: Tensor, moved: Tensor, fine: Tensor, masks: Tensor) -> Tensor:
        """``latent`` not normalised."""
        h = self.low(latent) + self.join_fine(torch.cat([fine, F.avg_pool2d(masks, 2)], 1))
        h = self.middle(h) + self.join_moved(torch.cat([F.pixel_unshuffle(moved, 2), masks], 1))
        out = self.high(h)
        drawn, gate = F.pixel_shuffle(self.to_patches(latent), 8) + out[:, :3], torch.sigmoid(out[:, 3:])
        return drawn + gate * (moved - drawn)
