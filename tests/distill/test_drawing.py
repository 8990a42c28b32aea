"""Maps of a pose, against OpenCV's drawing, closed forms and what an exported graph makes."""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnxruntime
import pytest
import torch

from distill.drawing import heat_maps, limb_maps, skeletons
from rpfm_edge.people.data import sample_root
from rpfm_edge.people.deepfashion import open_split
from rpfm_edge.people.pose import BONES, FRAME, MISSING, draw_skeleton, to_graph


@pytest.fixture(scope="module")
def poses() -> np.ndarray:
    split = open_split(sample_root(), "test")
    return np.stack([split.pose(index) for index in range(0, 48, 6)])


def test_a_heat_map_is_a_gaussian_around_its_joint() -> None:
    points = torch.full((1, 18, 2), MISSING)
    points[0, 3] = torch.tensor([10.25, 20.0])
    maps = heat_maps(points, (64, 48), sigma=5.0)
    assert maps.shape == (1, 18, 64, 48)
    assert maps[0, 3, 20, 10] == pytest.approx(np.exp(-(0.25**2) / 50))
    assert maps[0, 3, 27, 14] == pytest.approx(np.exp(-(7**2 + 3.75**2) / 50), rel=1e-5)
    assert maps[0, [0, 1, 2, *range(4, 18)]].abs().max() == 0


def test_a_smaller_map_is_the_large_one_seen_from_further_away(poses: np.ndarray) -> None:
    points = torch.from_numpy(np.stack([to_graph(pose) for pose in poses]))
    large, small = heat_maps(points, FRAME, 12.0), heat_maps(points, FRAME, 12.0, out=(32, 22))
    shrunk = torch.nn.functional.avg_pool2d(large, 8)
    assert (small - shrunk).abs().max() < 0.06  # a mean of a Gaussian is below its middle


def test_a_limb_is_where_its_bone_is() -> None:
    points = torch.full((1, 18, 2), MISSING)
    start, end = BONES[3]
    points[0, start], points[0, end] = torch.tensor([10.0, 30.0]), torch.tensor([40.0, 30.0])
    maps = limb_maps(points, (64, 48), width=3.0)
    assert maps[0, 3, 30, 10:41].min() == 1
    assert maps[0, 3, 33, 25] == pytest.approx(0.5)  # at the edge
    assert maps[0, 3, 36, 25] == 0
    assert maps[0, 3].sum() == pytest.approx(30 * 6 + np.pi * 9, rel=0.06)
    assert maps.sum() == maps[0, 3].sum()


def test_a_skeleton_resembles_opencvs(poses: np.ndarray) -> None:
    """Strokes have straight sides where OpenCV draws ellipses; joints are in the same places and colours."""
    points = torch.from_numpy(np.stack([to_graph(pose) for pose in poses]))
    made = (255 * skeletons(points, FRAME)).permute(0, 2, 3, 1).numpy()
    drawn = np.stack([draw_skeleton(pose) for pose in poses]).astype(float)
    assert made.max() <= 255.01
    for mine, other, pose in zip(made, drawn, poses, strict=True):
        column, row = pose[:14].round().astype(int).T  # the body's joints; those of the face overlap
        assert np.median(np.abs(mine[row, column] - other[row, column])) < 1
        assert np.corrcoef(mine.ravel(), other.ravel())[0, 1] > 0.95


def test_the_maps_export(poses: np.ndarray) -> None:
    class Maps(torch.nn.Module):
        def forward(self, points: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return heat_maps(points, FRAME, out=(64, 44)), limb_maps(points, FRAME), skeletons(points, FRAME)

    given, stream = torch.from_numpy(to_graph(poses[0])[None]), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Maps(), (given,), stream, input_names=["points"], opset_version=20, dynamo=False)
    session = onnxruntime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
    other = to_graph(poses[1])[None]
    for got, want in zip(session.run(None, {"points": other}), Maps()(torch.from_numpy(other)), strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=2e-5)
