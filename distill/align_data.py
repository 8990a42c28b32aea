"""What the alignment learns from: photos with targets of the same person, and the true map between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from distill.limbs import HEIGHT
from distill.resident import as_model
from distill.surface import Surface, correspond, has_surfaces, mirrored, read_surface, search_trees
from rpfm_edge.people.data import Split
from rpfm_edge.people.pose import flip

MOVED = 0.2  # of the photos are framed otherwise than the data set's, so that half a person is met, too
LAYER_ALONE = 0.1  # weight of a place that the source hides, while it shows the same layer nearby


class AlignmentBatch(NamedTuple):
    """S photos with M targets each, B = S M; maps are at half the pictures' size. Without surface maps ``weight`` is 0
    and the surfaces are -1."""

    pixels: Tensor  # (S, 3, H, W) in [-1, 1]
    joints: Tensor  # (S, 18, 2) those of the photos, in pixels, nan where missing
    surface: Tensor  # (S, 4, H/2, W/2): points in metres and the layer, -1 where it is not known
    targets: Tensor  # (B, 18, 2) joints in pixels
    pictures: Tensor  # (B, 3, H/2, W/2) in [-1, 1]
    places: Tensor  # (B, 2, H/2, W/2) frame units in the source
    weight: Tensor  # (B, 1, H/2, W/2): 1 where the source shows the place, less where it shows the layer, else 0
    seen: Tensor  # (B, 1, H/2, W/2) float: 1 where the source shows the place
    surfaces: Tensor  # (B, 4, H/2, W/2): as ``surface``, of the targets


class _Target(NamedTuple):
    joints: np.ndarray
    picture: np.ndarray
    places: np.ndarray
    weight: np.ndarray
    seen: np.ndarray
    surface: np.ndarray


def draw_alignment(
    split: Split,
    pictures: Callable[[np.ndarray], Tensor],
    drawn: tuple[np.ndarray, np.ndarray, np.ndarray],
    rng: np.random.Generator,
    moved: float = MOVED,
) -> AlignmentBatch:
    """The batch of (S,) sources, (S, M) targets and (S,) mirrorings, as ``data.draw_batch`` gives them.

    ``pictures(indices)`` are those of the split, (n, H, W, 3) uint8. A share ``moved`` of the photos is shifted and
    scaled, with everything that is known of it.
    """
    photos, targets = [], []
    for source, row, flipped in zip(*(array.tolist() for array in drawn), strict=True):
        images = pictures(np.array([source, *row])).cpu().numpy()
        photo, found = _person(split, images, source, row, flipped, _framing(images.shape[1:3], rng, moved))
        photos.append(photo)
        targets += found
    pixels, joints, surface = (torch.from_numpy(np.stack(part)) for part in zip(*photos, strict=True))
    poses, shown, places, weight, seen, surfaces = (
        torch.from_numpy(np.stack(part)) for part in zip(*targets, strict=True)
    )
    return AlignmentBatch(
        as_model(pixels),
        joints,
        surface.permute(0, 3, 1, 2),
        poses,
        as_model(shown),
        places.permute(0, 3, 1, 2) * (HEIGHT / pixels.shape[1]),
        weight[:, None],
        seen[:, None],
        surfaces.permute(0, 3, 1, 2),
    )


def _framing(size: tuple[int, int], rng: np.random.Generator, share: float) -> np.ndarray | None:
    """(2, 3): another framing of a photo, or none."""
    if rng.random() >= share:
        return None
    frame = np.array([size[1], size[0]])
    scale = np.exp(rng.uniform(np.log(0.75), np.log(1.7)))
    centre, place = rng.uniform((0.2, 0.05), (0.8, 0.95)) * frame, (0.5 + rng.normal(0, 0.12, 2)) * frame
    return np.column_stack([scale * np.eye(2), place - scale * centre]).astype(np.float32)


def _person(
    split: Split, images: np.ndarray, source: int, row: list[int], flipped: bool, framing: np.ndarray | None
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list[_Target]]:
    """A photo with its joints and its surface, and its targets."""
    height, width = images.shape[1:3]
    images = images[:, :, ::-1] if flipped else images

    def pose(index: int) -> np.ndarray:
        points = split.pose(index, (height, width))
        return flip(points, width) if flipped else points

    def surface(index: int) -> Surface:
        found = read_surface(split, index)
        return mirrored(found) if flipped else found

    photo, joints = np.ascontiguousarray(images[0]), pose(source)
    mapped = has_surfaces(split)
    there = surface(source) if mapped else None
    own = _as_array(there if framing is None else None, (height, width))
    if framing is not None:
        how = cv2.INTER_AREA if framing[0, 0] < 1 else cv2.INTER_LINEAR
        photo = cv2.warpAffine(photo, framing, (width, height), flags=how, borderMode=cv2.BORDER_REPLICATE)
        joints = joints @ framing[:, :2].T + framing[:, 2]
    trees = search_trees(there) if there is not None else {}
    targets = []
    for index, image in zip(row, images[1:], strict=True):
        shown = cv2.resize(np.ascontiguousarray(image), (width // 2, height // 2), interpolation=cv2.INTER_AREA)
        wanted = surface(index) if mapped else None
        truth = _truth(wanted, trees, framing, (height, width)) if wanted else _untold((height, width))
        targets.append(_Target(pose(index), shown, *truth, _as_array(wanted, (height, width))))
    return (photo, joints.astype(np.float32), own), targets


def _truth(
    target: Surface, trees: dict[int, tuple[object, np.ndarray]], framing: np.ndarray | None, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places in pixels of the photo, weights, and what is seen, of one target."""
    found = correspond(target, trees)
    places, seen, known = 2 * found.places + 1, found.seen, found.known  # the middle of two by two pixels
    if framing is not None:
        places = places @ framing[:, :2].T + framing[:, 2]
        inside = ((places > 0) & (places < [size[1], size[0]])).all(axis=-1)
        seen, known = seen & inside, known & inside
    weight = seen + LAYER_ALONE * (known & ~seen)
    return places.astype(np.float32), weight.astype(np.float32), seen.astype(np.float32)


def _untold(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The truth where a data set has no surface maps."""
    shape = (size[0] // 2, size[1] // 2)
    nothing = np.zeros(shape, np.float32)
    return np.zeros((*shape, 2), np.float32), nothing, nothing


def _as_array(surface: Surface | None, size: tuple[int, int]) -> np.ndarray:
    """(H/2, W/2, 4) points and layer, -1 where there are none."""
    if surface is None:
        return np.full((size[0] // 2, size[1] // 2, 4), -1, np.float32)
    return np.concatenate([surface.points, surface.layers[..., None]], axis=2, dtype=np.float32)


def draw_nobody(count: int, people: Tensor, rng: np.random.Generator) -> Tensor:
    """(count, 3, H, W) pictures without a person: plain, blotches, noise, and shuffled tiles of ``people``
    (n, 3, H, W in [-1, 1])."""
    height, width = people.shape[2:]
    made = [_nobody(people[int(rng.integers(len(people)))], (height, width), rng) for _ in range(count)]
    return torch.stack(made).to(people)


def _nobody(person: Tensor, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    kind = rng.integers(4)
    if kind == 0:
        plain = rng.uniform(-1, 1, 3) + rng.normal(0, rng.uniform(0, 0.2), (*size, 3))
    elif kind == 1:
        few = rng.uniform(-1, 1, (*rng.integers(2, 12, 2), 3)).astype(np.float32)
        plain = cv2.resize(few, size[::-1], interpolation=cv2.INTER_CUBIC)
    elif kind == 2:
        plain = rng.uniform(-1, 1, (*size, 3))
    else:
        tiles = torch.nn.functional.pixel_unshuffle(person[None], 16)[0].unflatten(0, (3, 256)).flatten(2)
        order = torch.from_numpy(rng.permutation(tiles.shape[2]))
        shuffled = tiles[..., order].unflatten(2, (size[0] // 16, size[1] // 16)).flatten(0, 1)
        return torch.nn.functional.pixel_shuffle(shuffled[None], 16)[0]
    return torch.from_numpy(np.clip(plain, -1, 1).astype(np.float32)).permute(2, 0, 1)
