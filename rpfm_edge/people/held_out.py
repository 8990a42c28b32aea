"""What quality is judged on: pairs of pictures and clips of people that nothing was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.people.data import Split
from rpfm_edge.people.deepfashion import read_clip
from rpfm_edge.people.image import load_image, resize
from rpfm_edge.people.pose import FRAME, scale_pose


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """``count`` clips (0: none) of at most ``frames`` frames each.

    ``teacher``: render them with the teacher's reference solver too, at 32 network evaluations a frame."""

    count: int = 2
    frames: int = 30
    teacher: bool = False


@dataclass(frozen=True, slots=True)
class Clip:
    """A held-out person in motion: a source (H, W, 3) and the true video (n, H, W, 3), both uint8, their poses (18, 2)
    and (n, 18, 2) float32 pixels, nan where missing, and one noise (1, C, h, w) float32 for all frames."""

    name: str
    source: np.ndarray
    source_pose: np.ndarray
    poses: np.ndarray
    truth: np.ndarray
    noise: np.ndarray


def open_clips(
    split: Split, config: ClipConfig, size: tuple[int, int], latent_shape: Sequence[int], seed: int = 0
) -> list[Clip]:
    """The first clips of ``ROOT/clips`` whose person is in ``split``, in the order of their names.

    A clip belongs to the person whose pictures' names begin with its own (clip ``p7`` to ``p7_0.jpg``). The first of
    these pictures is the source. So no clip is taken of a person that something was trained on.

    Raises:
        ConfigError: less than two frames.
        InputError: a clip with less than two frames, or with a missing picture.
    """
    if config.frames < 2:
        raise ConfigError(f"clips of {config.frames} frames", expected="at least 2", fix="ask for more, such as 30")
    rng = np.random.default_rng(seed)
    sources = {folder: source for folder in _folders(split.root) if (source := _source(split, folder.name)) is not None}
    return [
        _open(
            folder,
            config.frames,
            split.image(source, size),
            split.pose(source, size),
            rng.standard_normal((1, *latent_shape), np.float32),
        )
        for folder, source in list(sources.items())[: config.count]
    ]


def missing_clips(split: Split, config: ClipConfig) -> str | None:
    """Why there is no clip to measure flicker on, in words; None if there is."""
    folders = _folders(split.root)
    if not folders:
        return f"{split.root} has no clips"
    if config.count < 1:
        return "no clips were asked for"
    if all(_source(split, folder.name) is None for folder in folders):
        return f"{split.root / 'clips'} shows none of the held-out people"
    return None


def _folders(root: Path) -> list[Path]:
    return sorted(file.parent for file in (root / "clips").glob("*/annotation.csv"))


def _source(split: Split, person: str) -> int | None:
    names = sorted(name for name in split.names if name.startswith(f"{person}_"))
    return split.names.index(names[0]) if names else None


def _open(folder: Path, frames: int, source: np.ndarray, source_pose: np.ndarray, noise: np.ndarray) -> Clip:
    names, keypoints = read_clip(folder)
    if len(names) < 2:
        raise InputError(f"{folder} has {len(names)} frames", expected="at least 2", fix="copy the clip again")
    size = (source.shape[0], source.shape[1])
    return Clip(
        name=folder.name,
        source=source,
        source_pose=source_pose,
        poses=np.stack([scale_pose(pose, FRAME, size) for pose in keypoints[:frames]]),
        truth=np.stack([resize(load_image(folder / name), size) for name in names[:frames]]),
        noise=noise,
    )


CLIPS = ClipConfig()


@dataclass(frozen=True, slots=True)
class Pairs:
    """Held-out pairs with a noise for each: n sources and ground truths (n, H, W, 3) uint8, and the keypoints of both,
    (n, 18, 2) float32 pixels, nan where missing.

    Bundles get the photo alone, as from a user; ``source_poses`` are for the networks in torch.
    """

    names: list[tuple[str, str]]
    sources: np.ndarray
    source_poses: np.ndarray
    poses: np.ndarray
    truths: np.ndarray
    noise: np.ndarray  # (n, C, h, w) float32

    @property
    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Sources, their poses, the poses asked for and noise: what ``distill.reference`` makes pictures of."""
        return self.sources, self.source_poses, self.poses, self.noise

    @property
    def digest(self) -> str:
        """sha256 over names, pictures, poses and noise: what is rendered from these pairs depends on nothing else."""
        sha = hashlib.sha256(repr(self.names).encode())
        for array in (self.sources, self.source_poses, self.poses, self.truths, self.noise):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()


def draw_pairs(split: Split, count: int, size: tuple[int, int], latent_shape: Iterable[int], seed: int = 0) -> Pairs:
    """``count`` pairs of a split drawn without replacement, and noise from the same seed.

    Pairs without a visible joint in the target are left out.
    """
    if count < 1:
        raise ConfigError(f"{count} pairs", expected="at least 1", fix="ask for more, such as 32")
    rng = np.random.default_rng(seed)
    chosen = shuffled_pairs(split, count, rng)
    return read_pairs(split, chosen, rng.standard_normal((len(chosen), *latent_shape), dtype=np.float32), size)


def shuffled_pairs(split: Split, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Source and target of ``count`` pairs, drawn without replacement from those with a visible joint in the target."""
    visible = [(int(s), int(t)) for s, t in split.pairs if np.isfinite(split.keypoints[t]).any()]
    if not visible:
        raise InputError(f"{split.root} has no pairs", expected="pairs to validate on", fix="check its pairs file")
    return [visible[i] for i in rng.permutation(len(visible))[:count]]


def read_pairs(split: Split, indices: Sequence[tuple[int, int]], noise: np.ndarray, size: tuple[int, int]) -> Pairs:
    """The pictures of pairs (source, target), with a noise (n, C, h, w) for each."""
    return Pairs(
        names=[(split.names[s], split.names[t]) for s, t in indices],
        sources=np.stack([split.image(s, size) for s, _ in indices]),
        source_poses=np.stack([split.pose(s, size) for s, _ in indices]),
        poses=np.stack([split.pose(t, size) for _, t in indices]),
        truths=np.stack([split.image(t, size) for _, t in indices]),
        noise=noise,
    )
