"""Data sets of people in poses: pictures, keypoints and pairs, in either of DeepFashion's layouts.

Layout A, of CFLD, DPTN and PATN: ``{train,test}_highres/`` or the tree ``fashion/`` (high resolution), with
``fasion-resize-{annotation,pairs}-{train,test}.csv`` (or "fashion-"); keypoints y first, in a 256 × 176 frame.

Layout B, of PIDM and X-MDPT: an LMDB of PNG pictures squeezed to a square and keyed by path, ``{train,test}_pairs.txt``
(target first, then its sources) and ``pose/**/*.txt``; keypoints in a 256 × 256 frame with margins of 40 pixels.

Both become the same ``Split``. Splits of both leave pictures on the disk until they are asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.core.files import json_digest
from rpfm_edge.core.progress import progress
from rpfm_edge.people.image import Fit, decode_image, fitted
from rpfm_edge.people.pose import FRAME, fit_pose, scale_pose

_GARMENT = re.compile(r"id_?(\d{8})/?(\d{2})?")  # and its colour, in DeepFashion's names, nested or flattened
NAMING = "names whose start, up to the first _, is the person's (or DeepFashion's names)"


@dataclass(frozen=True, eq=False)
class Split:
    """Pictures of people with their poses, and the pairs among them.

    Attributes:
        names: N names of pictures.
        keypoints: (N, 18, 2) float32, pixels x, y in a 256 × 176 frame, nan where missing.
        pairs: (P, 2) int64, indices of source and target.
        identities: (N,) int64, the same number for pictures of the same person (DeepFashion: the same garment id).
        read: the encoded bytes of a picture by name.
        fit: how pictures and poses meet a size: stretched, as DeepFashion's protocol has it, or with margins.
    """

    root: Path
    names: tuple[str, ...]
    keypoints: np.ndarray
    pairs: np.ndarray
    identities: np.ndarray
    read: Callable[[str], bytes] = field(repr=False)
    fit: Fit = "squeeze"

    def image(self, index: int, size: tuple[int, int] = FRAME) -> np.ndarray:
        """Picture ``index`` as (H, W, 3) uint8 RGB at ``size``.

        Raises ``InputError``, naming the picture, if it is missing or unreadable.
        """
        return fitted(self._decoded(index), size, self.fit)

    def pose(self, index: int, size: tuple[int, int] = FRAME) -> np.ndarray:
        """(18, 2) float32: the keypoints of picture ``index`` in pixels x, y of ``size``."""
        if self.fit == "squeeze":
            return scale_pose(self.keypoints[index], FRAME, size)
        height, width = self._decoded(index).shape[:2]
        return fit_pose(scale_pose(self.keypoints[index], FRAME, (height, width)), (height, width), size)

    def _decoded(self, index: int) -> np.ndarray:
        name = self.names[index]
        return decode_image(self.read(name), f"image {name} of {self.root}")

    def images(self, indices: Iterable[int] | None = None, size: tuple[int, int] = FRAME) -> np.ndarray:
        """Pictures (all of them by default) as (n, H, W, 3) uint8 RGB."""
        chosen = list(range(len(self.names)) if indices is None else indices)
        stack = np.empty((len(chosen), *size, 3), np.uint8)
        with (
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            progress("reading images", len(chosen)) as advance,
        ):
            for done, image in enumerate(pool.map(lambda index: self.image(index, size), chosen)):
                stack[done] = image
                advance(done + 1, "")
        return stack

    @property
    def digest(self) -> str:
        """sha256 of the lists: names, pairs and keypoints, wherever they lie. Pictures are not read for it."""
        poses = hashlib.sha256(np.ascontiguousarray(self.keypoints).tobytes()).hexdigest()
        return json_digest({"names": self.names, "pairs": self.pairs.tolist(), "keypoints": poses})

    @cached_property
    def targets(self) -> dict[int, np.ndarray]:
        """Source → its targets, for every picture that is the source of a pair."""
        ordered = self.pairs[np.argsort(self.pairs[:, 0], kind="stable")]
        sources, starts = np.unique(ordered[:, 0], return_index=True)
        return dict(zip(sources.tolist(), np.split(ordered[:, 1], starts[1:]), strict=False))


def as_seen(split: Split, fit: Fit | None) -> Split:
    """The split with its pictures as a student saw them, whose manifest says how they met the size, if it matters."""
    return replace(split, fit=fit) if fit else split


def sample_root() -> Path:
    """The packaged data sample, rendered people (see NOTICE): a test split of 12 and a clip of one in motion."""
    return Path(__file__).parent.parent / "assets" / "people"


def hold_out(split: Split, amount: float, seed: int) -> tuple[Split, Split]:
    """Cut a split by identities, drawn by ``seed``, into the rest and what is held out.

    Args:
        amount: how many identities are held out (int), or which share of them (float).
    """
    identities = np.unique(split.identities)
    if len(identities) < 2:
        raise InputError(
            f"{split.root} has too few identities to hold some out: {len(identities)}",
            expected=f"2 or more, and {NAMING}",
            fix="add people, or rename their pictures in the lists, too",
        )
    count = round(amount * len(identities)) if isinstance(amount, float) else amount
    if not 0 < count < len(identities):
        raise ConfigError(
            f"cannot hold out {amount} of {len(identities)} identities",
            expected=f"1 to {len(identities) - 1}, or the share as a fraction",
            fix="change how much is held out",
        )
    held = np.random.default_rng(seed).permutation(identities)[:count]
    mask = np.isin(split.identities, held)
    return _subset(split, ~mask), _subset(split, mask)


def draw_batch(
    split: Split, sources: int, targets_per_source: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw sources that have pairs, uniformly, and targets from each one's pairs; none repeats while others are left.

    Returns:
        (S,) int64 sources, (S, M) int64 targets, (S,) bool: whether to mirror source and targets (half of the time).
    """
    if not split.targets:
        raise InputError(f"{split.root} has no pairs", expected="pairs to train on", fix="check its pairs file")
    drawn = _cycle(np.array(list(split.targets)), sources, rng)
    targets = np.stack([_cycle(split.targets[int(source)], targets_per_source, rng) for source in drawn])
    return drawn, targets, rng.random(sources) < 0.5


def _subset(split: Split, mask: np.ndarray) -> Split:
    """The pictures where ``mask`` is true, and the pairs among them; identities keep their numbers."""
    position = np.cumsum(mask) - 1
    return replace(
        split,
        names=tuple(name for name, kept in zip(split.names, mask.tolist(), strict=True) if kept),
        keypoints=split.keypoints[mask],
        pairs=position[split.pairs[mask[split.pairs].all(axis=1)]],
        identities=split.identities[mask],
    )


def _cycle(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` of ``values`` in random order; a value repeats only when all have been drawn equally often."""
    rounds = -(-count // len(values))
    return np.concatenate([rng.permutation(values) for _ in range(rounds)])[:count]


def identities_of(names: Sequence[str]) -> np.ndarray:
    """A number for each name: DeepFashion's garment id, otherwise what stands before the first "_"."""
    keys = [found[1] if (found := _GARMENT.search(name)) else name.partition("_")[0] for name in names]
    return np.unique(np.array(keys, str), return_inverse=True)[1].astype(np.int64)


def shared_person(some: Sequence[str], others: Sequence[str]) -> str | None:
    """The first of ``some`` whose person is in a picture of ``others``, too.

    DeepFashion's lists are cut by garment and colour, so there a garment may be in both, in other colours.
    """
    there = {_person(name) for name in others}
    return next((name for name in some if _person(name) in there), None)


def _person(name: str) -> str:
    found = _GARMENT.search(name)
    return found[0].replace("_", "").replace("/", "") if found else name.partition("_")[0]
