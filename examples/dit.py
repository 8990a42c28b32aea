"""A DiT of X-MDPT's kind: diffusers' PixArt transformer that predicts noise and its variance, with a ViT's features of
the source, heat maps of the pose and an SD-layout VAE. ``examples/train.py dit`` makes the folder that it reads."""

import os
from pathlib import Path

import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel
from torch import nn
from torch.nn import functional as F
from transformers import ViTModel

from distill.autoencoder import load_kl
from distill.contract import Parts
from distill.drawing import heat_maps
from distill.guidance import Guidance
from distill.predictions import Adapted
from distill.schedulers import read_scheduler, sampler_path

FOLDER = Path(os.environ.get("TEACHER_FOLDER", "runs/dit"))
SIZE = tuple(int(side) for side in os.environ.get("TEACHER_SIZE", "256x176").split("x"))


class Noise(nn.Module):
    """The transformer, by the names of our tensors."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer

    def forward(self, x, tau, *, tokens, heat):
        return self.transformer(torch.cat([x, heat], 1), encoder_hidden_states=tokens, timestep=tau).sample


class Look(nn.Module):
    """What the ViT sees of a source."""

    def __init__(self, vit):
        super().__init__()
        self.vit, self.side = vit, vit.config.image_size

    def forward(self, pixels, latent, keypoints):
        square = F.interpolate(pixels, (self.side, self.side), mode="bilinear", align_corners=False)
        return {"tokens": self.vit(square).last_hidden_state}


def factory() -> Parts:
    codec, scheduler = load_kl(FOLDER / "vae"), DDIMScheduler.from_pretrained(FOLDER / "scheduler")
    scheduler.set_timesteps(25)
    transformer = PixArtTransformer2DModel.from_pretrained(FOLDER / "network")
    out = SIZE[0] // codec.factor, SIZE[1] // codec.factor
    return Parts(
        network=Adapted(Noise(transformer), *read_scheduler(scheduler)),
        codec=codec,
        size=SIZE,
        source=Look(ViTModel.from_pretrained(FOLDER / "vit", add_pooling_layer=False)),
        pose=lambda keypoints: {"heat": heat_maps(keypoints, SIZE, out=out)},
        guidance=Guidance(2.0),
        path=lambda predict, noise, times: sampler_path(predict, scheduler, noise, times),
    )
