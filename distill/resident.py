"""What training reads again and again, kept on the GPU where it fits: pictures decoded once, skeletons drawn once.

A GPU trains on thousands of samples a second, so nothing may be made on the host for each of them. On a CPU, where a
step takes far longer than its batch, nothing is kept and the memory stays free.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rpfm_edge.core.progress import progress
from rpfm_edge.people.data import Split

SHARE = 0.25  # of the free memory that one such thing may take
CHUNK = 256  # pictures that lie on the host at a time


def fits(size_bytes: int, device: torch.device | str) -> bool:
    """Whether something is small enough to stay on a device: a quarter of a GPU's free memory; never on a CPU."""
    if torch.device(device).type != "cuda":
        return False
    torch.cuda.empty_cache()  # what torch keeps for itself would count as taken
    return size_bytes <= SHARE * torch.cuda.mem_get_info(device)[0]


def settle(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device if it fits there, otherwise as it is."""
    return tensor.to(device) if fits(tensor.nbytes, device) else tensor


def make_pictures(
    make: Callable[[int], np.ndarray], count: int, size: tuple[int, int], device: torch.device | str, title: str
) -> Tensor:
    """(count, H, W, 3) uint8 on ``device``, picture i from ``make(i)``, made by several threads."""
    pictures = torch.empty((count, *size, 3), dtype=torch.uint8, device=device)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, progress(title, count) as advance:
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            pictures[start:stop] = torch.from_numpy(np.stack(list(pool.map(make, range(start, stop)))))
            advance(stop)
    return pictures


def as_model(pictures: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 → (B, 3, H, W) float32 in [-1, 1], channels last in memory: ``image.to_model`` for tensors."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class Pictures:
    """The pictures of a split: ``pictures(indices)`` are (n, H, W, 3) uint8.

    Where ``resident``, all of them are decoded at the first call and stay on the device; otherwise each call decodes
    its own, on the host.
    """

    split: Split
    size: tuple[int, int]
    device: torch.device | str
    resident: bool

    def __call__(self, indices: np.ndarray) -> Tensor:
        if self.resident:
            return self._all[torch.from_numpy(np.asarray(indices, np.int64)).to(self.device)]
        return torch.from_numpy(np.stack([self.split.image(int(i), self.size) for i in indices]))

    @cached_property
    def _all(self) -> Tensor:
        names = self.split.names
        return make_pictures(
            lambda i: self.split.image(i, self.size), len(names), self.size, self.device, "decoding images"
        )


def open_pictures(
    split: Split, size: tuple[int, int], device: torch.device | str, resident: bool | None = None
) -> Pictures:
    """The pictures of a split, resident where they fit (``fits``), or as told."""
    size_bytes = len(split.names) * size[0] * size[1] * 3
    return Pictures(split, size, device, fits(size_bytes, device) if resident is None else resident)
