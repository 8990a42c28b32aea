"""Toy networks and data for the tests of this folder: 64 × 48 pictures of the sample, dim 32, depth 2."""

from __future__ import annotations

from pathlib import Path

import torch

from distill.autoencoder import SmallAutoencoder, SmallAutoencoderConfig, set_principal_components
from distill.batches import EncodedSplit, encode_split
from distill.rpfm import RPFM, RPFMConfig
from distill.teacher import Guidance, RPFMTeacher
from rpfm_edge.data import open_split, sample_root
from rpfm_edge.image import to_model

SIZE = (64, 48)
NETWORK = RPFMConfig(dim=32, depth=2, heads=2, latent_size=(8, 6))


def randomised(network: RPFM, seed: int = 0) -> RPFM:
    """Give the zero-initialised layers values, so that no gate hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def toy_teacher(scale: float = 1.5, schedule: str = "constant") -> RPFMTeacher:
    """A random teacher over a principal-component autoencoder."""
    torch.manual_seed(0)
    autoencoder = SmallAutoencoder(SmallAutoencoderConfig(widths=(8, 8, 16)))
    images = open_split(sample_root(), "test").images(range(0, 96, 12), SIZE)
    set_principal_components(autoencoder, torch.from_numpy(to_model(images)))
    return RPFMTeacher(randomised(RPFM(NETWORK)), autoencoder, Guidance(scale, schedule), SIZE)


def toy_data(teacher: RPFMTeacher, cache: Path) -> EncodedSplit:
    """The sample, encoded by the teacher's autoencoder."""
    return encode_split(open_split(sample_root(), "test"), teacher.autoencoder, cache, SIZE)
