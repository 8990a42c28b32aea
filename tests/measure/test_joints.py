"""Joints: the way into the network and back against a network of known answer, PCK by hand, and the real network."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from rpfm_edge.core.errors import ArtifactError, BackendError, ConfigError, InputError
from rpfm_edge.measure import joints
from rpfm_edge.measure import joints as keypoints
from rpfm_edge.measure.joints import (
    cached_file,
    estimate,
    fetch,
    finder_accuracy,
    joint_hits,
    missing_pose,
    pose_accuracy,
    scored,
)
from rpfm_edge.people.data import sample_root
from rpfm_edge.people.deepfashion import open_split
from rpfm_edge.people.pose import KEYPOINTS, flip

openvino = pytest.importorskip("openvino")
from tests.blob import blob_network  # noqa: E402

REASON = missing_pose()
real = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SIZE = (128, 64)


@pytest.fixture
def blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``blob_network`` in place of the real one."""
    monkeypatch.setenv("RPFM_EDGE_POSE", str(blob_network(tmp_path / "blob.xml")))


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network at hand, and an empty cache."""
    monkeypatch.delenv("RPFM_EDGE_POSE", raising=False)
    monkeypatch.setenv("RPFM_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def pictures(*centres: tuple[int, int], size: tuple[int, int] = SIZE) -> np.ndarray:
    """Black pictures, each with a white square of 4 pixels around x, y."""
    made = np.zeros((len(centres), *size, 3), np.uint8)
    for picture, (x, y) in zip(made, centres, strict=True):
        picture[y - 2 : y + 2, x - 2 : x + 2] = 255
    return made


@pytest.mark.usefixtures("blobs")
@pytest.mark.parametrize("size", [(128, 64), (64, 128), (512, 352), (300, 300)])
def test_joints_are_in_the_pixels_of_the_picture(size: tuple[int, int]) -> None:
    found = estimate(pictures((20, 22), (40, 20), size=size))
    assert found.shape == (2, 18, 2)
    assert found.dtype == np.float32
    scale = max(size) / 256
    for points, centre in zip(found, ((20, 22), (40, 20)), strict=True):
        nose, right_hip, left_hip = points[[0, 8, 11]]
        np.testing.assert_allclose(nose, centre, atol=0.2)
        np.testing.assert_allclose(right_hip, (centre[0] + 40 * scale, centre[1] + 72 * scale), atol=0.2)
        np.testing.assert_allclose(left_hip, (centre[0], centre[1] + 69 * scale), atol=0.2)
        np.testing.assert_allclose(points[1], (points[2] + points[5]) / 2, atol=1e-4)  # the neck


@pytest.mark.usefixtures("blobs")
def test_what_is_hardly_visible_or_nobody_is_missing() -> None:
    body, nobody = estimate(np.concatenate([pictures((20, 22)), np.zeros((1, *SIZE, 3), np.uint8)]))
    assert [KEYPOINTS[k] for k in np.flatnonzero(np.isnan(body).any(axis=1))] == ["left_wrist"]
    assert np.isnan(nobody).all()


def test_pck_by_hand() -> None:
    wanted = np.full((1, 18, 2), np.nan, np.float32)
    wanted[0, 1], wanted[0, 8], wanted[0, 11] = (50, 20), (30, 120), (70, 120)  # a torso of 100, so 20 pixels count
    wanted[0, 4], wanted[0, 7], wanted[0, 10] = (50, 60), (10, 60), (101, 60)  # the last outside
    found = wanted.copy()
    found[0, 1] += (12, 16)  # 20 away
    found[0, 8] += (12.1, 16)
    found[0, 4] = np.nan
    found[0, 0] = (3, 3)  # not asked for
    hits = joint_hits(found, wanted, (150, 100))[0]
    scores = {KEYPOINTS[k]: hits[k] for k in np.flatnonzero(np.isfinite(hits))}
    assert scores == {"neck": 1, "right_hip": 0, "left_hip": 1, "right_wrist": 0, "left_wrist": 1}


def test_pck_without_a_whole_torso() -> None:
    wanted = np.random.default_rng(0).uniform(10, 90, (4, 18, 2)).astype(np.float32)
    wanted[0, 8] = wanted[1, [8, 11]] = wanted[2, 1] = np.nan  # one hip, no hip, no neck
    wanted[3, [1, 8, 11]] = 50  # no length
    assert scored(wanted, (100, 100)).tolist() == [True, False, False, False]
    wanted[0, 1], wanted[0, 11], wanted[0, 0] = (50, 20), (50, 70), (50, 10)  # to the one hip: 50, so 10 pixels count
    for shift, hit in ((9.9, 1), (10.1, 0)):
        assert joint_hits(wanted + np.float32([shift, 0]), wanted, (100, 100))[0, 0] == hit


@pytest.mark.usefixtures("blobs")
def test_accuracy_of_poses_and_of_sides() -> None:
    images = pictures((20, 22), (22, 24), (24, 22))
    wanted = estimate(images)
    wanted[:, 7] = wanted[:, 6]  # the left wrist, which is never found
    # The torso is about 18 pixels: from the neck, 34.5 / 2 below the nose, to the hips, 70.5 / 2 below.
    wanted[1] += 2
    wanted[2, :, 0] += 4
    mirrored = flip(wanted, 1) * [-1, 1]
    hidden = np.full_like(wanted, np.nan)
    found = pose_accuracy(images, wanted)["pose"]
    assert found["pck"]["values"] == pytest.approx([17 / 18, 17 / 18, 0])
    assert found["pck_unsided"]["values"] == pytest.approx(found["pck"]["values"])
    turned = pose_accuracy(images, mirrored)["pose"]
    assert turned["pck"]["values"] == pytest.approx([2 / 18, 2 / 18, 0])  # nose and neck have no side
    assert turned["pck_unsided"]["values"] == pytest.approx([17 / 18, 17 / 18, 0])
    some = pose_accuracy(images, np.stack([hidden[0], wanted[1], hidden[2]]))["pose"]
    assert some["pck"]["values"] == pytest.approx([17 / 18])
    assert pose_accuracy(images, hidden) == pose_accuracy(images, None) == {}


def test_without_the_network(nothing: Path) -> None:
    assert missing_pose() == (
        "the network is not at hand (run: python -m rpfm_edge.measure.joints, or set RPFM_EDGE_POSE)"
    )
    pose = np.random.default_rng(0).uniform(0, 60, (1, 18, 2)).astype(np.float32)
    assert pose_accuracy(pictures((20, 20)), pose) == {}
    message = r"the network that finds joints is not at hand: expected .*; run: python -m rpfm_edge\.measure\.joints"
    with pytest.raises(BackendError, match=message):
        estimate(pictures((20, 20)))


def test_the_variable_must_name_the_network(nothing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPFM_EDGE_POSE", str(nothing / "none"))
    with pytest.raises(ConfigError, match=r"RPFM_EDGE_POSE names .*none, which is no file"):
        missing_pose()
    other = nothing / "other.tflite"
    other.write_bytes(b"no network")
    monkeypatch.setenv("RPFM_EDGE_POSE", str(other))
    with pytest.raises(ArtifactError, match=r"other\.tflite is not the network that finds joints"):
        estimate(pictures((20, 20)))
    image = openvino.opset13.parameter([1, 256, 256, 3], np.float32)
    openvino.save_model(openvino.Model([openvino.opset13.relu(image)], [image]), nothing / "relu.xml")
    monkeypatch.setenv("RPFM_EDGE_POSE", str(nothing / "relu.xml"))
    with pytest.raises(ArtifactError, match=r"relu\.xml is not the network that finds joints"):
        estimate(pictures((20, 20)))


def test_only_pictures_have_joints() -> None:
    with pytest.raises(InputError, match=r"images are float32\[1, 128, 64, 3\]: expected uint8 \[n, H, W, 3\]"):
        estimate(pictures((20, 20)).astype(np.float32))


@pytest.fixture
def index(nothing: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip sees of the world."""
    folder = nothing / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def make_wheel(folder: Path, member: str, data: bytes) -> None:
    info = "mediapipe-0.10.21.dist-info"
    tag = "cp311-cp311-manylinux_2_28_x86_64"
    with zipfile.ZipFile(folder / f"mediapipe-0.10.21-{tag}.whl", "w") as wheel:
        wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: mediapipe\nVersion: 0.10.21\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_the_network_is_taken_out_of_the_wheel_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index, joints.MEMBER, b"a network")
    with pytest.raises(ArtifactError, match=r"pose_landmark_full\.tflite of mediapipe==0\.10\.21 is .*another file"):
        fetch()
    assert not cached_file().exists()
    monkeypatch.setattr(keypoints, "SHA256", "2f782beca6c497e09ee1b67bd6a1202048f19e97f7e1364a58d415ce7b3ecd9e")
    assert fetch() == cached_file()
    assert cached_file().read_bytes() == b"a network"
    assert missing_pose() is None
    next(index.iterdir()).unlink()
    assert fetch() == cached_file()  # no wheel is needed any more


def test_a_wheel_without_the_network(index: Path) -> None:
    make_wheel(index, "mediapipe/other", b"")
    with pytest.raises(ArtifactError, match="is missing or another file: expected sha256 e9a5c5cb17f7"):
        fetch()


@pytest.mark.usefixtures("index")
def test_no_index_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        joints.main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("rpfm-edge: pip cannot download mediapipe==0.10.21 (ERROR: No matching distribution found")
    assert said.endswith("connect this machine, or set RPFM_EDGE_POSE to a copy of pose_landmark_full.tflite.\n")
    assert said.count("\n") == 1


def test_the_cache_follows_the_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = "pose/pose_landmark_full.tflite"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RPFM_EDGE_CACHE", raising=False)
    assert cached_file() == tmp_path / "rpfm-edge" / file
    monkeypatch.setenv("RPFM_EDGE_CACHE", str(tmp_path / "own"))
    assert cached_file() == tmp_path / "own" / file


@real
def test_the_real_network_finds_the_people_of_the_sample() -> None:
    test = open_split(sample_root(), "test")
    indices = range(0, 96, 8)
    images, poses = test.images(indices), np.stack([test.pose(i) for i in indices])
    assert pose_accuracy(images, poses)["pose"]["pck"]["mean"] > 0.97
    assert pose_accuracy(images, np.roll(poses, 1, axis=0))["pose"]["pck"]["mean"] < 0.8
    found, mirrored = estimate(images[:3]), estimate(images[:3, :, ::-1])
    distance = np.linalg.norm(flip(mirrored, 176) - found, axis=2)
    assert np.nanmedian(distance) < 3


@real
def test_the_real_network_finds_nobody_in_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1, 256, 176, 3), dtype=np.uint8)
    assert np.isnan(estimate(noise)).all()


def test_the_finder_is_judged_by_hits_and_by_distance() -> None:
    """One photo exactly, one with every joint 3 pixels off and one joint far off; nobody in the third."""
    wanted = np.tile(np.arange(18, dtype=np.float32)[:, None] * np.float32([3, 5]) + 5, (3, 1, 1))
    found = wanted.copy()
    found[1] += np.float32([3, 0])
    found[1, 4] += 60
    wanted[2] = np.nan
    judged = finder_accuracy(found, wanted, (150, 100))["finder"]
    assert judged["pck"]["mean"] == pytest.approx((1 + 17 / 18) / 2)
    assert judged["error_px"]["mean"] == pytest.approx(1.5)
    assert finder_accuracy(found[2:], wanted[2:], (150, 100)) == {}
