"""Recorded motions. ``.pose`` files are written by the library pose-format itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpfm_edge.core.errors import InputError
from rpfm_edge.live.motion import read_motion
from rpfm_edge.people.formats import NobodyError, from_coco, from_mediapipe, from_openpose, write_pose
from rpfm_edge.people.pose import fit_pose

SIZE = (64, 48)
FRAME = (200, 100)  # of the .pose files


def test_a_folder_of_poses_is_read_in_order_of_names(tmp_path: Path, poses: np.ndarray) -> None:
    for name, pose in zip(("b", "a", "c"), poses, strict=False):
        write_pose(tmp_path / f"{name}.json", pose, SIZE)
    np.testing.assert_array_equal(read_motion(tmp_path, SIZE)[0], poses[[1, 0, 2]])
    np.testing.assert_array_equal(read_motion(tmp_path / "c.json", SIZE)[0], poses[2:3])


def test_a_frame_without_a_person_is_left_out_of_a_folder(tmp_path: Path, poses: np.ndarray) -> None:
    write_pose(tmp_path / "0.json", poses[0], SIZE)
    (tmp_path / "1.json").write_text('{"people": []}')
    write_pose(tmp_path / "2.json", poses[1], SIZE)
    np.testing.assert_array_equal(read_motion(tmp_path, SIZE)[0], poses[:2])
    with pytest.raises(NobodyError):
        read_motion(tmp_path / "1.json", SIZE)
    (tmp_path / "3.json").write_text("{")
    with pytest.raises(InputError, match=r"3\.json is no JSON"):
        read_motion(tmp_path, SIZE)


def test_a_clip_is_fitted_and_frames_without_a_person_are_left_out(tmp_path: Path) -> None:
    ys, xs = list(range(10, 28)), list(range(50, 68))
    rows = ["name:keypoints_y:keypoints_x", f"000.jpg:{ys}:{xs}", f"001.jpg:{[-1] * 18}:{[-1] * 18}"]
    (tmp_path / "annotation.csv").write_text("\n".join(rows))
    found, fps = read_motion(tmp_path, SIZE)
    assert fps == 30
    expected = fit_pose(np.stack([xs, ys], 1).astype(np.float32), (256, 176), SIZE)
    np.testing.assert_allclose(found, expected[None], atol=1e-4)


def test_a_motion_without_a_pose_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no pose"):
        read_motion(tmp_path, SIZE)
    with pytest.raises(InputError, match="cannot be read"):
        read_motion(tmp_path / "none.json", SIZE)


def write(
    path: Path, name: str, count: int, triples: np.ndarray, points_before: int = 0, depth: bool = False, fps: float = 25
) -> None:
    """A .pose file of (n, count, 3) x, y, confidence, perhaps after points of something else."""
    pose_format = pytest.importorskip("pose_format", reason="needs pose-format: pip install 'rpfm-edge[motion]'")
    header = pose_format.pose_header
    layout = "XYZC" if depth else "XYC"
    parts = [header.PoseHeaderComponent("OTHER", [str(k) for k in range(points_before)], [], [], layout)]
    parts = parts if points_before else []
    parts += [header.PoseHeaderComponent(name, [str(k) for k in range(count)], [], [], layout)]
    size = header.PoseHeaderDimensions(FRAME[1], FRAME[0], 0)
    lead = np.full((len(triples), points_before, 3), 7.0)
    rows = np.concatenate([lead, triples], axis=1).astype(np.float32)
    data = np.insert(rows[..., :2], 2, 3.0, axis=2) if depth else rows[..., :2]
    body: Any = pose_format.numpy.NumPyPoseBody(fps, data[:, None], rows[..., 2][:, None])
    with path.open("wb") as file:
        pose_format.Pose(header.PoseHeader(0.2, size, parts), body).write(file)


def triples_of(count: int) -> np.ndarray:
    """(4, count, 3): random points of FRAME with scores above a half; point 12 is not seen in frame 1."""
    rng = np.random.default_rng(count)
    triples = np.concatenate([rng.random((4, count, 2)) * FRAME[::-1], rng.uniform(0.6, 1, (4, count, 1))], axis=2)
    triples[1, 12, 2] = 0
    return triples


@pytest.mark.parametrize(
    ("name", "points", "before", "depth", "convert"),
    [
        ("pose_keypoints_2d", 25, 0, False, from_openpose),
        ("BODY_135", 135, 0, False, lambda rows: from_coco(rows[:17])),
        ("BODY", 23, 5, False, lambda rows: from_coco(rows[:17])),
        ("POSE_LANDMARKS", 33, 5, True, lambda rows: from_mediapipe(rows / [FRAME[1], FRAME[0], 1], FRAME)),
    ],
)
def test_a_pose_file_has_its_own_rate(
    tmp_path: Path, name: str, points: int, before: int, depth: bool, convert: Any
) -> None:
    triples, path = triples_of(points), tmp_path / "a.pose"
    write(path, name, points, triples, before, depth)
    found, fps = read_motion(path, SIZE)
    assert fps == 25
    expected = np.stack([fit_pose(convert(rows), FRAME, SIZE) for rows in triples])
    assert np.isnan(expected).any()
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_what_a_pose_file_has_outside_of_its_picture_is_missing(tmp_path: Path) -> None:
    triples = triples_of(25)
    triples[:, 4, 0] = FRAME[1] + 1
    triples[2, :, 2] = 0  # nobody
    write(tmp_path / "a.pose", "pose_keypoints_2d", 25, triples)
    found, _ = read_motion(tmp_path / "a.pose", SIZE)
    assert found.shape == (3, 18, 2)
    assert np.isnan(found[:, 4]).all()


def test_a_pose_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pose"
    write(path, "FACE", 68, triples_of(68))
    with pytest.raises(InputError, match="FACE"):
        read_motion(path, SIZE)
    write(path, "POSE_LANDMARKS", 13, triples_of(13))  # reduced, as pose-format offers
    with pytest.raises(InputError, match="POSE_LANDMARKS of 13 points"):
        read_motion(path, SIZE)
    write(path, "BODY", 23, triples_of(23), fps=0)
    with pytest.raises(InputError, match=r"a\.pose says 100 × 200 pixels at 0 frames"):
        read_motion(path, SIZE)
    write(path, "BODY", 23, triples_of(23))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"no \.pose file"):
        read_motion(path, SIZE)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"no \.pose file"):
        read_motion(path, SIZE)
    with pytest.raises(InputError, match="cannot be read"):
        read_motion(tmp_path / "none.pose", SIZE)
