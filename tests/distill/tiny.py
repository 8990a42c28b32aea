"""Toy networks and data for the tests of this folder: 64 × 48 pictures of the sample, dim 32, depth 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from distill.aligned import AlignedRPFM
from distill.autoencoder import (
    AlignedAutoencoder,
    SmallAutoencoder,
    SmallAutoencoderConfig,
    normalise,
    set_principal_components,
)
from distill.batches import EncodedSplit, encode_split
from distill.guidance import Guidance
from distill.networks import create_network
from distill.rpfm import RPFM, RPFMConfig
from distill.student import Student
from distill.teacher import NetworkTeacher
from rpfm_edge.people.data import sample_root
from rpfm_edge.people.deepfashion import open_split
from rpfm_edge.people.image import to_model

SIZE = (64, 48)
NETWORK = RPFMConfig(dim=32, depth=2, heads=2, latent_size=(8, 6))


Module = TypeVar("Module", bound=nn.Module)


def randomised(network: Module, seed: int = 0) -> Module:
    """Give the zero-initialised layers values, so that no gate hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


def toy_teacher(scale: float = 1.5, schedule: str = "constant") -> NetworkTeacher:
    """A random teacher over a principal-component autoencoder."""
    torch.manual_seed(0)
    autoencoder = SmallAutoencoder(SmallAutoencoderConfig(widths=(8, 8, 16)))
    images = open_split(sample_root(), "test").images(range(0, 96, 12), SIZE)
    set_principal_components(autoencoder, torch.from_numpy(to_model(images)))
    return NetworkTeacher(randomised(RPFM(NETWORK)), autoencoder, Guidance(scale, schedule), SIZE)


def toy_aligned_student() -> Student:
    """A random student of keypoints over a principal-component autoencoder; its map is a little off the limb map."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = replace(NETWORK, pose="keypoints", shared_modulation=True, step_embedding=True)
        network, autoencoder = create_network(config), AlignedAutoencoder(SmallAutoencoderConfig(widths=(8, 8, 16)))
    assert isinstance(network, AlignedRPFM)
    images = torch.from_numpy(to_model(open_split(sample_root(), "test").images(range(0, 96, 12), SIZE)))
    set_principal_components(autoencoder, images)
    normalise(autoencoder, [images])
    randomised(network)
    network.conditioner.see_as(autoencoder)
    with torch.no_grad():
        network.alignment.aligner.head.weight.mul_(0.1)
        network.alignment.aligner.estimate.weight.mul_(0.1)
    return Student(network, randomised(autoencoder, 1)).eval()


def toy_data(teacher: NetworkTeacher, cache: Path) -> EncodedSplit:
    """The sample, encoded by the teacher's autoencoder."""
    return encode_split(open_split(sample_root(), "test"), teacher.autoencoder, cache, SIZE)
