"""TODO."""

from __future__ import annotations

import cv2
import numpy as np

from rpfm_edge.core.shipped import FOLDER
from rpfm_edge.live.matte import background_colour, matte, stacked
from rpfm_edge.people.image import load_image

RNG = np.random.default_rng(0)


def composite(background: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A figure with known, soft alpha over a plain background with noise: (picture, alpha in [0, 1])."""
    large = np.zeros((4 * 256, 4 * 176), np.uint8)
    cv2.ellipse(large, (352, 520), (120, 330), 0, 0, 360, 255, cv2.FILLED)
    cv2.circle(large, (352, 150), 80, 255, cv2.FILLED)
    cv2.line(large, (352, 400), (600, 620), 255, 60)
    alpha = cv2.resize(large, (176, 256), interpolation=cv2.INTER_AREA).astype(np.float64) / 255
    texture = RNG.integers(20, 150, (64, 44, 3)).astype(np.uint8)
    person = cv2.resize(texture, (176, 256), interpolation=cv2.INTER_NEAREST).astype(np.float64)
    picture = alpha[..., None] * person + (1 - alpha[..., None]) * np.array(background)
    return np.clip(picture + RNG.normal(0, 1, picture.shape), 0, 255).round().astype(np.uint8), alpha


def test_the_matte_agrees_with_the_alpha_of_a_composite() -> None:
    for background in ((247, 247, 247), (200, 215, 230)):
        picture, alpha = composite(background)
        found = matte(picture) / 255
        assert np.abs(found - alpha).mean() < 0.012
        assert (found[alpha == 0] == 0).mean() > 0.99
        assert (found[alpha == 1] == 1).all()


def test_specks_are_left_out_and_clothes_of_the_backgrounds_colour_stay() -> None:
    picture, alpha = composite((247, 247, 247))
    picture[20:24, 10:14] = 0  # a speck
    picture[130:134, 86:90] = 247  # a button
    found = matte(picture)
    assert not found[20:24, 10:14].any()
    assert (found[130:134, 86:90] == 255).all()
    assert alpha[130:134, 86:90].all()


def test_the_colour_is_the_borders_and_an_empty_picture_has_no_matte() -> None:
    empty = np.full((64, 48, 3), (10, 200, 30), np.uint8)
    assert background_colour(empty).tolist() == [10, 200, 30]
    assert not matte(empty).any()


def test_rendered_people_are_covered_and_their_surroundings_are_not() -> None:
    picture = load_image(FOLDER / "people/test_highres/p00900_1.jpg")
    found, far = matte(picture), np.abs(picture.astype(int) - 247).max(axis=2)
    assert (found[far > 60] > 0).mean() > 0.999
    assert not found[:, :3].any()
    assert 0.08 < (found > 127).mean() < 0.5
    both = stacked(picture)
    assert (both[:256] == picture).all()
    assert (both[256:] == found[..., None]).all()
