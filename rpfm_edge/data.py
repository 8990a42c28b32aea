"""Data sets of people in poses: pictures, keypoints and pairs, in either of DeepFashion's layouts.

Layout A, of CFLD, DPTN and PATN: ``{train,test}_highres/`` or the tree ``fashion/`` (high resolution), with
``fasion-resize-{annotation,pairs}-{train,test}.csv`` (or "fashion-"); keypoints y first, in a 256 × 176 frame.

Layout B, of PIDM and X-MDPT: an LMDB of PNG pictures squeezed to a square and keyed by path, ``{train,test}_pairs.txt``
(target first, then its sources) and ``pose/**/*.txt``; keypoints in a 256 × 256 frame with margins of 40 pixels.

Both become the same ``Split``. Splits of both leave pictures on the disk until they are asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.artifact import json_digest
from rpfm_edge.errors import ConfigError, InputError
from rpfm_edge.image import decode_image, resize
from rpfm_edge.metrics import import_extra
from rpfm_edge.pose import FRAME, scale_pose
from rpfm_edge.progress import progress

SPLITS = ("train", "test")
ANNOTATION_HEADER, PAIRS_HEADER = "name:keypoints_y:keypoints_x", "from,to"
_MARGIN_PX = 40  # of layout B's keypoints, left and right
_GARMENT = re.compile(r"id_?(\d{8})/?(\d{2})?")  # and its colour, in DeepFashion's names, nested or flattened
NAMING = "names whose start, up to the first _, is the person's (or DeepFashion's names)"
_IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, eq=False)
class Split:
    """Pictures of people with their poses, and the pairs among them.

    Attributes:
        names: N names of pictures.
        keypoints: (N, 18, 2) float32, pixels x, y in a 256 × 176 frame, nan where missing.
        pairs: (P, 2) int64, indices of source and target.
        identities: (N,) int64, the same number for pictures of the same person (DeepFashion: the same garment id).
        read: the encoded bytes of a picture by name.
    """

    root: Path
    names: tuple[str, ...]
    keypoints: np.ndarray
    pairs: np.ndarray
    identities: np.ndarray
    read: Callable[[str], bytes] = field(repr=False)

    def image(self, index: int, size: tuple[int, int] = FRAME) -> np.ndarray:
        """Picture ``index`` as (H, W, 3) uint8 RGB, resized directly to ``size`` as DeepFashion's protocol does.

        Raises ``InputError``, naming the picture, if it is missing or unreadable.
        """
        name = self.names[index]
        return resize(decode_image(self.read(name), f"image {name} of {self.root}"), size)

    def pose(self, index: int, size: tuple[int, int] = FRAME) -> np.ndarray:
        """(18, 2) float32: the keypoints of picture ``index`` in pixels x, y of ``size``."""
        return scale_pose(self.keypoints[index], FRAME, size)

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


def sample_root() -> Path:
    """The packaged data sample, rendered people (see NOTICE): a test split of 12 and a clip of one in motion."""
    return Path(__file__).parent / "assets" / "people"


def has_split(root: str | Path, split: str) -> bool:
    """Whether the data set has ``split``, sound or not."""
    return _csv(Path(root), "annotation", split).is_file() or _pairs_file(Path(root), split).is_file()


def open_split(root: str | Path, split: str = "train") -> Split:
    """Open ``train`` or ``test`` of the data set in ``root``, whichever layout it has.

    Raises:
        ConfigError: another split.
        InputError: no such folder, neither layout, no such split, a broken line, pairs without keypoints.
    """
    root = Path(root)
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}", expected=f"one of {SPLITS}", fix="check the spelling")
    if not root.is_dir():
        raise InputError(f"there is no folder {root}", expected="the root of a data set", fix="check the path")
    if _csv(root, "annotation", split).is_file():
        return _open_csv(root, split)
    if _pairs_file(root, split).is_file():
        return _open_lmdb(root, split)
    others = [other for other in SPLITS if has_split(root, other)]
    looked_for = f"{_csv(root, 'annotation', split).name} or {_pairs_file(root, split).name}"
    if others:
        raise InputError(f"{root} has only a {others[0]} split", expected=looked_for, fix=f"use its {others[0]} split")
    raise InputError(
        f"{root} is no data set", expected=f"{looked_for} in it", fix="give the folder that holds DeepFashion's lists"
    )


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


def read_clip(folder: str | Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Names (n) and keypoints (n, 18, 2) of a clip's frames, from their ``annotation.csv`` (layout A's format)."""
    file = Path(folder) / "annotation.csv"
    if not file.is_file():
        raise InputError(f"{folder} is no clip", expected="a folder with annotation.csv", fix="check the path")
    return _read_annotation(file)


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


def _index_pairs(
    names: Sequence[str], identities: np.ndarray, pairs: Sequence[tuple[str, str]], file: Path
) -> np.ndarray:
    """(P, 2) indices of pairs of names; a name without keypoints, or a pair of two people, is an ``InputError``."""
    index = {name: position for position, name in enumerate(names)}
    absent = list(dict.fromkeys(name for pair in pairs for name in pair if name not in index))
    if absent:
        raise InputError(
            f"{file} names {len(absent)} pictures that have no keypoints, {absent[0]} first",
            expected="keypoints for every picture of a pair",
            fix="use lists that belong together",
        )
    indices = np.array([[index[source], index[target]] for source, target in pairs], np.int64).reshape(-1, 2)
    strange = np.flatnonzero(np.diff(identities[indices]))
    if strange.size:
        source, target = pairs[strange[0]]
        raise InputError(
            f"{file} pairs {source} with {target}, by their names two people",
            expected=NAMING,
            fix="rename the pictures, in the lists too, or leave the pair out",
        )
    return indices


def _broken(file: Path, line: int, expected: str) -> InputError:
    return InputError(f"line {line} of {file} is broken", expected=expected, fix="correct it, or copy the file again")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()  # spreadsheets put a mark at the start
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error})", expected="a text file", fix="copy it again") from None


# Layout A


def _csv(root: Path, kind: str, split: str) -> Path:
    """The list of this kind, in the spelling that is there."""
    spellings = [root / f"{word}-resize-{kind}-{split}.csv" for word in ("fasion", "fashion")]
    return next((file for file in spellings if file.is_file()), spellings[0])


def _open_csv(root: Path, split: str) -> Split:
    names, keypoints = _read_annotation(_csv(root, "annotation", split))
    file, identities = _csv(root, "pairs", split), identities_of(names)
    if not file.is_file():
        raise InputError(f"{root} has no {file.name}", expected="the pairs of its annotation", fix="copy it there")
    pairs = _index_pairs(names, identities, _read_pairs(file), file)
    return Split(root, names, keypoints, pairs, identities, _file_reader(root, split))


def _read_annotation(file: Path) -> tuple[tuple[str, ...], np.ndarray]:
    names: dict[str, None] = {}  # a set that keeps their order
    points = []
    for number, line in enumerate(_lines(file), start=1):
        if number == 1:
            if line.strip() != ANNOTATION_HEADER:
                raise _broken(file, 1, ANNOTATION_HEADER)
            continue
        try:
            name, y, x = line.split(":")
            point = np.array([json.loads(x), json.loads(y)], np.float32)
        except (ValueError, TypeError, RecursionError):
            point = np.empty(0, np.float32)
        if point.shape != (2, 18) or not np.isfinite(point).all():
            raise _broken(file, number, f"{ANNOTATION_HEADER}, with 18 numbers each")
        if name in names:
            raise _broken(file, number, f"{name} only once")
        names[name] = None
        points.append(point)
    keypoints = np.array(points, np.float32).reshape(-1, 2, 18).transpose(0, 2, 1)
    return tuple(names), np.where((keypoints == -1).any(axis=2, keepdims=True), np.float32(np.nan), keypoints)


def _read_pairs(file: Path) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(_lines(file), start=1):
        source, comma, target = line.strip().partition(",")
        if not (source and comma and target) or (number == 1 and line.strip() != PAIRS_HEADER):
            raise _broken(file, number, PAIRS_HEADER)
        if number > 1:
            pairs.append((source, target))
    return pairs


def _file_reader(root: Path, split: str) -> Callable[[str], bytes]:
    """Pictures from ``{split}_highres/``, or from DeepFashion's tree, whose flattened paths are the names."""
    folder, tree = root / f"{split}_highres", root / "fashion"
    if folder.is_dir():
        return partial(_read_file, folder)
    if tree.is_dir():
        paths = (path.relative_to(root) for path in tree.rglob("*") if path.suffix.lower() in _IMAGES)
        return partial(_read_nested, root, {_flatten(path): path for path in paths})
    raise InputError(
        f"{root} has no pictures", expected=f"the folder {folder.name} or {tree.name}", fix="unpack the pictures there"
    )


def _flatten(path: Path) -> str:
    """``fashion/WOMEN/Dresses/id_00007132/04_4_full.jpg`` → ``fashionWOMENDressesid0000713204_4full.jpg``."""
    *folders, name = path.parts
    first, _, rest = name.partition("_")
    return "".join(folders).replace("_", "") + f"{first}_{rest.replace('_', '')}"


def _read_nested(root: Path, paths: dict[str, Path], name: str) -> bytes:
    return _read_file(root, str(paths.get(name, name)))


def _read_file(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise _missing_image(name, f"{folder} ({error.strerror})") from None


def _missing_image(name: str, place: str) -> InputError:
    return InputError(
        f"image {name} cannot be read from {place}", expected="every picture of the lists", fix="copy it there"
    )


# Layout B


def _pairs_file(root: Path, split: str) -> Path:
    return root / f"{split}_pairs.txt"


def _open_lmdb(root: Path, split: str) -> Split:
    file = _pairs_file(root, split)
    pairs = []
    for number, line in enumerate(_lines(file), start=1):
        target, *sources = (_key(entry.strip()) for entry in line.split(","))
        if not target or not sources or not all(sources):
            raise _broken(file, number, "a target, then its sources, separated by commas")
        pairs += [(source, target) for source in sources]
    names, keypoints = _read_poses(root, list(dict.fromkeys(name for pair in pairs for name in pair)))
    identities = identities_of(names)
    folders = (root, root / "256-256", *sorted(root.iterdir()))
    folder = next((folder for folder in folders if (folder / "data.mdb").is_file()), None)
    if folder is None:
        raise InputError(
            f"{root} has no pictures", expected="a folder with data.mdb, an LMDB", fix="make it with PIDM's script"
        )
    _environment(folder)  # before threads ask for it
    indices = _index_pairs(names, identities, pairs, file)
    return Split(root, names, keypoints, indices, identities, partial(_read_lmdb, folder))


def _key(name: str) -> str:
    """The LMDB's key of a listed picture: the list says .jpg, the LMDB holds PNG."""
    return name.removesuffix(".jpg") + ".png" if name.endswith(".jpg") else name


def _read_poses(root: Path, names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Those of ``names`` that have a pose file, and their keypoints (n, 18, 2) in the 256 × 176 frame."""
    found, keypoints = [], []
    with progress("reading poses", len(names)) as advance:
        for done, name in enumerate(names):
            file = (root / "pose" / name.removeprefix("img/")).with_suffix(".txt")
            if file.is_file():
                found.append(name)
                keypoints.append(_read_pose_text(file))
            advance(done + 1, "")
    return tuple(found), np.array(keypoints, np.float32).reshape(-1, 18, 2)


def _read_pose_text(file: Path) -> np.ndarray:
    """(18, 2) of 18 rows "x y": the margins, which the pictures do not have, are taken off."""
    rows = [line.split() for line in _lines(file) if line.strip()]
    for number, row in enumerate(rows, start=1):
        try:
            sound = len(row) == 2 and np.isfinite([float(value) for value in row]).all() and number <= 18
        except ValueError:
            sound = False
        if not sound:
            raise _broken(file, number, "18 rows of x and y")
    if len(rows) < 18:
        raise _broken(file, len(rows) + 1, "18 rows of x and y")
    points = np.array(rows, np.float32)
    return np.where((points == -1).any(axis=1, keepdims=True), np.nan, points - (_MARGIN_PX, 0)).astype(np.float32)


@cache
def _environment(folder: Path) -> Any:
    """The LMDB in ``folder``, opened once: the library allows no more within a process."""
    lmdb = import_extra("lmdb", "lmdb")
    try:
        return lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise InputError(
            f"{folder} is no LMDB ({error})", expected="one that lmdb opens", fix="make or copy it again"
        ) from None


def _read_lmdb(folder: Path, name: str) -> bytes:
    with _environment(folder).begin() as transaction:
        data = transaction.get(name.encode())
    if data is None:
        raise _missing_image(name, str(folder))
    return bytes(data)
