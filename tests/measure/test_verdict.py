"""Verdicts on series whose true slowdown is known: false alarms, power, and what cannot be told."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rpfm_edge.core.errors import ConfigError
from rpfm_edge.measure.verdict import (
    EXIT_CODES,
    Judgement,
    check_limit,
    judge_baseline,
    judge_pairs,
    parse_share,
    resampled_medians,
    worst,
)

ROUNDS, RUNS, LIMIT = 100, 100, 0.05


def machine(rng: np.random.Generator, rounds: int = ROUNDS, drift: float = 0.5) -> np.ndarray:
    """The time of a unit of work in each round: it drifts up to ``drift`` within the run."""
    return 0.01 * (1 + drift * np.sin(np.linspace(0, rng.uniform(1, 6), rounds) + rng.uniform(0, 6)) ** 2)


def frames(speed: np.ndarray, rng: np.random.Generator, spikes: float = 0.1) -> np.ndarray:
    """Times of a frame: 2 % of noise, and now and then a neighbour doubles or triples one."""
    times = speed * np.exp(0.02 * rng.standard_normal(speed.size))
    return np.where(rng.random(speed.size) < spikes, times * rng.uniform(1.5, 3, speed.size), times)


def pairs(seed: int, slowdown: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    speed = machine(rng)
    return frames(speed, rng), (1 + slowdown) * frames(speed, rng)


def verdicts(slowdown: float) -> list[str]:
    return [judge_pairs(*pairs(seed, slowdown), LIMIT).verdict for seed in range(RUNS)]


def test_an_unchanged_frame_on_a_drifting_machine_passes() -> None:
    found = verdicts(0.0)
    assert found.count("regression") == 0
    assert found.count("pass") >= 98


@pytest.mark.parametrize("slowdown", [0.1, 0.2])
def test_a_slowdown_on_a_drifting_machine_is_caught(slowdown: float) -> None:
    found = verdicts(slowdown)
    assert found.count("pass") == 0
    assert found.count("regression") >= 95


def test_a_slowdown_as_large_as_allowed_is_a_coin_toss() -> None:
    assert 25 <= verdicts(LIMIT).count("regression") <= 75


def test_a_faster_frame_passes() -> None:
    judged = judge_pairs(*pairs(0, -0.3), LIMIT)
    assert judged.verdict == "pass"
    assert judged.low < -0.3 < judged.high < 0


@pytest.mark.parametrize("slowdown", [0.0, 0.1])
def test_the_interval_holds_the_truth_19_times_in_20(slowdown: float) -> None:
    judged = [judge_pairs(*pairs(seed, slowdown), LIMIT) for seed in range(RUNS)]
    held = sum(one.low <= slowdown <= one.high for one in judged)
    assert stats.binomtest(held, RUNS, 0.95).pvalue > 0.001


def autocorrelated(rng: np.random.Generator, count: int, phi: float) -> np.ndarray:
    noise, values = rng.standard_normal(count), np.empty(count)
    values[0] = noise[0] / np.sqrt(1 - phi**2)
    for k in range(1, count):
        values[k] = phi * values[k - 1] + noise[k]
    return values


def test_resampling_in_blocks_knows_the_spread_of_a_median_of_correlated_values() -> None:
    rng = np.random.default_rng(0)
    series = [autocorrelated(rng, 400, 0.7) for _ in range(200)]
    true = np.std([np.median(one) for one in series])
    blocks = np.mean([resampled_medians(one, 0).std() for one in series[:20]])
    single = stats.bootstrap((series[0],), np.median, n_resamples=500, vectorized=True, rng=0).standard_error
    assert 0.75 * true < blocks < 1.15 * true
    assert single < 0.6 * true  # what it would be without blocks


def test_resampling_of_independent_values_agrees_with_scipy() -> None:
    series = np.random.default_rng(1).standard_normal(400)
    theirs = stats.bootstrap((series,), np.median, n_resamples=2000, vectorized=True, rng=0).standard_error
    assert resampled_medians(series, 0).std() == pytest.approx(theirs, rel=0.35)
    np.testing.assert_array_equal(resampled_medians(series, 0), resampled_medians(series, 0))


def test_a_ratio_that_changes_in_the_middle_is_unstable() -> None:
    old, new = pairs(0, 0.0)
    new[ROUNDS // 2 :] *= 1.2
    judged = judge_pairs(old, new, LIMIT)
    assert judged.verdict == "unstable"
    assert "did not settle" in judged.reasons[0]


def test_noise_that_hides_the_limit_is_unstable() -> None:
    rng = np.random.default_rng(0)
    old, new = (np.exp(0.2 * rng.standard_normal(ROUNDS)) for _ in range(2))
    judged = judge_pairs(old, 1.05 * new, LIMIT)
    assert judged.verdict == "unstable"
    assert "too wide to tell 5.0%" in judged.reasons[-1]


def test_throttling_is_unstable_whatever_the_times_are() -> None:
    assert judge_pairs(*pairs(0, 0.0), LIMIT, ["hot"]) == Judgement(
        "unstable",
        *(getattr(judge_pairs(*pairs(0, 0.0), LIMIT), name) for name in ("slowdown", "low", "high")),
        ("hot",),
    )


@pytest.mark.parametrize(("slowdown", "verdict"), [(0.0, "pass"), (0.1, "regression"), (0.2, "regression")])
def test_against_stored_times_of_a_steady_machine(slowdown: float, verdict: str) -> None:
    found = []
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        old, new = (frames(machine(rng, drift=0.0), rng) for _ in range(2))
        found.append(judge_baseline(old, (1 + slowdown) * new, LIMIT).verdict)
    assert found.count(verdict) >= 98
    assert {"pass": 0, "regression": 1}[verdict] == EXIT_CODES[verdict]


def test_against_stored_times_a_machine_that_drifts_is_unstable() -> None:
    rng = np.random.default_rng(0)
    old, new = frames(machine(rng, drift=0.0), rng), frames(np.linspace(0.01, 0.015, ROUNDS), rng)
    judged = judge_baseline(old, new, LIMIT)
    assert judged.verdict == "unstable"
    assert "did not settle" in judged.reasons[0]


def test_no_rounds() -> None:
    with pytest.raises(ConfigError, match="no times were measured"):
        judge_pairs([], [], LIMIT)


def test_few_rounds_are_unstable() -> None:
    assert judge_pairs([1.0] * 9, [1.0] * 9, LIMIT).verdict == "unstable"
    assert judge_pairs([1.0] * 10, [1.0] * 10, LIMIT).verdict == "pass"


def test_the_gravest_verdict_counts() -> None:
    assert worst(["pass", "unstable"]) == "unstable"
    assert worst(["no baseline", "unstable", "pass"]) == "no baseline"
    assert worst(["no baseline", "regression"]) == "regression"
    assert worst(["regression", "error", "pass"]) == "error"
    assert worst(["pass", "pass"]) == "pass"
    assert sorted(EXIT_CODES.values()) == [0, 1, 2, 3, 4]


def test_shares() -> None:
    assert parse_share("5%") == parse_share("0.05") == 0.05
    assert parse_share("12.5%") == 0.125


@pytest.mark.parametrize("text", ["5", "0", "-1%", "100%", "many", "nan", "%", ""])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(ConfigError, match=r"as the limit.*such as 5% or 0\.05"):
        parse_share(text)
    with pytest.raises(ConfigError, match="a slowdown of 0 as the limit"):
        check_limit(0)
