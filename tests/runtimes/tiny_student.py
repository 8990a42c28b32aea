"""A model of a few hundred weights with the boundary of a frame graph, and the factory of its torch twin.

One convolution over the pose, added to the noise; LayerNorm; attention to the source's keys and values; a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.core.signature import Signature, TensorSpec

HEIGHT, WIDTH, CHANNELS, SOURCE_TOKENS = 8, 6, 4, 5
IMAGE = (1, HEIGHT, WIDTH, 3)
TOKENS = (1, HEIGHT * WIDTH, CHANNELS)
SIGNATURE = Signature(
    (
        TensorSpec("pose", IMAGE, "uint8"),
        TensorSpec("noise", (1, CHANNELS, HEIGHT, WIDTH), "float32"),
        TensorSpec("source_kv", (2, SOURCE_TOKENS, CHANNELS), "float32"),
    ),
    (TensorSpec("image", IMAGE, "uint8"), TensorSpec("tokens", TOKENS, "float32")),
)


def weights() -> dict[str, np.ndarray]:
    """Weights by name, float32."""
    rng = np.random.default_rng(7)
    shapes = {
        "conv": (CHANNELS, 3, 3, 3),
        "scale": (CHANNELS,),
        "shift": (CHANNELS,),
        "linear": (CHANNELS, 3),
        "bias": (3,),
    }
    return {name: 0.5 * rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def feeds(seed: int) -> dict[str, np.ndarray]:
    """Random inputs that fit ``SIGNATURE``."""
    rng = np.random.default_rng(seed)
    pose = rng.integers(0, 256, IMAGE, dtype=np.uint8)
    return {"pose": pose} | {s.name: rng.standard_normal(s.shape, dtype=np.float32) for s in SIGNATURE.inputs[1:]}


def factory(folder: Path) -> dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]]:
    """The graphs of the student in ``folder``, run by torch."""
    import torch

    module = modules(folder)["frame"]

    def frame(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(arrays[spec.name]) for spec in SIGNATURE.inputs))
        return {spec.name: value.numpy() for spec, value in zip(SIGNATURE.outputs, outputs, strict=True)}

    return {"frame": frame}


def modules(folder: Path) -> dict[str, Any]:
    """The graphs of the student in ``folder``, as torch modules."""
    import torch
    from safetensors.torch import load_file
    from torch import Tensor, nn
    from torch.nn import functional as F

    class Frame(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in load_file(folder / "model.safetensors").items():
                self.register_buffer(name, value)

        def forward(self, pose: Tensor, noise: Tensor, source_kv: Tensor) -> tuple[Tensor, Tensor]:
            x = F.conv2d(pose.float().permute(0, 3, 1, 2) / 127.5 - 1, self.conv, padding=1) + noise
            x = x.flatten(2).transpose(1, 2)
            query = F.layer_norm(x, (CHANNELS,), self.scale, self.shift)
            x = x + F.scaled_dot_product_attention(query, source_kv[:1], source_kv[1:])
            image = (x @ self.linear + self.bias).reshape(IMAGE)
            return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), x

    return {"frame": Frame()}


def wrong_outputs(folder: Path) -> dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]]:
    """A student that does not return what its graph does."""
    return {"frame": lambda arrays: {"image": arrays["pose"].astype(np.float32)}}
