"""Poses: what is drawn where, what is refused, mirroring, and the formats that are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpfm_edge.core.errors import InputError, SignatureError
from rpfm_edge.core.signature import TensorSpec
from rpfm_edge.people.formats import from_coco, from_mediapipe, from_openpose, read_pose, write_pose
from rpfm_edge.people.image import fit_image
from rpfm_edge.people.pose import (
    BONES,
    COLOURS,
    KEYPOINTS,
    MISSING,
    check_pose,
    draw_skeleton,
    fit_pose,
    flip,
    from_graph,
    pose_input,
    pose_kind,
    scale_pose,
    to_graph,
)

NAN = np.float32(np.nan)
# COCO-17 and MediaPipe-33 by name, as their makers list them
COCO = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
    *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle"),
    "right_ankle",
)
MEDIAPIPE = (
    *("nose", "left_eye_inner", "left_eye", "left_eye_outer", "right_eye_inner", "right_eye", "right_eye_outer"),
    *("left_ear", "right_ear", "mouth_left", "mouth_right", "left_shoulder", "right_shoulder", "left_elbow"),
    *("right_elbow", "left_wrist", "right_wrist", "left_pinky", "right_pinky", "left_index", "right_index"),
    *("left_thumb", "right_thumb", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle"),
    *("left_heel", "right_heel", "left_foot_index", "right_foot_index"),
)
BODY_25 = (
    *("nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist"),
    *("mid_hip", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "right_eye"),
    *("left_eye", "right_ear", "left_ear", "left_big_toe", "left_small_toe", "left_heel", "right_big_toe"),
    *("right_small_toe", "right_heel"),
)
COORDINATES = st.floats(0, 176, width=32)
POINTS = st.one_of(st.just((np.nan, np.nan)), st.tuples(COORDINATES, COORDINATES))
POSES = st.lists(POINTS, min_size=18, max_size=18).map(lambda points: np.array(points, np.float32))


def a_pose() -> np.ndarray:
    return np.random.default_rng(0).uniform(20, 150, (18, 2)).astype(np.float32)


def only(**points: tuple[float, float]) -> np.ndarray:
    pose = np.full((18, 2), NAN)
    for name, point in points.items():
        pose[KEYPOINTS.index(name)] = point
    return pose


def place(name: str) -> tuple[float, float]:
    """A point that depends on the name alone, so that orders can be compared by name."""
    return float(len(name) * 5 + name.count("e") * 2), float(sum(name.encode()) % 200)


def expected_by_name(*missing: str) -> np.ndarray:
    return np.array([(NAN, NAN) if name in missing else place(name) for name in KEYPOINTS], np.float32)


def save(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_tables() -> None:
    assert len(KEYPOINTS) == len(set(KEYPOINTS)) == 18
    assert len(BONES) == len(set(BONES)) == 17
    assert {joint for bone in BONES for joint in bone} == set(range(18))
    assert len(set(COLOURS)) == 18


def test_joint_is_a_disc_of_radius_four_in_its_colour() -> None:
    drawn = draw_skeleton(only(left_wrist=(60, 100)))
    assert (drawn.shape, drawn.dtype) == ((256, 176, 3), np.uint8)
    rows, columns = np.nonzero(drawn.any(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (96, 104, 56, 64)
    assert abs(len(rows) - np.pi * 4**2) < 12
    assert (drawn[rows, columns] == COLOURS[KEYPOINTS.index("left_wrist")]).all()


def test_bone_is_an_ellipse_between_its_joints() -> None:
    drawn = draw_skeleton(only(right_elbow=(88, 50), right_wrist=(88, 150)))
    bone = BONES.index((3, 4))
    shade = np.array(COLOURS[bone]) * 0.6
    for y in range(56, 145):
        columns = np.flatnonzero((np.abs(drawn[y].astype(float) - shade) <= 1).all(axis=1))
        half_width = 4 * np.sqrt(1 - ((y - 100) / 50) ** 2)
        assert abs(columns.min() - (88 - half_width)) <= 1.1
        assert abs(columns.max() - (88 + half_width)) <= 1.1


@pytest.mark.parametrize("joint", range(18))
def test_missing_joint_leaves_out_its_disc_and_its_bones(joint: int) -> None:
    angles = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    pose = np.stack([88 + 70 * np.cos(angles), 128 + 70 * np.sin(angles)], axis=1)
    pose[joint] = np.nan
    colours = {tuple(colour) for colour in draw_skeleton(pose).reshape(-1, 3).tolist()}
    assert {COLOURS[i] for i in range(18)} - colours == {COLOURS[joint]}
    bones = {i for i, bone in enumerate(BONES) if joint in bone}
    darkened = [tuple(round(0.6 * channel) for channel in colour) for colour in COLOURS]
    assert {i for i in range(17) if darkened[i] not in colours} == bones


def test_drawing_scales_with_the_height() -> None:
    small, large = (draw_skeleton(only(nose=(x, x)), size) for x, size in ((50, (256, 176)), (100, (512, 352))))
    assert large.any(axis=2).sum() == pytest.approx(4 * small.any(axis=2).sum(), rel=0.15)


def test_drawing_follows_parts_of_a_pixel() -> None:
    centres = []
    for x in (60, 60.25, 60.5, 60.75):
        drawn = draw_skeleton(only(neck=(x, 50), right_hip=(x, 150)))
        centres.append(np.nonzero(drawn.any(axis=2))[1].mean())
    assert (np.diff(centres) > 0).all()


@pytest.mark.parametrize("joint", [True, False])
def test_drawing_follows_parts_of_a_pixel_evenly(joint: bool) -> None:
    """A disc, and an ellipse: their centres of mass are where they should be, and not at the nearest pixel."""
    for x in np.arange(60, 61, 0.125):
        drawn = draw_skeleton(only(neck=(x, 50)) if joint else only(neck=(x, 50), right_hip=(x, 150)))
        assert np.nonzero(drawn.any(axis=2))[1].mean() == pytest.approx(x, abs=0.3)


def test_drawing_is_the_same_every_time_and_leaves_its_input_alone() -> None:
    pose = a_pose()
    before = pose.copy()
    np.testing.assert_array_equal(draw_skeleton(pose), draw_skeleton(pose.tolist()))
    np.testing.assert_array_equal(pose, before)


def test_joints_far_outside_and_coincident_ones_do_no_harm() -> None:
    assert not draw_skeleton(only(nose=(1e30, 5), neck=(np.inf, 5), left_ear=(-400, 5))).any()
    pose = np.full((18, 2), 50.0)
    assert draw_skeleton(pose)[50, 50].any()
    assert draw_skeleton(only(neck=(88, 50), nose=(88, -1e30)))[20, 88].any()


def test_mirrored_pose_draws_the_mirrored_shape() -> None:
    pose = a_pose().round()
    shape, mirrored = (draw_skeleton(p).any(axis=2) for p in (pose, flip(pose, 176)))
    assert (shape[:, ::-1] != mirrored).mean() < 0.005


def test_flip_swaps_the_sides() -> None:
    mirrored = flip(only(nose=(10, 5), left_wrist=(3, 7), right_ear=(20, 8)), 176)
    np.testing.assert_array_equal(mirrored, only(nose=(165, 5), right_wrist=(172, 7), left_ear=(155, 8)))


def test_flip_of_many_poses() -> None:
    poses = np.stack([a_pose(), a_pose() + 1])
    np.testing.assert_array_equal(flip(poses, 176)[1], flip(poses[1], 176))


@given(POSES, st.integers(1, 2048))
def test_flipping_twice_changes_nothing(pose: np.ndarray, width: int) -> None:
    np.testing.assert_allclose(flip(flip(pose, width), width), pose, atol=3e-4)


def test_check_takes_lists_and_missing_keypoints() -> None:
    pose = a_pose()
    pose[3] = np.nan
    checked = check_pose(pose.tolist())
    assert checked.dtype == np.float32
    np.testing.assert_array_equal(checked, pose)


def edited(index: int, point: tuple[float, float]) -> np.ndarray:
    pose = a_pose()
    pose[index] = point
    return pose


@pytest.mark.parametrize(
    ("pose", "message"),
    [
        (np.zeros((17, 2)), r"shape \[17, 2\]: expected \[18, 2\]"),
        (np.zeros((1, 18, 2)), r"shape \[1, 18, 2\]"),
        ("a pose", "no array of numbers"),
        ([[1, 2]] * 17 + [[1]], "no array of numbers"),
        (edited(4, (np.inf, 3)), r"keypoint 4 \(right_wrist\) of the pose is \[inf, 3.0\]"),
        (edited(4, (np.nan, 3)), r"keypoint 4 \(right_wrist\) of the pose is \[nan, 3.0\].*nan for both"),
        (edited(7, (-1, 3)), r"keypoint 7 \(left_wrist\) lies at x -1, y 3, outside the picture"),
        (edited(7, (177, 3)), "outside the picture: expected 0 ≤ x ≤ 176 and 0 ≤ y ≤ 256"),
        (edited(0, (5, 257)), r"keypoint 0 \(nose\) lies at x 5, y 257"),
        (np.full((18, 2), np.nan), "no visible keypoint"),
    ],
)
def test_check_refuses(pose: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_pose(pose)


def test_check_knows_the_size() -> None:
    pose = edited(0, (300, 500))
    check_pose(pose, (512, 352))
    with pytest.raises(InputError, match="y 500, outside"):
        check_pose(pose, (256, 352))


def test_a_pose_that_fits_still_fits_when_mirrored() -> None:
    check_pose(flip(check_pose(edited(0, (175.5, 256))), 176))


@pytest.mark.parametrize(("h", "w"), [(100, 300), (300, 100), (512, 352)])
def test_fitted_pose_follows_the_fitted_picture(h: int, w: int) -> None:
    image = np.zeros((h, w, 3), np.uint8)
    image[60:70, 40:50] = 255
    rows, columns = np.nonzero(fit_image(image, (256, 176))[..., 0] > 127)
    (x, y), *_ = fit_pose(only(nose=(45, 65)), (h, w), (256, 176))
    assert abs(columns.mean() + 0.5 - x) < 0.6
    assert abs(rows.mean() + 0.5 - y) < 0.6


def test_scaled_pose() -> None:
    np.testing.assert_array_equal(scale_pose(only(nose=(44, 64)), (256, 176), (128, 352)), only(nose=(88, 32)))


def test_openpose_18_and_25() -> None:
    rows = [(*place(name), 0.0 if name == "left_knee" else 0.9) for name in KEYPOINTS]
    np.testing.assert_array_equal(from_openpose(rows), expected_by_name("left_knee"))
    np.testing.assert_array_equal(from_openpose(np.ravel(rows)), expected_by_name("left_knee"))
    np.testing.assert_array_equal(from_openpose([(*place(name), 1) for name in BODY_25]), expected_by_name())


def test_coco() -> None:
    rows = [(*place(name), 0 if name == "right_ear" else 2) for name in COCO]
    pose = from_coco(rows)
    np.testing.assert_array_equal(np.delete(pose, 1, 0), np.delete(expected_by_name("right_ear"), 1, 0))
    np.testing.assert_allclose(pose[1], (np.array(place("left_shoulder")) + place("right_shoulder")) / 2)
    rows[COCO.index("left_shoulder")] = (5, 5, 0)
    assert np.isnan(from_coco(rows)[1]).all()


def test_mediapipe() -> None:
    def landmark(name: str) -> list[float]:
        x, y = place(name)
        return [x / 176, y / 256, {"nose": 0.49, "left_ear": 0.5}.get(name, 1)]

    rows = [landmark(name) for name in MEDIAPIPE]
    rows[MEDIAPIPE.index("left_ankle")][1] = 1.01
    pose = from_mediapipe(rows)
    expected = expected_by_name("nose", "left_ankle")
    np.testing.assert_allclose(np.delete(pose, 1, 0), np.delete(expected, 1, 0), rtol=1e-6)
    np.testing.assert_allclose(pose[1], (np.array(place("left_shoulder")) + place("right_shoulder")) / 2, rtol=1e-6)
    np.testing.assert_allclose(from_mediapipe(rows, (512, 352)), 2 * pose, rtol=1e-6)


@pytest.mark.parametrize("reader", [from_openpose, from_coco, from_mediapipe])
def test_wrong_number_of_points(reader: Any) -> None:
    with pytest.raises(InputError, match=r"keypoints have shape \[16, 3\]: expected (18 × 3 numbers or )?\d+ × 3"):
        reader(np.zeros((16, 3)))
    with pytest.raises(InputError, match="keypoints have shape"):
        reader([["a", "b", "c"]] * 18)


@given(pose=POSES.filter(lambda pose: bool(np.isfinite(pose).any())))
def test_written_poses_are_read_back_exactly(tmp_path_factory: pytest.TempPathFactory, pose: np.ndarray) -> None:
    path = tmp_path_factory.getbasetemp() / "pose.json"
    write_pose(path, pose)
    np.testing.assert_array_equal(read_pose(path), pose)


def test_written_pose_is_plain(tmp_path: Path) -> None:
    write_pose(tmp_path / "a.json", only(nose=(108.9, 33.3)), (256, 176))
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "keypoints": [[108.9, 33.3], *[None] * 17],
        "size": [256, 176],
    }


def test_written_pose_is_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"shape \[17, 2\]"):
        write_pose(tmp_path / "a.json", np.zeros((17, 2)))


def test_read_scales_from_the_size_in_the_file(tmp_path: Path) -> None:
    write_pose(tmp_path / "a.json", only(nose=(100, 60)), (512, 352))
    np.testing.assert_array_equal(read_pose(tmp_path / "a.json"), only(nose=(50, 30)))
    write_pose(tmp_path / "a.json", only(nose=(50, 30)), (100, 100))  # a square is not stretched
    np.testing.assert_allclose(read_pose(tmp_path / "a.json"), only(nose=(88, 92.8)), rtol=1e-6)
    save(tmp_path / "a.json", {"keypoints": [[50, 30], *[None] * 17]})
    np.testing.assert_array_equal(read_pose(tmp_path / "a.json", (100, 100)), only(nose=(50, 30)))


def openpose_rows() -> list[float]:
    return [value for name in KEYPOINTS for value in (*place(name), 0.8)]


def test_read_openpose(tmp_path: Path) -> None:
    data: dict[str, Any] = {
        "version": 1.3,
        "people": [{"pose_keypoints_2d": openpose_rows()}, {"pose_keypoints_2d": []}],
    }
    np.testing.assert_array_equal(read_pose(save(tmp_path / "a.json", data)), expected_by_name())
    data |= {"canvas_height": 512, "canvas_width": 352}
    for written in (data, [data]):  # some writers of ControlNet make a list of frames
        np.testing.assert_array_equal(read_pose(save(tmp_path / "a.json", written)), expected_by_name() / 2)


def test_read_openpose_in_shares_of_the_canvas(tmp_path: Path) -> None:
    shares = [value for name in KEYPOINTS for value in (place(name)[0] / 176, place(name)[1] / 256, 1)]
    data = {"people": [{"pose_keypoints_2d": shares}], "canvas_height": 512, "canvas_width": 352}
    np.testing.assert_allclose(read_pose(save(tmp_path / "a.json", data)), expected_by_name(), rtol=1e-6)


def test_read_coco(tmp_path: Path) -> None:
    rows = [[*place(name), 2] for name in COCO]
    flat = [value for row in rows for value in row]
    for data in (rows, flat, {"keypoints": flat, "bbox": [0, 0, 1, 1]}, {"keypoints": rows}, [{"keypoints": flat}]):
        np.testing.assert_array_equal(read_pose(save(tmp_path / "a.json", data)), from_coco(rows))


def test_read_mediapipe(tmp_path: Path) -> None:
    names = {name: place(name) for name in MEDIAPIPE}
    landmarks = [{"x": x / 176, "y": y / 256, "z": 0.1, "visibility": 0.9} for x, y in names.values()]
    expected = from_mediapipe([[p["x"], p["y"], 1] for p in landmarks])
    for data in (landmarks, [landmarks], {"pose_landmarks": [landmarks]}, {"landmark": landmarks}):
        np.testing.assert_array_equal(read_pose(save(tmp_path / "a.json", data)), expected)
    square = read_pose(save(tmp_path / "a.json", {"landmarks": landmarks, "size": [300, 300]}))
    np.testing.assert_allclose(
        square, fit_pose(from_mediapipe([[p["x"], p["y"], 1] for p in landmarks], (300, 300)), (300, 300), (256, 176))
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"people": []}, "nobody is in the picture"),
        ({"people": [{"pose_keypoints_2d": None}]}, "nobody is in the picture"),
        ({"people": [3]}, "nobody is in the picture"),
        ({"people": [{"pose_keypoints_2d": [0] * 54}]}, "has nobody in the picture"),
        ({"keypoints": [None] * 18}, "has nobody in the picture"),
        ([], "nobody is in the picture"),
        ({"people": [{"pose_keypoints_2d": [1] * 51}]}, r"OpenPose keypoints have shape \[17, 3\]: expected 18 × 3"),
        ({"keypoints": [[1, 2]] * 16}, "its keypoints are 16 entries"),
        ({"keypoints": "many"}, "its keypoints are a str"),
        ({"keypoints": [[1, 2]] * 17}, r"COCO keypoints have shape \[17, 2\]"),
        ({"keypoints": [[1, 2, 3]] * 18}, r"the pose has shape \[18, 3\]"),
        ([[1, 2, 3]] * 33, "its keypoints are 33 entries"),
        ([{"x": 0.5, "y": 0.5}] * 32, r"MediaPipe keypoints have shape \[32, 3\]"),
        ({"joints": []}, "in no known pose format: expected OpenPose .*COCO .*MediaPipe"),
        ([{"a": 1}], "no known pose format"),
        (["a"], "no known pose format"),
        (3, "no known pose format"),
        ({"keypoints": [[1, 2]] * 18, "size": [0, 176]}, r"the size of its picture is \[0, 176\]"),
        ({"people": [], "canvas_height": 5}, r"the size of its picture is \[5, None\]"),
    ],
)
def test_read_refuses(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_pose(save(tmp_path / "a.json", data))
    assert "a.json" in str(caught.value)


def test_read_refuses_what_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\0nose")
    with pytest.raises(InputError, match=r"a\.json is no JSON"):
        read_pose(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(InputError, match=r"a\.json is no JSON"):
        read_pose(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json is no JSON"):
        read_pose(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"gone\.json cannot be read"):
        read_pose(tmp_path / "gone.json")


def test_both_kinds_of_input() -> None:
    pose = only(neck=(50, 40), nose=(60.5, 20))
    np.testing.assert_array_equal(pose_input(pose, "skeleton"), draw_skeleton(pose)[None])
    points = pose_input(pose, "keypoints")
    assert points.dtype == np.float32
    assert points.shape == (1, 18, 2)
    np.testing.assert_array_equal(points[0, :2], [[60.5, 20], [50, 40]])
    assert (points[0, 2:] == MISSING).all()
    assert np.float16(MISSING) == MISSING


def test_missing_keypoints_go_into_graphs_and_come_back() -> None:
    poses = np.stack([a_pose(), edited(3, (np.nan, np.nan)), np.full((18, 2), np.nan)]).astype(np.float32)
    assert np.isfinite(to_graph(poses)).all()
    np.testing.assert_array_equal(from_graph(to_graph(poses)), poses)


def test_the_kind_follows_from_the_input() -> None:
    assert pose_kind(TensorSpec("pose", (1, 256, 176, 3), "uint8")) == "skeleton"
    assert pose_kind(TensorSpec("pose", (1, 18, 2), "float32")) == "keypoints"
    for spec in (TensorSpec("pose", (1, 18, 3), "float32"), TensorSpec("pose", (1, 18, 2), "uint8")):
        with pytest.raises(SignatureError, match=r"input 'pose' is .*: expected uint8\[1, H, W, 3\], a drawn skeleton"):
            pose_kind(spec)
