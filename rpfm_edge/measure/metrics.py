"""How far two images, or two arrays, are apart; each metric has one formula, said at its function.

Images are pairs of uint8 (H, W, 3) RGB unless a function says otherwise. Where they come from is not known here.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike

from rpfm_edge.core.errors import ConfigError, InputError
from rpfm_edge.core.extras import import_extra
from rpfm_edge.measure.lpips import LPIPS_VARIABLE, lpips_from_environment, lpips_weights
from rpfm_edge.people.image import check_pair, check_shapes

SSIM_WINDOW_PX = 11


class Statistics(TypedDict):
    """A metric over a batch. ``p05`` and ``p95`` are measured values (no interpolation, so infinities are safe)."""

    median: float
    mean: float
    p05: float
    p95: float
    values: list[float]


Summary = dict[str, Statistics]


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, ``10 log10(255² / MSE)``; inf for equal images."""
    check_pair(a, b)
    mse = float(np.mean((a.astype(np.float64) - b) ** 2))
    return float(10 * np.log10(255**2 / mse)) if mse else float("inf")


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity as in Wang et al. 2004, 1 for equal images: Gaussian window of sigma 1.5 (11 x 11),
    population covariance, data range 255; computed per channel by scikit-image and averaged.
    """
    check_pair(a, b)
    if min(a.shape[:2]) < SSIM_WINDOW_PX:
        raise InputError(
            f"the images are {a.shape[0]} x {a.shape[1]} pixels",
            expected=f"at least {SSIM_WINDOW_PX} x {SSIM_WINDOW_PX}, the window of SSIM",
            fix="compare larger images",
        )
    similarity = import_extra("skimage.metrics", "validate").structural_similarity
    return float(
        similarity(a, b, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    )


def flip(a: np.ndarray, b: np.ndarray) -> float:
    """Mean LDR-FLIP (Andersson et al. 2020) of test image ``b`` against reference ``a``, in [0, 1], 0 for equal images.

    The difference seen when flipping between two images: contrast sensitivity, colour and edges, without a network.
    Viewed at 67 pixels per degree, the default of NVIDIA's library (flip-evaluator, BSD-3-Clause), which computes it.
    """
    check_pair(a, b)
    evaluate = import_extra("flip_evaluator", "validate").evaluate
    reference, test = (np.ascontiguousarray(image, np.float32) / 255 for image in (a, b))
    return float(evaluate(reference, test, "LDR", applyMagma=False)[1])


def sqnr_db(reference: ArrayLike, value: ArrayLike) -> float:
    """Signal-to-quantization-noise ratio in dB of float arrays, ``10 log10(Σ reference² / Σ (value - reference)²)``;
    inf for equal arrays, -inf if the reference is all zeros."""
    expected, found = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    check_shapes(expected, found)
    noise, signal = float(np.sum((found - expected) ** 2)), float(np.sum(expected**2))
    if not noise:
        return float("inf")
    return 10 * math.log10(signal / noise) if signal else float("-inf")


@dataclass(frozen=True, slots=True)
class Metric:
    """An image metric: its function, its title in tables, and which direction is better."""

    function: Callable[[np.ndarray, np.ndarray], float]
    title: str
    higher_is_better: bool


METRICS: dict[str, Metric] = {
    "psnr_db": Metric(psnr_db, "PSNR (dB)", higher_is_better=True),
    "ssim": Metric(ssim, "SSIM", higher_is_better=True),
    "flip": Metric(flip, "FLIP", higher_is_better=False),
    "lpips": Metric(lpips_from_environment, "LPIPS", higher_is_better=False),
}


def missing_metrics() -> dict[str, str]:
    """The metrics that cannot be computed here, with the reason in words; a report prints it in place of a figure."""
    missing = {}
    for name, module, package in (("ssim", "skimage", "scikit-image"), ("flip", "flip_evaluator", "flip-evaluator")):
        if importlib.util.find_spec(module) is None:
            missing[name] = f"{package} is not installed (pip install {package})"
    if lpips_weights() is None:
        missing["lpips"] = f"weights not at hand (set {LPIPS_VARIABLE})"
    return missing


def compare(
    images_a: Sequence[np.ndarray] | np.ndarray,
    images_b: Sequence[np.ndarray] | np.ndarray,
    names: Sequence[str] | None = None,
) -> Summary:
    """Metrics of ``images_b`` against the references ``images_a``, image by image.

    Args:
        images_a: uint8 (H, W, 3) RGB each, or one (N, H, W, 3) array.
        images_b: as many.
        names: keys of ``METRICS``; default: all but the ones in ``missing_metrics()``.

    Raises:
        InputError: no images, or counts, shapes or dtypes that do not fit.
        ConfigError: an unknown metric.
    """
    if len(images_a) != len(images_b) or not len(images_a):
        raise InputError(
            f"{len(images_a)} and {len(images_b)} images", expected="as many of each, at least one", fix="pair them up"
        )
    missing = missing_metrics() if names is None else {}
    names = [name for name in METRICS if name not in missing] if names is None else names
    if unknown := [name for name in names if name not in METRICS]:
        raise ConfigError(
            f"unknown metric {unknown[0]!r}", expected=f"one of {list(METRICS)}", fix="check the spelling"
        )
    return {
        name: statistics([METRICS[name].function(a, b) for a, b in zip(images_a, images_b, strict=True)])
        for name in names
    }


def statistics(values: Sequence[float]) -> Statistics:
    """Median, mean and tails of a non-empty list."""
    p05, p95 = np.percentile(values, [5, 95], method="inverted_cdf")
    return {
        "median": float(np.median(values)),
        "mean": float(np.mean(values)),
        "p05": float(p05),
        "p95": float(p95),
        "values": [float(value) for value in values],
    }


def paired_bootstrap(
    values_a: Sequence[float], values_b: Sequence[float], seed: int, rounds: int = 2000
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of ``mean(values_a - values_b)``, resampling the pairs.

    If it does not hold 0, the two differ by more than the choice of these images explains.
    """
    picks = _picks(values_a, values_b, seed, rounds)
    difference = np.asarray(values_a, np.float64) - np.asarray(values_b, np.float64)
    low, high = np.percentile(difference[picks].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def ratio_bootstrap(
    values_a: Sequence[float], values_b: Sequence[float], seed: int, rounds: int = 2000
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of ``mean(values_a) / mean(values_b)``, resampling the pairs: both vary."""
    picks = _picks(values_a, values_b, seed, rounds)
    mean_a, mean_b = (np.asarray(values, np.float64)[picks].mean(axis=1) for values in (values_a, values_b))
    low, high = np.percentile(mean_a / mean_b, [2.5, 97.5])
    return float(low), float(high)


def _picks(values_a: Sequence[float], values_b: Sequence[float], seed: int, rounds: int) -> np.ndarray:
    """(rounds, n) places of pairs drawn again; raises ``InputError`` unless there are two pairs or more, all finite."""
    if len(values_a) != len(values_b) or len(values_a) < 2:
        raise InputError(
            f"{len(values_a)} and {len(values_b)} values", expected="as many of each, at least two", fix="pair them up"
        )
    if not np.isfinite([values_a, values_b]).all():
        raise InputError(
            "a difference is not finite",
            expected="finite values",
            fix="use a metric without infinities (MSE instead of PSNR)",
        )
    return np.random.default_rng(seed).integers(0, len(values_a), (rounds, len(values_a)))
