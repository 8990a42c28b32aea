"""DeepFashion's layouts, read from folders or LMDB."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.core.progress import progress
from rpfm_edge.people.data import NAMING, Split, identities_of

SPLITS = ("train", "test")
ANNOTATION_HEADER, PAIRS_HEADER = "name:keypoints_y:keypoints_x", "from,to"
_MARGIN_PX = 40  # of layout B's keypoints, left and right
_IMAGES = (".jpg", ".jpeg", ".png")


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


def read_clip(folder: str | Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Names (n) and keypoints (n, 18, 2) of a clip's frames, from their ``annotation.csv`` (layout A's format)."""
    file = Path(folder) / "annotation.csv"
    if not file.is_file():
        raise InputError(f"{folder} is no clip", expected="a folder with annotation.csv", fix="check the path")
    return _read_annotation(file)


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
