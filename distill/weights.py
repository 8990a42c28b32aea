"""Weights as safetensors: written aside and renamed, read strictly."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rpfm_edge.core.errors import ArtifactError
from rpfm_edge.core.files import write_bytes


def save_weights(module: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save the state of ``module``, floats as ``dtype``."""
    tensors = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in module.state_dict().items()
    }
    write_bytes(path, save(untied(tensors)))  # save_file would hide a full disk in an error of its own


def untied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own, which safetensors asks for: tied weights are stored once for each name."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        tied = tensor.numel() > 0 and tensor.untyped_storage().data_ptr() in seen
        own[name] = tensor.clone() if tied else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    return own


def load_weights(module: nn.Module, path: Path) -> None:
    """Load into ``module`` (any float dtype is cast); raises ``ArtifactError`` if names or shapes differ."""
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ArtifactError(
            f"{path} does not fit ({str(error).splitlines()[0]})",
            expected=f"the weights of a {type(module).__name__}",
            fix="copy or make the artifact again",
        ) from None


@contextmanager
def readable(file: Path, expected: str, fix: str) -> Iterator[None]:
    """Say of a file in a work folder that cannot be read, or that is of another network, what to do with it."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"{file} does not fit this run ({reason})", expected=expected, fix=fix) from None


def weights_digest(module: nn.Module, what: str = "") -> str:
    """sha256 of ``what`` and of the weights of a module, the same on every device."""
    sha = hashlib.sha256(what.encode())
    for name, value in module.state_dict().items():
        sha.update(name.encode())
        sha.update(value.detach().float().cpu().numpy().tobytes())
    return sha.hexdigest()
