"""Detail against closed forms: gratings that are shifted, blurred and turned over, on a person cut out of a plain."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from rpfm_edge.core.errors import InputError
from rpfm_edge.measure.detail import count_scored, detail, inside_person, missing_detail, sharpness
from rpfm_edge.people.data import sample_root
from rpfm_edge.people.held_out import draw_pairs
from rpfm_edge.people.splits import open_splits

BACKGROUND, PERIOD_PX = 230, 8
BODY = (slice(16, 80), slice(10, 50))


def dressed(pattern: np.ndarray) -> np.ndarray:
    """A person of 64 × 40 pixels with a pattern (96, 64), on a plain background."""
    picture = np.full((96, 64, 3), BACKGROUND, np.uint8)
    picture[BODY] = np.rint(pattern)[BODY][..., None]
    return picture


def stripes(shift_px: float = 0, amplitude: float = 60) -> np.ndarray:
    columns = 100 + amplitude * np.sin(2 * np.pi * (np.arange(64) + shift_px) / PERIOD_PX)
    return np.tile(columns, (96, 1))


def speckled() -> np.ndarray:
    return np.random.default_rng(0).uniform(40, 160, (96, 64))


TRUTH = dressed(stripes())


def test_the_truth_has_all_its_detail() -> None:
    for truth in (TRUTH, dressed(speckled())):
        assert detail(truth, truth) == 1
        assert detail(255 - truth, truth) == -1
        paler = (truth.astype(int) // 4 * 2 + 20).astype(np.uint8)  # half of the contrast, brighter
        assert detail(paler, truth) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("shift_px", [0, 1, 2, 3, 4])
def test_shifted_stripes_give_the_cosine_of_the_shift(shift_px: int) -> None:
    """Whole periods lie inside, or nearly: 34 columns, four periods of 8."""
    expected = math.cos(2 * math.pi * shift_px / PERIOD_PX)
    assert detail(dressed(stripes(shift_px)), TRUTH) == pytest.approx(expected, abs=0.03)


def test_stripes_of_the_other_direction_have_nothing_in_common() -> None:
    across = np.tile(100 + 60 * np.sin(2 * np.pi * np.arange(96) / PERIOD_PX)[:, None], (1, 64))
    assert detail(dressed(across), TRUTH) == 0


def test_a_mixture_gives_the_share_of_its_energy() -> None:
    """Independent patterns of equal energy: 1 / √2. Uncentred, so a slope of its own costs as well."""
    other = np.random.default_rng(1).uniform(40, 160, (96, 64))
    mixed = dressed((speckled() + other) / 2)
    assert detail(mixed, dressed(speckled())) == pytest.approx(math.sqrt(0.5), abs=0.03)
    ramp = np.tile(60 + 2.0 * np.arange(64), (96, 1))  # constant gradient: a centred correlation could not tell it
    assert detail(dressed(ramp), dressed(ramp[:, ::-1])) == -1


def test_the_more_blur_the_less_detail() -> None:
    truth = dressed(speckled())
    found = [detail(cv2.GaussianBlur(truth, (0, 0), sigma), truth) for sigma in (0.5, 1.0, 2.0, 4.0)]
    assert 1 > found[0] > found[1] > found[2] > found[3] > -0.1
    assert found[0] > 0.8
    assert found[2] < 0.5


def test_a_flat_picture_has_none() -> None:
    assert detail(np.full_like(TRUTH, 90), TRUTH) == 0
    silhouette = dressed(np.full((96, 64), 100.0))
    assert detail(silhouette, TRUTH) == 0  # the outline alone does not count


def test_only_the_person_counts_and_not_its_edge() -> None:
    """Anything may stand outside, and on the three outermost pixels of the person; the fourth counts."""
    rng = np.random.default_rng(0)
    inner = np.zeros((96, 64), bool)
    inner[19:77, 13:47] = True
    np.testing.assert_array_equal(inside_person(TRUTH), inner)
    noise = rng.integers(0, 256, TRUTH.shape, np.uint8)
    assert detail(np.where(inner[..., None], TRUTH, noise), TRUTH) == 1
    inner[19] = False
    assert detail(np.where(inner[..., None], TRUTH, noise), TRUTH) < 0.99


def test_what_differs_by_24_levels_is_background() -> None:
    for levels, alone in ((24, False), (25, True)):
        picture = np.full((40, 30, 3), BACKGROUND, np.uint8)
        picture[8:32, 8:22, 1] -= levels  # one channel is enough
        picture[0, :10] = 0  # a few outermost pixels do not change the median
        assert inside_person(picture).any() == alone
        assert inside_person(picture).sum() == (18 * 8 if alone else 0)


def test_the_end_of_the_picture_is_no_edge() -> None:
    picture = np.full((40, 30, 3), BACKGROUND, np.uint8)
    picture[20:, 8:22] = 50
    assert inside_person(picture)[39, 11:19].all()
    assert not inside_person(picture)[22].any()


def test_pictures_without_a_person_are_left_out() -> None:
    empty, flat = np.full_like(TRUTH, BACKGROUND), dressed(np.full((96, 64), 100.0))
    assert math.isnan(detail(TRUTH, empty))
    assert math.isnan(detail(TRUTH, flat))  # a person without anything on it cannot be compared with
    found = sharpness(np.stack([TRUTH, TRUTH, 255 - TRUTH, TRUTH]), np.stack([TRUTH, empty, TRUTH, flat]))
    assert found["detail"]["detail"]["values"] == [1, -1]
    assert (found["detail"]["detail"]["median"], found["detail"]["detail"]["mean"]) == (0, 0)
    assert count_scored([{}, found], 4) == "detail was scored on 2 of 4 pairs"
    assert count_scored([found], 2) == count_scored([{}], 2) == ""
    assert sharpness(np.stack([TRUTH]), np.stack([empty])) == {}
    assert missing_detail(np.stack([empty, flat])) == "nobody stands out from the background"
    assert missing_detail(np.stack([empty, TRUTH])) is None


def test_sizes_must_fit() -> None:
    with pytest.raises(InputError, match="differ"):
        detail(TRUTH[1:], TRUTH)


def test_people_of_the_sample_are_found_and_a_smear_of_them_is_told() -> None:
    """People take between 8 and 30 % of the picture; a blur of 2 pixels leaves about half of their detail."""
    truths = draw_pairs(open_splits(sample_root()).test, 8, (256, 176), (1, 1, 1)).truths
    assert all(0.08 < inside_person(truth).mean() < 0.3 for truth in truths)
    smeared = np.stack([cv2.GaussianBlur(truth, (0, 0), 2.0) for truth in truths])
    kept = sharpness(smeared, truths)["detail"]["detail"]
    assert 0.4 < kept["median"] < 0.7
    assert len(kept["values"]) == 8
    strangers = sharpness(np.roll(truths, 1, axis=0), truths)["detail"]["detail"]
    assert abs(strangers["median"]) < 0.1
