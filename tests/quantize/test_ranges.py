"""Ranges: each estimator against numpy on the values themselves."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from quantize import calibrate
from quantize.ranges import CENTRES, PERCENTILE, Observed, activations, observe
from rpfm_edge.core.artifact import Artifact
from rpfm_edge.core.errors import ArtifactError, ConfigError

BIN = 1 / 64  # of an octave: how far a bin's centre is from what is in it, at most


def observed(samples: list[np.ndarray]) -> Observed:
    found = Observed(np.zeros(len(CENTRES), np.int64), [])
    for sample in samples:
        found.add(sample)
    return found


@pytest.fixture(scope="module")
def values() -> list[np.ndarray]:
    """Normal values, and a few that are far out."""
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal(50_000).astype(np.float32) for _ in range(4)]
    drawn[2][:5] = [-30, 25, 20, -18, 12]
    return drawn


def test_extremes_and_percentile_are_those_of_numpy(values: list[np.ndarray]) -> None:
    found, largest = observed(values), [np.abs(sample).max() for sample in values]
    assert found.range("mean") == pytest.approx(np.mean(largest), rel=1e-6)
    assert found.range("minmax") == 30
    exact = np.quantile(np.abs(np.concatenate(values)), PERCENTILE)
    assert found.range("percentile") == pytest.approx(exact, rel=BIN)


@pytest.mark.parametrize("levels", [127, 7])
def test_the_least_error_is_found(values: list[np.ndarray], levels: int) -> None:
    joined = np.concatenate(values)

    def error(limit: float) -> float:
        step = limit / levels
        return float(np.mean((np.clip(np.round(joined / step), -levels, levels) * step - joined) ** 2))

    found = error(observed(values).range("mse", levels))
    assert found <= 1.03 * min(error(limit) for limit in np.geomspace(0.3, 30, 200))
    assert found < 0.9 * error(30)


def test_a_tensor_of_zeros_has_a_range() -> None:
    found = observed([np.zeros(10, np.float32)])
    assert {found.range(estimator) for estimator in ("mean", "minmax", "percentile", "mse")} == {1.0}


def test_values_that_are_not_finite_are_named(tiny_graph: Artifact, samples: Path) -> None:
    model = onnx.load(tiny_graph.file("frame.onnx"))
    feeds = dict(next(iter(calibrate.load(samples).feeds("frame"))))
    feeds["noise"] = np.full_like(feeds["noise"], np.nan)
    with pytest.raises(ArtifactError, match="is not finite on sample 1"):
        observe(model, [feeds], 1)


def test_an_unknown_estimator_is_named(values: list[np.ndarray]) -> None:
    with pytest.raises(ConfigError, match="'entropy'"):
        observed(values).range("entropy")  # type: ignore[arg-type]


def test_the_inputs_of_all_products_are_observed(tiny_graph: Artifact, samples: Path) -> None:
    model = onnx.load(tiny_graph.file("frame.onnx"))
    feeds = list(islice(calibrate.load(samples).feeds("frame"), 3))
    found = observe(model, feeds, len(feeds))
    assert set(found) == set(activations(model))
    name = next(node.input[0] for node in model.graph.node if node.op_type == "Gemm")
    model.graph.output.append(helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    largest = [np.abs(session.run([name], dict(one))[0]).max() for one in feeds]
    assert found[name].extremes == pytest.approx(largest, rel=1e-5)
