"""Detail: are the edges and folds of a picture those of the truth? A smear has none of them, at a good PSNR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from rpfm_edge.measure.metrics import Summary, statistics
from rpfm_edge.people.image import check_pair

# Levels of 255 by which a person differs from the background; JPEG and shading stay below.
PERSON_LEVELS = 24
# Of a square within which everything must be person: 3 pixels from the edge, which a smear has too.
WINDOW_PX = 7
NOBODY = "nobody stands out from the background"


def detail(image: np.ndarray, truth: np.ndarray) -> float:
    """Correlation of the gradients of two pictures inside the true person, in [-1, 1]: ``Σ u v / √(Σ u² Σ v²)``.

    u and v are the differences of the grey (mean of RGB) of pixels that are neighbours, down and across together, for
    ``image`` and ``truth``; no mean is taken away. Both pixels must be in ``inside_person``. 1 for the truth, whatever
    the contrast and brightness; 0 for a flat picture; nan where the truth has nothing to compare with.

    Args:
        image, truth: (H, W, 3) uint8 RGB.
    """
    check_pair(image, truth)
    inside = inside_person(truth)
    u, v = (_gradients(picture, inside) for picture in (image, truth))
    own, theirs = float(np.sum(u * u)), float(np.sum(v * v))
    if not theirs:
        return float("nan")
    return float(np.sum(u * v)) / float(np.sqrt(own * theirs)) if own else 0.0


def inside_person(truth: np.ndarray) -> np.ndarray:
    """(H, W) bool: where a picture (H, W, 3) uint8 shows its person, at least 3 pixels from the person's edge.

    A person is what differs from the background by more than 24 levels in a channel. The background has the median
    colour of the outermost pixels. Where the picture ends is no edge.
    """
    border = np.concatenate([truth[0], truth[-1], truth[1:-1, 0], truth[1:-1, -1]])
    person = (np.abs(truth - np.median(border, axis=0)) > PERSON_LEVELS).any(axis=2)
    window = np.ones((WINDOW_PX, WINDOW_PX), np.uint8)
    return np.asarray(cv2.erode(person.astype(np.uint8), window), bool)


def _gradients(picture: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(n,) int64, in thirds of a level: the differences of neighbours down and across, both of them ``inside``."""
    grey = picture.sum(axis=2, dtype=np.int64)
    down, across = (np.diff(grey, axis=axis) for axis in (0, 1))
    return np.concatenate([down[inside[1:] & inside[:-1]], across[inside[:, 1:] & inside[:, :-1]]])


def sharpness(images: np.ndarray, truths: np.ndarray) -> dict[str, Summary]:
    """``{"detail": {"detail": …}}``: the ``detail`` of each picture whose truth can be compared with.

    The truth alone decides on that, so all models are scored on the same pictures. Empty if there is none."""
    values = [detail(image, truth) for image, truth in zip(images, truths, strict=True)]
    found = [value for value in values if np.isfinite(value)]
    return {"detail": {"detail": statistics(found)}} if found else {}


def missing_detail(truths: np.ndarray) -> str | None:
    """Why detail cannot be told on any of these pictures, in words; None if it can."""
    return None if sharpness(truths, truths) else NOBODY


def count_scored(stages: Sequence[Mapping[str, Any]], pairs: int) -> str:
    """On how many of the pairs detail was scored, in words; empty if on all, or on none."""
    counts = {len(stage["detail"]["detail"]["values"]) for stage in stages if "detail" in stage}
    return f"detail was scored on {min(counts)} of {pairs} pairs" if counts and min(counts) < pairs else ""
