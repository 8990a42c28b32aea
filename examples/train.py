"""Makes a small teacher of one of the examples: ``python examples/train.py dit DATA OUT --seconds 600``.

A stand-in for the weights that you have: a VAE for a third of the time, then the network by its own objective, in the
layout that its factory reads.
"""

import argparse
import json
import os
import time
from importlib import import_module
from itertools import count
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtTransformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from distill.autoencoder import reconstruction_loss
from distill.condition import per_target, with_missing
from distill.predictions import image_part
from rpfm_edge.people.data import draw_batch
from rpfm_edge.people.image import to_model
from rpfm_edge.people.pose import flip
from rpfm_edge.people.splits import open_splits

LATENT, POSE = 4, {"dit": 18, "unet": 24, "flow": 17}


def pictures(split, indices, flips, size):
    return torch.from_numpy(
        to_model(
            np.stack(
                [
                    split.image(i, size)[:, ::-1] if mirrored else split.image(i, size)
                    for i, mirrored in zip(indices, flips, strict=True)
                ]
            )
        )
    )


def joints(split, indices, flips, size):
    points = [split.pose(i, size) for i in indices]
    points = [flip(p, size[1]) if mirrored else p for p, mirrored in zip(points, flips, strict=True)]
    return with_missing(torch.from_numpy(np.stack(points)).float())


def train(parameters, loss, seconds, lr):
    """AdamW for ``seconds``; prints the loss every tenth of it."""
    optimizer, begun, losses = torch.optim.AdamW(parameters, lr), time.monotonic(), []
    for step in count():
        done = (time.monotonic() - begun) / seconds
        if done >= 1:
            return
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * (1 - 0.9 * done)
        value = loss(np.random.default_rng(step))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(value.item())
        if step % 100 == 0:
            print(f"{done:.0%} step {step} loss {np.mean(losses[-100:]):.4f}", flush=True)


def make_vae(split, size, out, seconds, widths):
    """Trains a KL autoencoder; its latents get a deviation of 1 by its scaling factor."""
    kinds = len(widths)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * kinds,
        up_block_types=("UpDecoderBlock2D",) * kinds,
        block_out_channels=widths,
        norm_num_groups=8,
        latent_channels=LATENT,
        layers_per_block=1,
    )

    def loss(rng):
        chosen = rng.integers(0, len(split.names), 4)
        image = pictures(split, chosen, rng.random(4) < 0.5, size)
        latent = vae.encode(image).latent_dist.mode()
        noisy = latent + 0.05 * latent.detach().std() * torch.randn_like(latent)
        return reconstruction_loss(vae.decode(noisy).sample, image) + 1e-4 * latent.square().mean()

    train(list(vae.parameters()), loss, seconds, 1e-3)
    with torch.no_grad():
        seen = vae.encode(pictures(split, range(16), [False] * 16, size)).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / float(seen.std()), shift_factor=float(seen.mean()))
    vae.save_pretrained(out / "vae")
    return 2 ** (kinds - 1)


def make_network(kind, size, factor, out, width):
    """Random weights where the factory looks for them."""
    channels, grid = LATENT + POSE[kind], tuple(side // factor // 2 for side in size)
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    if kind == "dit":
        vit = ViTConfig(
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=384,
            image_size=64,
            patch_size=8,
        )
        ViTModel(vit, add_pooling_layer=False).save_pretrained(out / "vit")
        PixArtTransformer2DModel(
            num_attention_heads=width // 32,
            attention_head_dim=32,
            in_channels=channels,
            out_channels=2 * LATENT,
            num_layers=4,
            cross_attention_dim=width,
            caption_channels=96,
            sample_size=2 * max(grid),
            patch_size=2,
            use_additional_conditions=False,
        ).save_pretrained(out / "network")
        DDIMScheduler(**schedule).save_pretrained(out / "scheduler")
    elif kind == "unet":
        UNet2DConditionModel(
            in_channels=channels,
            out_channels=LATENT,
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            norm_num_groups=8,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=4,
        ).save_pretrained(out / "network")
        DDIMScheduler(
            **schedule, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ).save_pretrained(out / "scheduler")
    else:
        config = {"channels": LATENT, "pose_channels": POSE[kind], "grid": grid, "width": width, "depth": 4, "heads": 4}
        (out / "config.json").write_text(json.dumps(config))
        save_file(import_module("flow").FlowTransformer(**config).state_dict(), out / "flow.safetensors")


def objective(parts, split, size):
    """The loss of its own prediction at times of its own schedule, for one batch."""
    adapted = parts.network
    schedule, kind = adapted.schedule, adapted.prediction.kind
    encode = torch.no_grad()(parts.codec.encode)

    def loss(rng):
        sources, targets, flips = draw_batch(split, 2, 4, rng)
        mirrored = flips.repeat(4)
        photo, latent = pictures(split, sources, flips, size), encode(pictures(split, targets.ravel(), mirrored, size))
        tensors = parts.source(photo, encode(photo), joints(split, sources, flips, size))
        tensors = per_target(tensors, 4) | parts.pose(joints(split, targets.ravel(), mirrored, size))
        dropped = torch.rand(8) < 0.1
        tensors = {name: one * ~dropped.view(-1, *[1] * (one.ndim - 1)) for name, one in tensors.items()}
        nodes = rng.integers(0, len(schedule.times), 8)
        drawn = (schedule.times[nodes], schedule.alphas[nodes], schedule.sigmas[nodes])
        tau, alpha, sigma = (torch.from_numpy(values).float() for values in drawn)
        alpha, sigma, noise = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1), torch.randn_like(latent)
        output = image_part(adapted.network(alpha * latent + sigma * noise, tau, **tensors), LATENT)
        wanted = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latent, "flow_prediction": noise - latent}
        return F.mse_loss(output, wanted[kind])

    return loss


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=tuple(POSE))
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--size", default="256x176")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vae-widths", type=int, nargs="+", default=[16, 32, 64])
    args = parser.parse_args()
    os.environ |= {"TEACHER_FOLDER": str(args.out), "TEACHER_SIZE": args.size}
    size, split = tuple(int(side) for side in args.size.split("x")), open_splits(args.data).training
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    factor = make_vae(split, size, args.out, args.seconds / 3, tuple(args.vae_widths))
    make_network(args.kind, size, factor, args.out, args.width)
    parts = import_module(args.kind).factory()
    modules = [part for part in (parts.network, parts.source) if isinstance(part, torch.nn.Module)]
    weights = [weight for module in modules for weight in module.parameters()]
    train(weights, objective(parts, split, size), args.seconds * 2 / 3, 1e-3)
    save(args.kind, parts, args.out)


def save(kind, parts, out):
    """Back to where the factory reads it."""
    network = parts.network.network
    if kind == "dit":
        network.transformer.save_pretrained(out / "network")
        parts.source.vit.save_pretrained(out / "vit")
    elif kind == "unet":
        network.unet.save_pretrained(out / "network")
        torch.save(parts.source.state_dict(), out / "tokens.pt")
    else:
        save_file(network.state_dict(), out / "flow.safetensors")


if __name__ == "__main__":
    main()
