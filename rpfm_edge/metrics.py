"""How far two images, or two arrays, are apart; each metric has one formula, said at its function.

Images are pairs of uint8 (H, W, 3) RGB unless a function says otherwise. Where they come from is not known here.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from rpfm_edge.errors import ArtifactError, BackendError, ConfigError, InputError
from rpfm_edge.image import check_image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LPIPS_VARIABLE = "RPFM_EDGE_LPIPS"
SSIM_WINDOW_PX = 11


class Statistics(TypedDict):
    """A metric over a batch. ``p05`` and ``p95`` are measured values (no interpolation, so infinities are safe)."""

    median: float
    mean: float
    p05: float
    p95: float
    values: list[float]


Summary = dict[str, Statistics]


def import_extra(module: str, extra: str) -> Any:
    """Import an optional library; raises ``BackendError`` naming the pip extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_extra((error.name or module).partition(".")[0], extra, f" ({error})") from None


def missing_extra(library: str, extra: str, why: str = "") -> BackendError:
    """The refusal of what needs an optional library that is not here."""
    return BackendError(
        f"{library} is not installed{why}", expected=f"the extra {extra}", fix=f"run: pip install 'rpfm-edge[{extra}]'"
    )


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
    _check_shapes(expected, found)
    noise, signal = float(np.sum((found - expected) ** 2)), float(np.sum(expected**2))
    if not noise:
        return float("inf")
    return 10 * math.log10(signal / noise) if signal else float("-inf")


def check_pair(a: np.ndarray, b: np.ndarray) -> None:
    """Raise ``InputError`` unless both are uint8 (H, W, 3) images of one size."""
    check_image(a)
    check_image(b)
    _check_shapes(a, b)


def _check_shapes(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise InputError(
            f"shapes {list(a.shape)} and {list(b.shape)} differ",
            expected="the same shape",
            fix="compare like with like",
        )


# LPIPS (Zhang et al. 2018), version 0.1 on AlexNet, in numpy: a device needs no torch, and no weights are downloaded.
# (stride, padding) per convolution; a 3 x 3 max pool of stride 2 stands before the second and the third.
_ALEXNET = (("slice1.0", 4, 2), ("slice2.3", 1, 2), ("slice3.6", 1, 1), ("slice4.8", 1, 1), ("slice5.10", 1, 1))
_LPIPS_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_LPIPS_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
_LPIPS_NAMES = tuple(
    [f"net.{conv}.{part}" for conv, _, _ in _ALEXNET for part in ("weight", "bias")]
    + [f"lin{k}.model.1.weight" for k in range(len(_ALEXNET))]
)


def lpips_weights() -> Path | None:
    """The file that the variable RPFM_EDGE_LPIPS names, None if it is not set; ``ConfigError`` if it is no file.

    It is the state dict of ``lpips.LPIPS(net="alex")`` as safetensors. Where torchvision and lpips are installed:
    ``safetensors.torch.save_file({k: v.clone() for k, v in lpips.LPIPS(net="alex").state_dict().items()}, path)``
    """
    name = os.environ.get(LPIPS_VARIABLE)
    if not name:
        return None
    if not Path(name).is_file():
        raise ConfigError(
            f"{LPIPS_VARIABLE} names {name}, which is no file",
            expected="a safetensors file with the weights of lpips.LPIPS(net='alex')",
            fix="correct or unset the variable",
        )
    return Path(name)


def lpips_distance(a: np.ndarray, b: np.ndarray, weights: Path) -> float:
    """LPIPS 0.1 with AlexNet (``weights``: see ``lpips_weights``), 0 for equal images; at least 32 x 32 pixels."""
    check_pair(a, b)
    if min(a.shape[:2]) < 32:
        raise InputError(
            f"the images are {a.shape[0]} x {a.shape[1]} pixels", expected="at least 32 x 32", fix="enlarge them"
        )
    parameters = _load_lpips(weights, weights.stat().st_mtime_ns)
    total = 0.0
    for layer, (x, y) in enumerate(zip(_alexnet(a, parameters), _alexnet(b, parameters), strict=True)):
        x, y = (f / (np.sqrt(np.sum(f**2, axis=0, keepdims=True)) + 1e-10) for f in (x, y))
        linear = parameters[f"lin{layer}.model.1.weight"].reshape(-1)
        total += float(np.mean(np.tensordot(linear, (x - y) ** 2, 1)))
    return total


@lru_cache(maxsize=2)
def _load_lpips(path: Path, _modified: int) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found: dict[str, np.ndarray] = load_file(path)
    except SafetensorError as error:
        raise ArtifactError(
            f"{path} cannot be read ({error})", expected="a safetensors file", fix="export it again"
        ) from None
    if missing := [name for name in _LPIPS_NAMES if name not in found]:
        raise ArtifactError(
            f"{path} has no {missing[0]}", expected="the state dict of lpips.LPIPS(net='alex')", fix="export it again"
        )
    return {name: found[name].astype(np.float32) for name in _LPIPS_NAMES}


def _alexnet(image: np.ndarray, parameters: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The five feature maps (C, h, w) after each ReLU of an image, scaled as LPIPS does."""
    scaled = (image.astype(np.float32) / 127.5 - 1 - _LPIPS_SHIFT) / _LPIPS_SCALE
    x, features = scaled.transpose(2, 0, 1), []
    for index, (name, stride, padding) in enumerate(_ALEXNET):
        if index in (1, 2):
            x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((3, 4))
        kernel, bias = parameters[f"net.{name}.weight"], parameters[f"net.{name}.bias"]
        padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[2:], (1, 2))[:, ::stride, ::stride]
        x = np.maximum(np.tensordot(kernel, windows, ((1, 2, 3), (0, 3, 4))) + bias[:, None, None], 0)
        features.append(x)
    return features


@dataclass(frozen=True, slots=True)
class Metric:
    """An image metric: its function, its title in tables, and which direction is better."""

    function: Callable[[np.ndarray, np.ndarray], float]
    title: str
    higher_is_better: bool


def _lpips_from_environment(a: np.ndarray, b: np.ndarray) -> float:
    weights = lpips_weights()
    if weights is None:
        raise ConfigError(
            "LPIPS has no weights",
            expected=f"{LPIPS_VARIABLE} to name a safetensors file",
            fix="set it or leave LPIPS out",
        )
    return lpips_distance(a, b, weights)


METRICS: dict[str, Metric] = {
    "psnr_db": Metric(psnr_db, "PSNR (dB)", higher_is_better=True),
    "ssim": Metric(ssim, "SSIM", higher_is_better=True),
    "flip": Metric(flip, "FLIP", higher_is_better=False),
    "lpips": Metric(_lpips_from_environment, "LPIPS", higher_is_better=False),
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


@dataclass(frozen=True, slots=True)
class Budget:
    """How much drift is accepted: limits on the median over the images. None leaves a metric free.

    ``pck`` and ``flicker`` are limited in their mean: most pictures have all joints right, so a median is soon 1.
    """

    psnr_db_min: float | None = None
    ssim_min: float | None = None
    flip_max: float | None = None
    lpips_max: float | None = None
    detail_min: float | None = None
    pck_min: float | None = None
    flicker_max: float | None = None

    @classmethod
    def load(cls, path: Path) -> Budget:
        """Read the table ``[drift]`` of a TOML file (other tables are not looked at).

        Raises:
            ConfigError: no such file, no TOML, no such table, an unknown key, or a limit that is no number.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8")).get("drift")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error})", expected="a TOML file", fix="correct it") from None
        if not isinstance(table, dict):
            raise ConfigError(f"{path} has no table [drift]", expected="one, with limits", fix="add it")
        return cls.from_dict(table, f"{path} [drift]")

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], origin: str = "the budget") -> Budget:
        """The limits as a mapping; ``origin`` is named in errors, which are those of ``load``."""
        known = [field.name for field in fields(cls)]
        for key, value in table.items():
            if key not in known:
                raise ConfigError(f"{origin} has {key!r}", expected=f"one of {known}", fix="check the spelling")
            if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
                raise ConfigError(f"{origin} sets {key} = {value!r}", expected="a finite number", fix="correct it")
        return cls(**table)

    def check(self, summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """The violations, each naming metric, measured value and limit; empty when all limits are met.

        A limit on a metric that was not measured, or that came out as nan, is a violation.
        """
        violations = []
        for field in fields(self):
            limit, (name, _, side) = getattr(self, field.name), field.name.rpartition("_")
            if limit is None:
                continue
            if name not in summary:
                violations.append(f"{name} was not measured, the limit is {limit:g} ({field.name})")
                continue
            average = "mean" if name in ("pck", "flicker") else "median"
            value = summary[name][average]
            if not (value >= limit if side == "min" else value <= limit):
                words = "below" if side == "min" else "above"
                violations.append(f"{name} {average} {value:.4g} is {words} the limit {limit:g} ({field.name})")
        return violations


def require_distances(budget: Budget, origin: str = "a budget") -> None:
    """Raise ``ConfigError`` for a limit on something else than the distance of two pictures, as it can be measured
    here."""
    limits, missing = {key: value for key, value in asdict(budget).items() if value is not None}, missing_metrics()
    for limit in limits:
        metric = limit.rpartition("_")[0]
        if metric in ("detail", "flicker", "pck"):
            raise ConfigError(
                f"{origin} with {limit}",
                expected="limits on the distance to the float graph",
                fix="validate the bundle",
            )
        if metric in missing:
            raise ConfigError(
                f"{origin} with {limit}, which cannot be measured here", expected="other limits", fix=missing[metric]
            )
