"""TODO."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpfm_edge.core.errors import InputError
from rpfm_edge.live import messages
from rpfm_edge.people.formats import from_coco, from_openpose
from rpfm_edge.people.pose import fit_pose

SIZE = (256, 176)
RNG = np.random.default_rng(0)


def points(count: int, size: tuple[int, int] = SIZE) -> list[list[float]]:
    return (RNG.random((count, 2)) * [size[1], size[0]]).tolist()


def read(**changes: Any) -> messages.Pose:
    message = {"v": 1, "type": "pose", "id": 3, "t_ms": 12.5, "keypoints": points(18)} | changes
    return messages.read_pose(messages.decode(json.dumps(message)), SIZE, 99.0, 7)


def test_openpose_comes_as_it_was_sent() -> None:
    sent = points(18)
    sent[4] = None  # type: ignore[call-overload]
    sent[5] = [1.0, 2.0, 0.0]
    pose = read(format="openpose18", keypoints=sent)
    assert (pose.id, pose.pose_in_ms, pose.client_ms, pose.owner) == (3, 99.0, 12.5, 7)
    assert np.flatnonzero(np.isnan(pose.points[:, 0])).tolist() == [4, 5]
    np.testing.assert_allclose(np.delete(pose.points, [4, 5], 0), np.delete(np.array(sent, object), [4, 5]).tolist())


def test_coco_gets_a_neck_and_another_frame_is_fitted() -> None:
    sent = points(17, (480, 640))
    pose = read(format="coco17", keypoints=sent, size=[480, 640])
    expected = fit_pose(from_coco([[x, y, 1] for x, y in sent]), (480, 640), SIZE)
    np.testing.assert_allclose(pose.points, expected, atol=1e-4)
    np.testing.assert_allclose(pose.points[1], (pose.points[2] + pose.points[5]) / 2, atol=1e-3)


def test_mediapipe_guesses_outside_the_picture_are_missing() -> None:
    sent = [[*point, 0.9] for point in points(33)]
    sent[0] = [-20.0, 5.0, 0.9]  # the nose
    sent[15] = [50.0, 50.0, 0.2]  # the left wrist
    pose = read(format="mediapipe33", keypoints=sent)
    assert np.flatnonzero(np.isnan(pose.points[:, 0])).tolist() == [0, 7]
    np.testing.assert_allclose(pose.points[2], sent[12][:2], atol=1e-3)  # the right shoulder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": -1}, "the id is -1"),
        ({"id": True}, "the id is True"),
        ({"id": 2**60}, "the id is"),
        ({"t_ms": "now"}, "t_ms is 'now'"),
        ({"t_ms": 1e300}, "t_ms is 1e+300"),
        ({"format": "smpl"}, "format is 'smpl'"),
        ({"format": ["coco17"]}, "format is"),
        ({"keypoints": points(17)}, "17 keypoints"),
        ({"keypoints": None}, "a NoneType keypoints"),
        ({"keypoints": [[1, 2, 3, 4]] * 18}, "keypoint 0 is [1, 2, 3, 4]"),
        ({"keypoints": [["a", 1]] * 18}, "keypoint 0 is ['a', 1]"),
        ({"keypoints": [[1e9, 1]] * 18}, "keypoint 0 is [1000000000.0, 1]"),
        ({"keypoints": [[10**400, 1]] * 18}, "keypoint 0 is [1000"),
        ({"keypoints": [[-(10**9), 1]] * 18}, "keypoint 0 is [-1000000000, 1]"),
        ({"keypoints": [[500, 1]] * 18}, "outside the picture"),
        ({"keypoints": [[500, 1]] * 18}, "set what lies outside to nan (null in JSON)"),
        ({"format": "mediapipe33", "keypoints": [[0.5, 1.0, 0.9]] * 33}, "not MediaPipe's [0, 1]"),
        ({"keypoints": [None] * 18}, "no visible keypoint"),
        ({"size": [0, 5]}, "the size is [0, 5]"),
        ({"size": [10**400, 5]}, "the size is [1000"),
        ({"size": "big"}, "the size is 'big'"),
    ],
)
def test_a_bad_pose_is_refused_with_a_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as refused:
        read(**changes)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ('{"type":"pose","keypoints":[[NaN,1]]}', "NaN is no number"),
        ('{"type":"pose","t_ms":-Infinity}', "-Infinity is no number"),
        ("[]", "a message is a list"),
        ("{}", "no type"),
        ('{"v":2,"type":"pose"}', "version 2"),
        ("[" * 10_000, "too deep"),
        ('"' + "x" * messages.MAX_BYTES + '"', "bytes"),
    ],
)
def test_what_is_no_message_is_refused(text: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        messages.decode(text)
    assert words in str(refused.value)


def test_a_number_too_large_for_a_float_is_refused() -> None:
    text = json.dumps({"type": "pose", "id": 0, "keypoints": [[1, 2]] * 18}).replace("[1, 2]", "[1e999, 2]", 1)
    with pytest.raises(InputError, match="keypoint 0 is \\[inf, 2\\]"):
        messages.read_pose(messages.decode(text), SIZE, 0.0)


def test_frames_are_packed_as_the_page_says() -> None:
    data = messages.pack({"id": 5}, b"\xff\xd8jpeg")
    assert int.from_bytes(data[:4], "big") == len(b'{"id":5}')
    assert messages.unpack(data) == ({"id": 5}, b"\xff\xd8jpeg")


@pytest.mark.parametrize("data", [b"", b"\0\0", b"\0\0\0\x09{}", b"\0\0\0\x02[]", b"\0\0\0\x02{x"])
def test_half_a_frame_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="cut short"):
        messages.unpack(data)


def test_confidence_of_openpose_above_zero_is_visible() -> None:
    sent = [[*point, 0.01] for point in points(18)]
    np.testing.assert_allclose(read(keypoints=sent).points, from_openpose(sent), atol=1e-4)


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=40,
)
FIELDS = ("v", "type", "id", "t_ms", "format", "keypoints", "size")
SOUND: dict[str, Any] = {"v": 1, "type": "pose", "id": 0, "format": "openpose18", "keypoints": [[9, 9]] * 18}


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=3), st.sampled_from(list(messages.COUNTS)))
def test_whatever_is_sent_is_a_pose_or_refused(odd: dict[str, Any], kind: str) -> None:
    count = messages.COUNTS[kind]
    text = json.dumps(SOUND | {"format": kind, "keypoints": [[9, 9]] * count} | odd)
    try:
        pose = messages.read_pose(messages.decode(text), SIZE, 0.0)
    except InputError:
        return
    assert np.isfinite(pose.points).any()


@settings(deadline=None)
@given(st.binary(max_size=50) | st.text(max_size=50))
def test_whatever_bytes_come_are_refused_or_read(data: bytes | str) -> None:
    with suppress(InputError):
        assert isinstance(messages.decode(data)["type"], str)
