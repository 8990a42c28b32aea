"""The limb map against closed forms: poses that differ by a shift, a turn or a scale are known exactly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.limbs import PARTS, Joints, complete, limb_map
from rpfm_edge.people.data import sample_root
from rpfm_edge.people.deepfashion import open_split
from rpfm_edge.people.pose import MISSING

HEIGHT = 256


@pytest.fixture(scope="module")
def pose() -> Tensor:
    return torch.from_numpy(open_split(sample_root(), "test").pose(1))[None]


def mapped(target: Tensor, source: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Places in the source (N, 2), and weights (11, N), for pixels."""
    moved, weights = limb_map(complete(target, HEIGHT), complete(source, HEIGHT), places)
    return moved[0].T, weights[0]


def on_the_body(weights: Tensor) -> Tensor:
    return weights[PARTS] < 1e-3


def inner(pose: Tensor) -> Tensor:
    """Places along the limbs."""
    ends = [(2, 3), (3, 4), (5, 6), (6, 7), (8, 9), (9, 10), (11, 12), (12, 13), (1, 8)]
    shares = torch.linspace(0.2, 0.8, 5)[:, None]
    return torch.cat([pose[0, a] + shares * (pose[0, b] - pose[0, a]) for a, b in ends])


def test_the_same_pose_moves_nothing(pose: Tensor) -> None:
    places = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([176.0, 256.0])
    moved, weights = mapped(pose, pose, places)
    assert torch.allclose(moved, places, atol=2e-3)
    assert torch.allclose(weights.sum(0), torch.ones(500), atol=1e-5)


def test_a_shifted_person_is_found_where_she_was(pose: Tensor) -> None:
    places = inner(pose)
    moved, weights = mapped(pose, pose - torch.tensor([7.0, -3.0]), places)
    share = 1 - weights[PARTS][:, None]
    assert torch.allclose(moved, places - share * torch.tensor([7.0, -3.0]), atol=5e-3)


def test_a_limb_that_turns_takes_its_pixels_along(pose: Tensor) -> None:
    """The left forearm of an outstretched arm, turned by 50° about the elbow: a place keeps its share of the bone."""
    source = pose.clone()
    source[0, 6], source[0, 7] = source[0, 5] + torch.tensor([30.0, 0.0]), source[0, 5] + torch.tensor([60.0, 0.0])
    elbow, angle, target = source[0, 6], math.radians(50), source.clone()
    target[0, 7] = elbow + 30 * torch.tensor([math.cos(angle), math.sin(angle)])
    place = elbow + 0.9 * (target[0, 7] - elbow)
    moved, weights = mapped(target, source, place[None])
    assert weights[3, 0] > 0.9  # the part "left forearm"
    assert torch.linalg.norm(moved[0] - (elbow + torch.tensor([27.0, 0.0]))) < 3


def test_far_from_everybody_is_background(pose: Tensor) -> None:
    corner = torch.tensor([[1.0, 1.0]])
    moved, weights = mapped(pose, pose + 9, corner)
    assert weights[PARTS, 0] > 0.99
    assert torch.allclose(moved, corner, atol=0.2)


def test_a_tenth_of_a_pixel_moves_the_map_by_as_much(pose: Tensor) -> None:
    places = inner(pose)
    still, _ = mapped(pose, pose, places)
    moved, _ = mapped(pose + 0.1, pose, places)
    assert 0.05 < float((still - moved).abs().mean()) < 0.15


def test_pictures_of_another_size_have_the_same_map_in_frame_units(pose: Tensor) -> None:
    twice = complete(2 * pose, 2 * HEIGHT)
    assert torch.allclose(twice.points, complete(pose, HEIGHT).points, atol=1e-4)


def test_nan_and_the_constant_are_the_same_missing_joint(pose: Tensor) -> None:
    one, other = pose.clone(), pose.clone()
    one[0, 4], other[0, 4] = float("nan"), MISSING
    assert torch.equal(complete(one, HEIGHT).points, complete(other, HEIGHT).points)
    assert complete(one, HEIGHT).known[0, 4] == 0


@pytest.mark.parametrize(
    "gone", [[4], [3, 4], [2, 3, 4], [1], [8, 11], [9, 10, 12, 13], [0, 14, 15, 16, 17], list(range(18))]
)
def test_missing_joints_leave_the_map_finite_and_the_rest_where_it_was(pose: Tensor, gone: list[int]) -> None:
    given = pose.clone()
    given[0, gone] = float("nan")
    found: Joints = complete(given, HEIGHT)
    kept = [joint for joint in range(18) if joint not in gone]
    assert torch.equal(found.points[0, kept], pose[0, kept])
    moved, weights = mapped(given, pose, inner(pose))
    assert torch.isfinite(moved).all()
    assert torch.isfinite(weights).all()


def test_a_missing_hand_hangs_from_its_elbow(pose: Tensor) -> None:
    given = pose.clone()
    given[0, 7] = float("nan")
    found = complete(given, HEIGHT)
    assert torch.linalg.norm(found.points[0, 7] - pose[0, 6]) < found.torso.item()
