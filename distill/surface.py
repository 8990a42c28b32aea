"""Surface maps: which point of the body each pixel shows, where a data set knows it, and what follows between pictures.

``ROOT/surface/NAME.png`` of a person holds her pictures ``NAME_0``, ``NAME_1``, … side by side at half their size,
(H / 2, n W / 2, 4) uint8: x, y, z of the point in the body at rest, between ``LOW`` and ``HIGH`` in metres, and the
layer. Two pixels correspond if their layers are equal and their points are near. It is supervision only: what runs has
keypoints and a photo.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from rpfm_edge.core.errors import InputError
from rpfm_edge.people.data import Split

LOW, HIGH = np.array((-1.0, -0.35, -0.05), np.float32), np.array((1.0, 0.35, 1.95), np.float32)
LAYERS = ("background", "skin", "eyes", "top", "trousers", "skirt", "shoes", "hair")
NEAR_M = 0.03  # two points of the body that are one place
_SPREAD_PX = 6  # of the nearest four pixels: further apart they are on two limbs, and no mean is taken


class Surface(NamedTuple):
    """One picture's map, h × w at half its size."""

    points: np.ndarray  # (h, w, 3) float32 metres
    layers: np.ndarray  # (h, w) uint8, indices of LAYERS


class Correspondence(NamedTuple):
    """Where each pixel (of a map) of the target is in the source."""

    places: np.ndarray  # (h, w, 2) float32, x and y in pixels of the source's map
    seen: np.ndarray  # (h, w) bool: the source shows it
    known: np.ndarray  # (h, w) bool: the source shows at least the layer, and the place is its nearest point


Trees = dict[int, tuple[Any, np.ndarray]]  # layer → tree of its points, and their pixels (n, 2)


def has_surfaces(split: Split) -> bool:
    """Whether the data set has surface maps."""
    return (split.root / "surface").is_dir()


def read_surface(split: Split, index: int) -> Surface:
    """The map of picture ``index``; raises ``InputError`` if it is missing or broken."""
    name, _, number = Path(split.names[index]).stem.rpartition("_")
    strip = _read_strip(split.root / "surface" / f"{name}.png")
    width = strip.shape[1] // _tiles(split)[name]
    tile = strip[:, width * int(number) : width * (int(number) + 1)]
    return Surface(tile[..., :3].astype(np.float32) / 255 * (HIGH - LOW) + LOW, tile[..., 3])


@lru_cache(maxsize=4)
def _tiles(split: Split) -> Counter[str]:
    """How many pictures of each person there are, and so tiles in her strip."""
    return Counter(Path(name).stem.rpartition("_")[0] for name in split.names)


@lru_cache(maxsize=1024)
def _read_strip(file: Path) -> np.ndarray:
    picture = cv2.imread(str(file), cv2.IMREAD_UNCHANGED) if file.is_file() else None
    if picture is None or picture.ndim != 3 or picture.shape[2] != 4:
        raise InputError(
            f"{file} is no strip of surface maps",
            expected="an RGBA picture with a tile for each pose",
            fix="render it again, or remove the folder to train without maps",
        )
    strip: np.ndarray = picture[:, :, [2, 1, 0, 3]]
    return strip


def mirrored(surface: Surface) -> Surface:
    """The map of the mirrored picture."""
    return Surface(surface.points[:, ::-1] * np.array((-1, 1, 1), np.float32), surface.layers[:, ::-1])


def search_trees(source: Surface) -> Trees:
    """What ``correspond`` looks places up in, for the layers that the source shows."""
    from scipy.spatial import cKDTree

    trees = {}
    for layer in range(1, len(LAYERS)):
        y, x = np.nonzero(source.layers == layer)
        if len(x) >= 5:
            trees[layer] = (cKDTree(source.points[y, x]), np.stack([x, y], axis=-1).astype(np.float32))
    return trees


def correspond(target: Surface, source: Trees) -> Correspondence:
    """The true map between two pictures of a person, by the nearest points of the same layer."""
    shape = target.layers.shape
    places, seen, known = np.zeros((*shape, 2), np.float32), np.zeros(shape, bool), np.zeros(shape, bool)
    for layer, (tree, pixels) in source.items():
        wanted = target.layers == layer
        if not wanted.any():
            continue
        distance, nearest = tree.query(target.points[wanted], k=4)
        weight = 1 / (distance + 2e-3) ** 2
        weight /= weight.sum(1, keepdims=True)
        around = pixels[nearest]
        apart = np.abs(around - around[:, :1]).max(1).sum(1) > _SPREAD_PX
        places[wanted] = np.where(apart[:, None], around[:, 0], (around * weight[..., None]).sum(1))
        seen[wanted], known[wanted] = distance[:, 0] < NEAR_M, True
    return Correspondence(places, seen, known)
