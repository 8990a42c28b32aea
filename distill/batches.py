"""Training batches: latents encoded once, skeletons drawn on the fly, sources shared by several targets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from distill.autoencoder import Autoencoder
from rpfm_edge.artifact import json_digest, write_bytes
from rpfm_edge.data import Split
from rpfm_edge.image import to_model
from rpfm_edge.pose import draw_skeleton, flip
from rpfm_edge.progress import progress


@dataclass(frozen=True, slots=True)
class Batch:
    """S sources with M targets each, B = S M; ``target`` is None where only conditions are needed."""

    source: Tensor  # (S, C, h, w)
    pose: Tensor  # (B, 3, H, W) skeletons in [-1, 1]
    target: Tensor | None = None  # (B, C, h, w)


@dataclass(frozen=True, slots=True)
class EncodedSplit:
    """A split with the latents of its images, plain and mirrored: ``latents[flipped, index]``, float16."""

    split: Split
    latents: Tensor  # (2, N, C, h, w)
    size: tuple[int, int]

    def batch(
        self, sources: np.ndarray, targets: np.ndarray, flips: np.ndarray, device: torch.device | str = "cpu"
    ) -> Batch:
        """The batch of (S,) sources, (S, M) targets and (S,) mirrorings, as ``data.draw_batch`` gives them."""
        mirrored = torch.from_numpy(flips.astype(np.int64))
        source = self.latents[mirrored, torch.from_numpy(sources)]
        target = self.latents[mirrored.repeat_interleave(targets.shape[1]), torch.from_numpy(targets.ravel())]
        skeletons = [
            self.skeleton(index, flipped) for row, flipped in zip(targets, flips, strict=True) for index in row
        ]
        pose = torch.from_numpy(to_model(np.stack(skeletons)))
        return Batch(source.float().to(device), pose.to(device), target.float().to(device))

    def skeleton(self, index: int, flipped: bool = False) -> np.ndarray:
        """(H, W, 3) uint8: the drawn pose of image ``index``."""
        keypoints = self.split.pose(index, self.size)
        return draw_skeleton(flip(keypoints, self.size[1]) if flipped else keypoints, self.size)


@torch.no_grad()
def encode_split(
    split: Split, autoencoder: Autoencoder, cache: Path, size: tuple[int, int], device: torch.device | str = "cpu"
) -> EncodedSplit:
    """Encode every image of a split, plain and mirrored.

    The latents are kept in the folder ``cache`` under the digest of data set, names, size and weights.
    """
    key = json_digest(
        {
            "root": str(split.root.resolve()),
            "names": split.names,
            "size": size,
            "autoencoder": _fingerprint(autoencoder),
        }
    )
    file = cache / f"latents-{key[:16]}.safetensors"
    if not file.exists():
        write_bytes(file, save({"latents": _encode(split, autoencoder, size, device)}))
    return EncodedSplit(split, load_file(file)["latents"], size)


def _encode(split: Split, autoencoder: Autoencoder, size: tuple[int, int], device: torch.device | str) -> Tensor:
    plain, mirrored = [], []
    with progress("encoding images", total=len(split.names)) as advance:
        for start in range(0, len(split.names), 32):
            indices = range(start, min(start + 32, len(split.names)))
            images = torch.from_numpy(to_model(np.stack([split.image(i, size) for i in indices]))).to(device)
            plain.append(autoencoder.encode(images).half().cpu())
            mirrored.append(autoencoder.encode(images.flip(3)).half().cpu())
            advance(indices[-1] + 1)
    return torch.stack([torch.cat(plain), torch.cat(mirrored)]).contiguous()


def _fingerprint(autoencoder: Autoencoder) -> float:
    """A number that changes with the weights: enough to tell caches of one project apart."""
    assert isinstance(autoencoder, nn.Module)
    return float(sum(p.detach().double().abs().sum() for p in autoencoder.parameters()))
