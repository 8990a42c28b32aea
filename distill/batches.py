"""Training batches: latents encoded once, sources shared by several targets, skeletons drawn once or on the fly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from distill.autoencoder import Autoencoder, describe
from distill.condition import Source, with_missing
from distill.resident import Pictures, as_model, fits, make_pictures, open_pictures
from distill.weights import readable, weights_digest
from rpfm_edge.core.files import json_digest, write_bytes
from rpfm_edge.core.progress import progress
from rpfm_edge.core.signature import PoseKind
from rpfm_edge.people.data import Split
from rpfm_edge.people.image import to_model
from rpfm_edge.people.pose import draw_skeleton, flip


@dataclass(frozen=True, slots=True)
class Batch:
    """S sources with M targets each, B = S M; ``target`` is None where only conditions are needed."""

    source: Source
    pose: Tensor  # (B, 3, H, W) skeletons in [-1, 1], or (B, 18, 2) keypoints with ``MISSING``
    target: Tensor | None = None  # (B, C, h, w)


@dataclass(frozen=True, slots=True)
class EncodedSplit:
    """A split with the latents of its images, plain and mirrored: ``latents[flipped, index]``, float16.

    ``skeletons[flipped, index]`` are the drawn poses, uint8, where they lie on the latents' device; without them each
    batch draws its own. ``pose`` is the kind that batches hold. Sources are read from ``pictures``, or from the split.
    """

    split: Split
    latents: Tensor  # (2, N, C, h, w)
    size: tuple[int, int]
    skeletons: Tensor | None = None  # (2, N, H, W, 3)
    pose: PoseKind = "skeleton"
    pictures: Pictures | None = None

    def batch(
        self, sources: np.ndarray, targets: np.ndarray, flips: np.ndarray, device: torch.device | str = "cpu"
    ) -> Batch:
        """The batch of (S,) sources, (S, M) targets and (S,) mirrorings, as ``data.draw_batch`` gives them."""
        place = self.latents.device
        mirrored = torch.from_numpy(flips.astype(np.int64)).to(place)
        flipped, wanted = mirrored.repeat_interleave(targets.shape[1]), torch.from_numpy(targets.ravel()).to(place)
        latent = self.latents[mirrored, torch.from_numpy(sources).to(place)].float()
        source = Source(latent, self.pixels(sources, flips), self._keypoints(sources, flips))
        if self.pose == "keypoints":
            pose = with_missing(self._keypoints(targets.ravel(), flips.repeat(targets.shape[1])))
        elif self.skeletons is None:
            pose = self._draw(targets, flips)
        else:
            pose = as_model(self.skeletons[flipped, wanted]).contiguous()
        target = self.latents[flipped, wanted]
        return Batch(source.to(device), pose.to(device), target.to(device).float())

    def pixels(self, indices: np.ndarray, flips: np.ndarray) -> Tensor:
        """(n, 3, H, W) in [-1, 1], mirrored where ``flips`` (n,) says so."""
        pictures = self.pictures or Pictures(self.split, self.size, "cpu", False)
        plain = as_model(pictures(indices)).contiguous()
        mirrored = torch.from_numpy(flips).to(plain.device).view(-1, 1, 1, 1)
        return torch.where(mirrored, plain.flip(3), plain)

    def _keypoints(self, indices: np.ndarray, flips: np.ndarray) -> Tensor:
        """(n, 18, 2) pixels, nan where missing, mirrored where ``flips`` (n,) says so."""
        plain = np.stack([self.split.pose(int(index), self.size) for index in indices])
        return torch.from_numpy(np.where(flips[:, None, None], flip(plain, self.size[1]), plain))

    def _draw(self, targets: np.ndarray, flips: np.ndarray) -> Tensor:
        drawn = [self.skeleton(index, flipped) for row, flipped in zip(targets, flips, strict=True) for index in row]
        return torch.from_numpy(to_model(np.stack(drawn)))

    def skeleton(self, index: int, flipped: bool = False) -> np.ndarray:
        """(H, W, 3) uint8: the drawn pose of image ``index``."""
        keypoints = self.split.pose(index, self.size)
        return draw_skeleton(flip(keypoints, self.size[1]) if flipped else keypoints, self.size)


def encode_split(
    split: Split,
    autoencoder: Autoencoder,
    cache: Path,
    size: tuple[int, int],
    device: torch.device | str = "cpu",
    pictures: Pictures | None = None,
    pose: PoseKind = "skeleton",
    needed: np.ndarray | None = None,
    also: Path | None = None,
) -> EncodedSplit:
    """Encode the images of a split, plain and mirrored; on a GPU the result stays there, skeletons too if they fit.

    The latents are kept in the folder ``cache`` under the digest of data set, names, size and weights, and looked for
    in the folder ``also``. ``pictures`` are those of the split, where somebody has them already; ``pose`` is the kind
    that batches will hold. ``needed``: the indices whose latents will be asked for, all of them if not given.
    """
    key = json_digest(
        {
            "root": str(split.root.resolve()),
            "names": split.names,
            "size": size,
            **({} if split.fit == "squeeze" else {"fit": split.fit}),
            "autoencoder": fingerprint(autoencoder),
        }
    )
    whole = [folder / f"latents-{key[:16]}.safetensors" for folder in (cache, also) if folder is not None]
    file, indices = next((one for one in whole if one.exists()), whole[0]), np.arange(len(split.names))
    if needed is not None and not file.exists() and 2 * len(needed) < len(indices):  # else all, for later students
        indices, key = needed, json_digest([key, needed.tolist()])
        file = cache / f"latents-{key[:16]}.safetensors"
    pictures = pictures or open_pictures(split, size, device)
    if not file.exists():
        write_bytes(file, save({"latents": _encode(pictures, indices, autoencoder, device)}))
    with readable(file, "whole latents", "delete it, and they are encoded again"):
        latents = load_file(file)["latents"]
    return settle_split(EncodedSplit(split, latents, size, pose=pose, pictures=pictures), device)


def settle_split(data: EncodedSplit, device: torch.device | str, resident: bool | None = None) -> EncodedSplit:
    """The split with its latents on a GPU, and all its skeletons drawn there if they fit; on a CPU as it is.

    ``resident``: draw them, or not, wherever it is. Those of keypoints are not drawn.
    """
    count, (height, width) = len(data.split.names), data.size
    on_gpu = torch.device(device).type == "cuda"
    settled = replace(data, latents=data.latents.to(device) if on_gpu or resident else data.latents, skeletons=None)
    if resident is None:
        resident = data.pose == "skeleton" and fits(2 * count * height * width * 3, device)
    if not resident:
        return settled
    drawn = make_pictures(
        lambda i: data.skeleton(i % count, i >= count), 2 * count, data.size, device, "drawing skeletons"
    )
    return replace(settled, skeletons=drawn.unflatten(0, (2, count)))


@torch.no_grad()
def _encode(pictures: Pictures, indices: np.ndarray, autoencoder: Autoencoder, device: torch.device | str) -> Tensor:
    """(2, N, C, h, w): plain and mirrored; of pictures that are not among ``indices``, zeros."""
    pictures(np.arange(1))  # decodes all of them where they stay, behind a bar of its own
    latents: Tensor | None = None
    with progress("encoding images", total=len(indices)) as advance:
        for start in range(0, len(indices), 32):
            some = indices[start : start + 32]
            images = as_model(pictures(some).to(device)).contiguous()
            both = torch.stack([autoencoder.encode(one).half().cpu() for one in (images, images.flip(3))])
            if latents is None:
                latents = both.new_zeros(2, len(pictures.split.names), *both.shape[2:])
            latents[:, torch.from_numpy(some)] = both
            advance(start + len(some))
    assert latents is not None
    return latents


def fingerprint(autoencoder: Autoencoder) -> str:
    """sha256 of config and weights, the same on every device."""
    assert isinstance(autoencoder, nn.Module)
    return weights_digest(autoencoder, json_digest(describe(autoencoder)))
