"""A UNet of CFLD's and FPDM's kind: diffusers' UNet2DConditionModel with v-prediction and zero terminal SNR, the
skeletons of target and source beside the latent, and three branches of guidance. ``examples/train.py unet`` makes the
folder that it reads."""

import os
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F

from distill.autoencoder import load_kl
from distill.contract import Parts
from distill.drawing import heat_maps, skeletons
from distill.guidance import Branch
from distill.predictions import Adapted
from distill.schedulers import read_scheduler, sampler_path

FOLDER = Path(os.environ.get("TEACHER_FOLDER", "runs/unet"))
SIZE = tuple(int(side) for side in os.environ.get("TEACHER_SIZE", "256x176").split("x"))
POSE, SOURCE = 2.0, 2.0  # scales of the guidance


class V(nn.Module):
    """The UNet, by the names of our tensors."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, tau, *, tokens, source_pose, target_pose):
        given = torch.cat([x, source_pose, target_pose], 1)
        return self.unet(given, tau, encoder_hidden_states=tokens).sample


class Tokens(nn.Module):
    """The source's latent as tokens of patches, and its skeleton."""

    def __init__(self, channels, width, out):
        super().__init__()
        self.patches, self.out = nn.Conv2d(channels, width, 4, 4), out

    def forward(self, pixels, latent, keypoints):
        tokens = self.patches(F.pad(latent, (0, -latent.shape[3] % 4, 0, -latent.shape[2] % 4)))
        return {"tokens": tokens.flatten(2).transpose(1, 2), "source_pose": skeletons(keypoints, SIZE, out=self.out)}


def factory() -> Parts:
    codec, scheduler = load_kl(FOLDER / "vae"), DDIMScheduler.from_pretrained(FOLDER / "scheduler")
    scheduler.set_timesteps(20)
    unet, out = UNet2DConditionModel.from_pretrained(FOLDER / "network"), tuple(s // codec.factor for s in SIZE)
    source = Tokens(codec.latent_channels, unet.config.cross_attention_dim, out)
    if (FOLDER / "tokens.pt").exists():
        source.load_state_dict(torch.load(FOLDER / "tokens.pt"))

    def pose(keypoints):
        return {"target_pose": torch.cat([skeletons(keypoints, SIZE, out=out), heat_maps(keypoints, SIZE, out=out)], 1)}

    everything = ("tokens", "source_pose", "target_pose")
    return Parts(
        network=Adapted(V(unet), *read_scheduler(scheduler)),
        codec=codec,
        size=SIZE,
        source=source,
        pose=pose,
        source_keypoints=True,
        guidance=(Branch(1 - POSE, everything), Branch(POSE - SOURCE, everything[:2]), Branch(SOURCE)),
        path=lambda predict, noise, times: sampler_path(predict, scheduler, noise, times),
    )
