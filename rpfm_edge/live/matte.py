"""Alpha of a rendered person from the plain background that the pictures have; it knows colours, not people.

The background's colour is estimated from the border of the frame, so a slow drift of it does not matter. A matte is
soft where the colour is between background and person; only the largest component is kept, so that specks of noise
do not float in a room.
"""

from __future__ import annotations

import cv2
import numpy as np

NEAR, FAR = 10.0, 34.0  # distance to the background, in levels of 255, at which alpha starts and is whole
_BORDER_PX = 2
_CLOSE = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))


def background_colour(image: np.ndarray) -> np.ndarray:
    """(3,) float32: the median of the border's upper three sides (feet may touch the lower one)."""
    n = _BORDER_PX
    sides = (image[:n], image[:, :n], image[:, -n:])
    colour: np.ndarray = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)
    return colour.astype(np.float32)


def matte(image: np.ndarray) -> np.ndarray:
    """Alpha of the person in a picture with a plain background.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        (H, W) uint8: 0 background, 255 person, soft edges; holes of the background's colour inside the person are
        filled, because clothes may have it.
    """
    shifted = image.astype(np.float32) - background_colour(image)
    distance = np.sqrt(np.einsum("hwc,hwc->hw", shifted, shifted))
    alpha = np.clip((distance - NEAR) / (FAR - NEAR), 0, 1)
    core = _largest((alpha > 0.5).astype(np.uint8))
    if core is None:
        return np.zeros(image.shape[:2], np.uint8)
    filled = _filled(core)
    edge = cv2.dilate(filled, _CLOSE)
    alpha = np.where(cv2.erode(filled, _CLOSE) > 0, 1, alpha) * (edge > 0)
    whole: np.ndarray = np.rint(alpha * 255).astype(np.uint8)
    return whole


def _largest(mask: np.ndarray) -> np.ndarray | None:
    """The largest component of a mask, gaps of up to four pixels bridged first; None if there is none."""
    closed = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, _CLOSE)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(closed, connectivity=8)
    if count < 2:
        return None
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    return np.asarray(labels == largest, np.uint8)


def _filled(mask: np.ndarray) -> np.ndarray:
    """The mask without small holes: those below 1/250 of it; the gap between arm and body stays open."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(1 - mask, connectivity=4)
    limit = 0.004 * int(mask.sum())
    holes = [k for k in range(1, count) if stats[k, cv2.CC_STAT_AREA] < limit]
    return np.where(np.isin(labels, holes), 1, mask).astype(np.uint8) if holes else mask


def stacked(image: np.ndarray) -> np.ndarray:
    """(2 H, W, 3) uint8: the picture above, its matte in grey below, so that one JPEG carries both."""
    return np.concatenate([image, np.repeat(matte(image)[..., None], 3, axis=2)])
