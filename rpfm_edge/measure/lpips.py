"""LPIPS (arXiv 1801.03924) with AlexNet, in NumPy, from weights that the user has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from rpfm_edge.core.errors import ArtifactError, ConfigError, InputError
from rpfm_edge.people.image import check_pair

LPIPS_VARIABLE = "RPFM_EDGE_LPIPS"


# LPIPS (Zhang et al. 2018), version 0.1 on AlexNet, in numpy: a device needs no torch, and no weights are downloaded.
# (stride, padding) per convolution; a 3 x 3 max pool of stride 2 stands before the second and the third.
_ALEXNET = (("slice1.0", 4, 2), ("slice2.3", 1, 2), ("slice3.6", 1, 1), ("slice4.8", 1, 1), ("slice5.10", 1, 1))
_LPIPS_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_LPIPS_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
_LPIPS_NAMES = tuple(
    [f"net.{conv}.{part}" for conv, _, _ in _ALEXNET for part in ("weight", "bias")]
    + [f"lin{k}.model.1.weight" for k in range(len(_ALEXNET))]
)


def lpips_weights() -> Path | None:
    """The file that the variable RPFM_EDGE_LPIPS names, None if it is not set; ``ConfigError`` if it is no file.

    It is the state dict of ``lpips.LPIPS(net="alex")`` as safetensors. Where torchvision and lpips are installed:
    ``safetensors.torch.save_file({k: v.clone() for k, v in lpips.LPIPS(net="alex").state_dict().items()}, path)``
    """
    name = os.environ.get(LPIPS_VARIABLE)
    if not name:
        return None
    if not Path(name).is_file():
        raise ConfigError(
            f"{LPIPS_VARIABLE} names {name}, which is no file",
            expected="a safetensors file with the weights of lpips.LPIPS(net='alex')",
            fix="correct or unset the variable",
        )
    return Path(name)


def lpips_distance(a: np.ndarray, b: np.ndarray, weights: Path) -> float:
    """LPIPS 0.1 with AlexNet (``weights``: see ``lpips_weights``), 0 for equal images; at least 32 x 32 pixels."""
    check_pair(a, b)
    if min(a.shape[:2]) < 32:
        raise InputError(
            f"the images are {a.shape[0]} x {a.shape[1]} pixels", expected="at least 32 x 32", fix="enlarge them"
        )
    parameters = _load_lpips(weights, weights.stat().st_mtime_ns)
    total = 0.0
    for layer, (x, y) in enumerate(zip(_alexnet(a, parameters), _alexnet(b, parameters), strict=True)):
        x, y = (f / (np.sqrt(np.sum(f**2, axis=0, keepdims=True)) + 1e-10) for f in (x, y))
        linear = parameters[f"lin{layer}.model.1.weight"].reshape(-1)
        total += float(np.mean(np.tensordot(linear, (x - y) ** 2, 1)))
    return total


@lru_cache(maxsize=2)
def _load_lpips(path: Path, _modified: int) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found: dict[str, np.ndarray] = load_file(path)
    except SafetensorError as error:
        raise ArtifactError(
            f"{path} cannot be read ({error})", expected="a safetensors file", fix="export it again"
        ) from None
    if missing := [name for name in _LPIPS_NAMES if name not in found]:
        raise ArtifactError(
            f"{path} has no {missing[0]}", expected="the state dict of lpips.LPIPS(net='alex')", fix="export it again"
        )
    return {name: found[name].astype(np.float32) for name in _LPIPS_NAMES}


def _alexnet(image: np.ndarray, parameters: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The five feature maps (C, h, w) after each ReLU of an image, scaled as LPIPS does."""
    scaled = (image.astype(np.float32) / 127.5 - 1 - _LPIPS_SHIFT) / _LPIPS_SCALE
    x, features = scaled.transpose(2, 0, 1), []
    for index, (name, stride, padding) in enumerate(_ALEXNET):
        if index in (1, 2):
            x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((3, 4))
        kernel, bias = parameters[f"net.{name}.weight"], parameters[f"net.{name}.bias"]
        padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[2:], (1, 2))[:, ::stride, ::stride]
        x = np.maximum(np.tensordot(kernel, windows, ((1, 2, 3), (0, 3, 4))) + bias[:, None, None], 0)
        features.append(x)
    return features


def lpips_from_environment(a: np.ndarray, b: np.ndarray) -> float:
    weights = lpips_weights()
    if weights is None:
        raise ConfigError(
            "LPIPS has no weights",
            expected=f"{LPIPS_VARIABLE} to name a safetensors file",
            fix="set it or leave LPIPS out",
        )
    return lpips_distance(a, b, weights)
