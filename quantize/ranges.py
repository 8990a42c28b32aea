"""The ranges of activations: a histogram of every product's inputs over the calibration samples, and how to clip it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from quantize.layers import PRODUCTS, constants
from rpfm_edge.core.errors import ArtifactError, ConfigError
from rpfm_edge.core.progress import progress
from rpfm_edge.core.signature import Feeds

Estimator = Literal["mean", "minmax", "percentile", "mse"]
PERCENTILE = 0.9999
SHIFT = 17  # of a float32's bits, what is left is exponent and six digits: 64 bins an octave
CENTRES = ((np.arange(1 << (31 - SHIFT), dtype=np.uint32) << SHIFT) + (1 << (SHIFT - 1))).view(np.float32)


@dataclass(eq=False, slots=True)
class Observed:
    """Magnitudes of one tensor: how many fell into the bin around each of ``CENTRES``, and each sample's largest."""

    counts: np.ndarray  # (bins,) int64
    extremes: list[float]

    def add(self, values: np.ndarray) -> None:
        """Count a float32 array of one sample."""
        magnitudes = np.abs(np.ascontiguousarray(values, np.float32)).ravel()
        self.counts += np.bincount(magnitudes.view(np.uint32) >> SHIFT, minlength=len(CENTRES))[: len(CENTRES)]
        self.extremes.append(float(magnitudes.max()))

    def range(self, estimator: Estimator, levels: int = 127) -> float:
        """The magnitude that is mapped to the last of ``levels``; never 0.

        "mean" and "minmax" are the mean and the largest of the samples' extremes, "percentile" leaves one value in ten
        thousand outside, "mse" has the least squared error of rounding and clipping.
        """
        if estimator == "mean":
            found = float(np.mean(self.extremes))
        elif estimator == "minmax":
            found = max(self.extremes)
        elif estimator == "percentile":
            place = np.searchsorted(np.cumsum(self.counts), PERCENTILE * self.counts.sum())
            found = min(float(CENTRES[place]), max(self.extremes))
        elif estimator == "mse":
            found = _least_error(self.counts, max(self.extremes), levels)
        else:
            raise ConfigError(
                f"unknown estimator {estimator!r}", expected=f"one of {get_args(Estimator)}", fix="check the spelling"
            )
        return found if found > 0 else 1.0  # a tensor of zeros: any scale keeps them


def observe(
    model: onnx.ModelProto, feeds: Iterable[Feeds], count: int, products: Collection[str] | None = None
) -> dict[str, Observed]:
    """``watch`` the activations that go into ``products`` (default: all)."""
    return watch(model, activations(model, products), feeds, count)


def watch(model: onnx.ModelProto, tensors: Collection[str], feeds: Iterable[Feeds], count: int) -> dict[str, Observed]:
    """Run ``model`` on ``count`` samples and look at ``tensors``.

    Raises:
        ArtifactError: a value that is not finite.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    outputs = {output.name for output in copy.graph.output}
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors if name not in outputs)
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    found = {name: Observed(np.zeros(len(CENTRES), np.int64), []) for name in tensors}
    with progress("ranges", count) as advance:
        for done, sample in enumerate(feeds, 1):
            for name, values in zip(tensors, session.run(list(tensors), dict(sample)), strict=True):
                if not np.isfinite(values).all():
                    raise ArtifactError(
                        f"{name} is not finite on sample {done}",
                        expected="finite values",
                        fix="use another student",
                    )
                found[name].add(values)
            advance(done)
    return found


def activations(model: onnx.ModelProto, products: Collection[str] | None = None) -> tuple[str, ...]:
    """Names of the tensors that are no constants and go into ``products`` (default: all), without repetition."""
    fixed = constants(model)
    names = (
        tensor
        for node in model.graph.node
        if node.op_type in PRODUCTS and (products is None or node.name in products)
        for tensor in node.input[:2]
        if tensor not in fixed
    )
    return tuple(dict.fromkeys(names))


def _least_error(counts: np.ndarray, top: float, levels: int) -> float:
    """The range with the least squared error, of 80 from ``top`` down to a hundredth of it.

    Rounding costs a twelfth of the squared step, and what is below half a step becomes 0.
    """
    used = np.flatnonzero(counts)
    values, weights = CENTRES[used].astype(np.float64), counts[used]
    best, least = top, np.inf
    for limit in top * np.geomspace(1, 0.01, 80):
        step = limit / levels
        error = np.where(values < step / 2, values**2, step**2 / 12)
        error = np.where(values > limit, (values - limit) ** 2, error)
        total = float(error @ weights)
        if total < least:
            best, least = float(limit), total
    return best
