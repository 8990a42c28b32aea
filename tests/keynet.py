"""A network of a few hundred weights that wants keypoints and makes several tensors of a source, and a decoder that
looks at one of them: for the tests of the boundary between ``prepare`` and ``frame``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.autoencoder import SmallAutoencoder, SmallAutoencoderConfig
from distill.condition import Network, Source, Tensors, visible
from distill.export import Frame, Prepare, example_feeds, signatures
from distill.graphs import write_graph
from distill.student import Student
from rpfm_edge.core import artifact
from rpfm_edge.core.artifact import Artifact

SIZE, LATENT, STEPS = (64, 48), (8, 8, 6), 2


class KeyNetwork(Network):
    """Finds joints where none are given, and scores them by how much there is to be seen; its pose is a map."""

    pose_kind, source_keypoints = "keypoints", True
    frame_tensors = ("appearance", "joints")
    step = None

    def __init__(self) -> None:
        super().__init__()
        self.latent_shape, self.size = LATENT, SIZE
        self.find, self.look, self.mix = nn.Linear(8, 36), nn.Conv2d(8, 8, 1), nn.Conv2d(9, 8, 3, padding=1)
        rows, columns = torch.meshgrid(torch.arange(8) * 8 + 3.5, torch.arange(6) * 8 + 3.5, indexing="ij")
        self.register_buffer("places", torch.stack([columns, rows], dim=-1))

    def source(self, source: Source, keep: Tensor | None = None) -> Tensors:
        given = visible(source.joints)
        found = torch.sigmoid(self.find(source.latent.mean((2, 3)))).unflatten(1, (18, 2)) * 48
        contrast = (source.pixels - source.pixels.mean((1, 2, 3), keepdim=True)).abs().mean((1, 2, 3))
        scores = (10 * contrast).clamp(0, 1)[:, None].expand(-1, 18)
        appearance = self.look(source.latent)
        if keep is not None:
            appearance = appearance * keep[:, None, None, None]
        joints = torch.where(given[..., None], source.joints, found)
        return {"appearance": appearance, "joints": joints, "joint_scores": torch.where(given, torch.ones(()), scores)}

    def pose(self, pose: Tensor, tensors: Tensors) -> Tensors:
        return {"motion": self._map(pose) - self._map(tensors["joints"])}

    def _map(self, points: Tensor) -> Tensor:
        distances = (self.places[None, None] - points[:, :, None, None]).square().sum(-1)
        return (torch.exp(-distances / 100) * visible(points)[..., None, None]).sum(1, keepdim=True)

    def forward(
        self, x: Tensor, t: Tensor, d: Tensor | None = None, *, appearance: Tensor, motion: Tensor, **others: Tensor
    ) -> Tensor:
        return self.mix(torch.cat([x + appearance, motion], dim=1)) * (1 + t)[:, None, None, None]


class KeyAutoencoder(SmallAutoencoder):
    """Its pictures show a little of the source's appearance."""

    def decode(self, latent: Tensor, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        image = super().decode(latent)
        return image if tensors is None else image + 0.3 * F.interpolate(tensors["appearance"][:, :3], scale_factor=8)


def key_student() -> Student:
    """Random weights, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student: Any = Student(KeyNetwork(), KeyAutoencoder(SmallAutoencoderConfig(widths=(8, 8, 16))))
    return student.eval().requires_grad_(False)


def key_graph(student: Student, out: Path) -> Artifact:
    """The graph artifact of ``key_student``."""
    boundary = signatures(student, SIZE)
    noise = np.random.default_rng(0).standard_normal((1, *LATENT), dtype=np.float32)
    feeds = example_feeds(student, boundary, noise)
    config = {
        "steps": STEPS,
        "precision": "fp32",
        "size": list(SIZE),
        "latent_shape": list(LATENT),
        "pose": "keypoints",
    }
    with artifact.replacing_folder(out, "graph") as folder:
        for name, module in (("prepare", Prepare(student)), ("frame", Frame(student, STEPS))):
            write_graph(module, boundary[name], feeds[name], folder / f"{name}.onnx")
        np.save(folder / "noise.npy", noise)
        artifact.seal(folder, "graph", config, boundary, ())
    return artifact.load(out, "graph")
