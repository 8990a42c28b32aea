"""The packaged data sample, and the whole data set that it was cut from."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from rpfm_edge.core.errors import InputError
from rpfm_edge.people.data import sample_root
from rpfm_edge.people.deepfashion import has_split, open_split, read_clip

PEOPLE = next(
    (p / "shared" / "people" for p in Path(__file__).parents[2:4] if (p / "shared" / "people").is_dir()), None
)


def test_sample() -> None:
    split = open_split(sample_root(), "test")
    assert len(split.names) == 96
    assert len(np.unique(split.identities)) == 12
    assert split.keypoints.shape == (96, 18, 2)
    assert split.keypoints.dtype == np.float32
    assert (split.identities[split.pairs[:, 0]] == split.identities[split.pairs[:, 1]]).all()
    assert (split.pairs[:, 0] != split.pairs[:, 1]).all()
    assert split.images().shape == (96, 256, 176, 3)
    total = sum(path.stat().st_size for path in sample_root().rglob("*") if path.is_file())
    assert total < 3_000_000


def test_sample_has_no_train_split() -> None:
    assert has_split(sample_root(), "test")
    assert not has_split(sample_root(), "train")
    with pytest.raises(
        InputError, match=r"people has only a test split: expected fasion-resize-annotation-train\.csv or"
    ):
        open_split(sample_root(), "train")


def test_keypoints_of_the_sample_lie_on_the_person() -> None:
    split = open_split(sample_root(), "test")
    for index, image in enumerate(split.images()):
        background = np.median(image[:4].reshape(-1, 3), axis=0)
        person = np.abs(image - background).max(axis=2) > 12
        person = cv2.dilate(person.astype(np.uint8), np.ones((9, 9), np.uint8))
        x, y = split.keypoints[index].round().astype(int).T
        assert person[y, x].mean() >= 17 / 18, split.names[index]


def test_clip_of_the_sample() -> None:
    (folder,) = (sample_root() / "clips").iterdir()
    names, keypoints = read_clip(folder)
    assert names == tuple(f"{i:03d}.jpg" for i in range(60))
    assert all((folder / name).is_file() for name in names)
    assert keypoints.shape == (60, 18, 2)
    step = np.linalg.norm(np.diff(keypoints, axis=0), axis=2)
    assert 0 < np.nanmedian(step) < 5  # motion, not a slide show
    assert any(name.startswith(folder.name) for name in open_split(sample_root(), "test").names)


@pytest.mark.skipif(PEOPLE is None, reason="the whole data set shared/people is not here")
@pytest.mark.parametrize(("split", "identities"), [("train", 900), ("test", 100)])
def test_people(split: str, identities: int) -> None:
    assert PEOPLE is not None
    opened = open_split(PEOPLE, split)
    assert len(opened.names) == 8 * identities
    assert len(np.unique(opened.identities)) == identities
    with (PEOPLE / f"fasion-resize-pairs-{split}.csv").open() as stream:
        rows = [(row["from"], row["to"]) for row in csv.DictReader(stream)]
    assert [(opened.names[s], opened.names[t]) for s, t in opened.pairs.tolist()] == rows
    with (PEOPLE / f"fasion-resize-annotation-{split}.csv").open() as stream:
        row = list(csv.DictReader(stream, delimiter=":"))[77]
    assert opened.names[77] == row["name"]
    x, y = (np.array(json.loads(row[f"keypoints_{axis}"]), np.float32) for axis in "xy")
    np.testing.assert_array_equal(opened.keypoints[77], np.stack([x, y], axis=1))


@pytest.mark.skipif(PEOPLE is None, reason="the whole data set shared/people is not here")
def test_sample_is_cut_from_people_without_change() -> None:
    assert PEOPLE is not None
    for path in sample_root().rglob("*.jpg"):
        assert path.read_bytes() == (PEOPLE / path.relative_to(sample_root())).read_bytes()
