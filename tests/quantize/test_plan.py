"""The order of units: against every subset, and how times are divided among them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import onnx
import pytest

from quantize.layers import plan
from quantize.order import default_units, divided_by_profile, divided_by_work, grid, ordered
from quantize.sensitivity import Effect
from quantize.units import Unit, chosen, units
from rpfm_edge.core.artifact import Artifact


def test_every_beginning_saves_the_most_for_its_error() -> None:
    """No subset with at most the error of a beginning saves more: checked against all of them."""
    rng = np.random.default_rng(3)
    effects = [Effect(f"u{k}", float(mse), ()) for k, mse in enumerate(rng.uniform(0.1, 3, 9))]
    saved = {effect.name: float(s) for effect, s in zip(effects, rng.uniform(0.1, 2, 9), strict=True)}
    mse, order = {effect.name: effect.mse for effect in effects}, ordered(effects, saved)
    subsets = [subset for size in range(10) for subset in combinations(saved, size)]
    for count in range(1, 10):
        error, gain = (sum(table[name] for name in order[:count]) for table in (mse, saved))
        best = max(sum(saved[n] for n in s) for s in subsets if sum(mse[n] for n in s) <= error + 1e-9)
        assert gain == pytest.approx(best)


def test_what_saves_nothing_comes_last_with_the_smallest_error_first() -> None:
    effects = [Effect("slow", 0.1, ()), Effect("bad", 5.0, ()), Effect("good", 1.0, ()), Effect("idle", 0.05, ())]
    assert ordered(effects, {"good": 1.0, "bad": 1.0, "slow": -0.2}) == ["good", "bad", "idle", "slow"]


def test_kernels_count_for_the_units_that_they_compute() -> None:
    found = (Unit("a", ("net/x", "net/y")), Unit("b", ("net/z",)))
    kernels = [
        (("net/x",), 1.0),
        (("net/y/weight/dequantize", "net/y"), 2.0),
        (("net/x", "net/z"), 4.0),  # fused from two units
        (("net/z/input0/quantize",), 0.5),
        (("other",), 9.0),
        ((), 9.0),
    ]
    assert divided_by_profile(found, kernels) == {"a": 5.0, "b": 2.5}


def test_work_divides_all_of_the_time(tiny_graph: Artifact) -> None:
    model = onnx.load(tiny_graph.file("frame.onnx"))
    shares = divided_by_work(model, units(model), 2.0)
    assert sum(shares.values()) == pytest.approx(2.0)
    assert min(shares.values()) > 0


@pytest.mark.parametrize("name", ["prepare", "frame"])
def test_default_units_are_the_layers_of_the_usual_plan(tiny_graph: Artifact, name: str) -> None:
    model = onnx.load(tiny_graph.file(f"{name}.onnx"))
    assert chosen(units(model), default_units(model)) == set(plan(model).quantized)


def test_a_grid_ends_with_all_units() -> None:
    assert grid(58) == [7, 14, 22, 29, 36, 44, 51, 58]
    assert grid(3) == [1, 2, 3]
    assert grid(0) == []
