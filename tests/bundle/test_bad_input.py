"""What the shipped person model makes of photos and poses that show less than it was trained on, or more."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from rpfm_edge import Pipeline, api
from rpfm_edge.core.errors import InputError
from rpfm_edge.measure.metrics import psnr_db
from rpfm_edge.people.data import Split, sample_root
from rpfm_edge.people.deepfashion import open_split
from rpfm_edge.people.formats import NobodyError
from rpfm_edge.people.image import fit_image

BACKGROUND, SHOWN = 247, 24  # grey levels of the data set's backdrop, and how far from it a pixel shows somebody
RIGHT_ARM, LEFT_ARM = [3, 4], [6, 7]  # elbow and wrist


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("shipped")
    graph = api.quantize("student:xs", None, folder / "graph", "fp32", 1)
    with Pipeline.open(api.build(graph.path, folder / "bundle", "openvino"), "openvino") as opened:
        yield opened


@pytest.fixture(scope="module")
def split() -> Split:
    return open_split(sample_root(), "test")


@pytest.fixture(scope="module")
def photo(split: Split, pipe: Pipeline) -> np.ndarray:
    return split.image(0, pipe.size)


@pytest.fixture(scope="module")
def pose(split: Split, pipe: Pipeline) -> np.ndarray:
    return split.pose(1, pipe.size)


def person_share(picture: np.ndarray) -> float:
    """The share of the pixels that show somebody."""
    return float((np.abs(picture.astype(int) - BACKGROUND).max(-1) > SHOWN).mean())


def test_found_joints_are_as_good_as_given_ones(
    pipe: Pipeline, split: Split, photo: np.ndarray, pose: np.ndarray
) -> None:
    found, given = pipe.prepare(photo), pipe.prepare(photo, split.pose(0, pipe.size))
    assert psnr_db(pipe.render(found, pose), pipe.render(given, pose)) > 28


def test_half_a_person_is_moved_and_the_rest_invented(pipe: Pipeline, photo: np.ndarray, pose: np.ndarray) -> None:
    whole = pipe.render(pipe.prepare(photo), pose)
    upper = pipe.prepare(fit_image(photo[: pipe.size[0] // 2], pipe.size))
    picture = pipe.render(upper, pose)
    assert 0.5 < person_share(picture) / person_share(whole) < 1.6
    head = slice(0, pipe.size[0] // 5)
    assert psnr_db(picture[head], whole[head]) > 15


@pytest.mark.parametrize("hidden", [RIGHT_ARM, LEFT_ARM], ids=["right arm", "left arm"])
def test_a_limb_that_the_pose_does_not_have_changes_what_is_near_it(
    pipe: Pipeline, photo: np.ndarray, pose: np.ndarray, hidden: list[int]
) -> None:
    less = pose.copy()
    less[hidden] = np.nan
    person = pipe.prepare(photo)
    changed = np.abs(pipe.render(person, pose).astype(int) - pipe.render(person, less)).max(-1)
    legs = slice(int(np.nanmean(pose[[9, 12], 1])), None)  # below the knees
    assert changed.max() > SHOWN
    assert np.median(changed[legs]) <= 2


@pytest.mark.parametrize("hidden", [RIGHT_ARM, LEFT_ARM], ids=["right arm", "left arm"])
def test_a_limb_that_the_source_does_not_show_is_there_all_the_same(
    pipe: Pipeline, split: Split, photo: np.ndarray, pose: np.ndarray, hidden: list[int]
) -> None:
    """The arm is painted over and its joints are said to be missing."""
    joints, covered = split.pose(0, pipe.size), photo.copy()
    for x, y in joints[hidden]:
        covered[max(0, int(y) - 9) : int(y) + 10, max(0, int(x) - 9) : int(x) + 10] = BACKGROUND
    joints[hidden] = np.nan
    picture, whole = (pipe.render(pipe.prepare(*given), pose) for given in ((covered, joints), (photo,)))
    assert 0.85 < person_share(picture) / person_share(whole) < 1.15
    assert psnr_db(picture, whole) > 18


def test_a_joint_that_moves_by_a_tenth_of_a_pixel_moves_the_picture_by_as_little(
    pipe: Pipeline, photo: np.ndarray, pose: np.ndarray
) -> None:
    person, frames = pipe.prepare(photo), []
    for shift in (0.0, 0.1, 1.0):
        moved = pose.copy()
        moved[4] += shift
        frames.append(pipe.render(person, moved).astype(int))
    little, more = (np.abs(frame - frames[0]).mean() for frame in frames[1:])
    assert little < 0.35 * more


@pytest.mark.parametrize("kind", ["plain", "noise", "tiles"])
def test_nobody_is_one_sentence(pipe: Pipeline, photo: np.ndarray, kind: str) -> None:
    draw = np.random.default_rng(0)
    pictures = {
        "plain": np.full_like(photo, 90),
        "noise": draw.integers(0, 256, photo.shape, dtype=np.uint8),
        "tiles": draw.permutation(photo.reshape(16, 16, 11, 16, 3).swapaxes(1, 2).reshape(-1, 16, 16, 3))
        .reshape(16, 11, 16, 16, 3)
        .swapaxes(1, 2)
        .reshape(photo.shape),
    }
    with pytest.raises(NobodyError, match="nobody was found in the source: expected a person"):
        pipe.prepare(pictures[kind])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pose: pose[:17], "expected"),
        (lambda pose: pose * np.nan, "expected"),
        (lambda pose: pose + 1000, "outside the picture"),
        (lambda pose: pose[:, ::-1] + [90, -90], "outside the picture"),  # y and x
    ],
    ids=["a joint less", "all missing", "outside", "another order"],
)
def test_keypoints_that_cannot_be_are_one_sentence(
    pipe: Pipeline, photo: np.ndarray, pose: np.ndarray, change, words: str
) -> None:  # type: ignore[no-untyped-def]
    person = pipe.prepare(photo)
    for call in (lambda: pipe.render(person, change(pose)), lambda: pipe.prepare(photo, change(pose))):
        with pytest.raises(InputError, match=words) as caught:
            call()
        assert str(caught.value).count("\n") == 0
