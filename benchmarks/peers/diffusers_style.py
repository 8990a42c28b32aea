"""The student as a pipeline of diffusers, written as its users write them: modules, a scheduler, a loop over steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from distill.condition import Source, Tensors, encode_pose
from distill.student import Student


class PoseTransferPipeline(DiffusionPipeline):
    """Source picture and skeleton → picture, by a few-step student without guidance.

    diffusers' sigma is 1 at noise and 0 at the image, ours is the other way round, so t = 1 - sigma and the velocity
    changes its sign. A flow map is given the step size too.
    """

    def __init__(self, network: Any, vae: Any, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(network=network, vae=vae, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=vae.factor)

    @torch.no_grad()
    def encode_source(self, image: np.ndarray) -> Tensors:
        """(H, W, 3) uint8 → keys and values of every layer."""
        pixels = self._pixels(image)
        nobody = pixels.new_full((1, 18, 2), float("nan"))
        return self.network.source(Source(self.vae.encode(pixels), pixels, nobody))

    @torch.no_grad()
    def __call__(
        self,
        pose: np.ndarray,
        latents: Tensor,
        image: np.ndarray | None = None,
        source: Tensors | None = None,
        num_inference_steps: int = 1,
    ) -> np.ndarray:
        """(H, W, 3) uint8 skeleton → (1, H, W, 3) uint8."""
        tensors = self.encode_source(image) if source is None else source
        tensors = tensors | encode_pose(self.network, self.vae, self._pixels(pose), tensors)
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps))
        with self.progress_bar(total=num_inference_steps) as bar:
            for timestep in self.scheduler.timesteps:
                time = 1 - timestep.expand(len(latents)) / self.scheduler.config.num_train_timesteps
                size = torch.full_like(time, 1 / num_inference_steps) if self.network.step is not None else None
                velocity = self.network(latents, time, size, **tensors)
                latents = self.scheduler.step(-velocity, timestep, latents, return_dict=False)[0]
                bar.update()
        decoded = self.image_processor.postprocess(self.vae.decode(latents), output_type="np")
        return (decoded * 255).round().astype(np.uint8)

    def _pixels(self, image: np.ndarray) -> Tensor:
        return self.image_processor.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)


def make_pipeline(student: Student) -> PoseTransferPipeline:
    """The pipeline around a student's own network and autoencoder, without its progress bar."""
    pipe = PoseTransferPipeline(student.network, student.autoencoder, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
