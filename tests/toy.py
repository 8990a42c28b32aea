"""A toy teacher and inputs that fit the tiny student of ``conftest.py``: 64 × 48 pictures of the sample."""

from __future__ import annotations

from pathlib import Path

import cv2

from distill.teacher import save_teacher
from rpfm_edge.people.data import sample_root
from rpfm_edge.people.deepfashion import open_split
from rpfm_edge.people.formats import write_pose
from tests.distill.tiny import SIZE, toy_teacher


def make_teacher(out: Path) -> Path:
    """An untrained teacher whose autoencoder holds the principal components of the sample."""
    return save_teacher(toy_teacher(), out, (), losses=[(1, 0.5), (2, 0.4)]).path


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """A picture of a person (PNG) and another pose of the same person (JSON), from the sample."""
    test = open_split(sample_root(), "test")
    source, pose = folder / "person.png", folder / "pose.json"
    cv2.imwrite(str(source), test.image(0, SIZE)[..., ::-1])
    write_pose(pose, test.pose(1, SIZE), SIZE)
    return source, pose
