"""A flow transformer in the other time direction: its own names of weights, a plain safetensors file, and tokens of the
source's latent in the same sequence. ``examples/train.py flow`` makes the folder that it reads."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from distill.autoencoder import load_kl
from distill.contract import Parts
from distill.drawing import limb_maps
from distill.predictions import Adapted
from distill.schedulers import read_scheduler

FOLDER = Path(os.environ.get("TEACHER_FOLDER", "runs/flow"))
SIZE = tuple(int(side) for side in os.environ.get("TEACHER_SIZE", "256x176").split("x"))


class FlowTransformer(nn.Module):
    """Joint attention over the tokens of target and source; predicts ε - x₀ at τ = 1000 (noise) … 0 (image)."""

    def __init__(self, channels, pose_channels, grid, width, depth, heads):
        super().__init__()
        self.grid, tokens = grid, grid[0] * grid[1]
        self.img_in, self.ref_in = nn.Linear(4 * (channels + pose_channels), width), nn.Linear(4 * channels, width)
        self.places = nn.Parameter(0.02 * torch.randn(1, 2 * tokens, width))
        self.time_in = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, **options) for _ in range(depth)
        )
        self.img_out = nn.Linear(width, 4 * channels)

    def forward(self, x, tau, *, reference, limbs):
        patches, seen = (
            nn.functional.pixel_unshuffle(part, 2).flatten(2).transpose(1, 2)
            for part in (torch.cat([x, limbs], 1), reference)
        )
        tokens = torch.cat([self.img_in(patches), self.ref_in(seen)], 1) + self.places
        tokens = tokens + self.time_in(tau[:, None] / 1000)[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        out = self.img_out(tokens[:, : patches.shape[1]]).transpose(1, 2).unflatten(2, self.grid)
        return nn.functional.pixel_shuffle(out, 2)


def factory() -> Parts:
    codec, config = load_kl(FOLDER / "vae"), json.loads((FOLDER / "config.json").read_text())
    network, out = FlowTransformer(**config), tuple(side // codec.factor for side in SIZE)
    network.load_state_dict(load_file(FOLDER / "flow.safetensors"))
    return Parts(
        network=Adapted(network, *read_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"})),
        codec=codec,
        size=SIZE,
        source=lambda pixels, latent, keypoints: {"reference": latent},
        pose=lambda keypoints: {"limbs": limb_maps(keypoints, SIZE, out=out)},
        time_embedding="network.time_in",
    )
