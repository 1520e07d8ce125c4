from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.validation.accuracy_interval import binomial_bounds, bootstrap_bounds, paired_bounds, share_bound


def chances(count: int, lost: float, won: float) -> np.ndarray:
    """The probability of each (lost, won) pair of counts."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    a, b = np.meshgrid(np.arange(count + 1), np.arange(count + 1), indexing="ij")
    rest = count - a - b
    ok = rest >= 0
    rest = np.maximum(rest, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        powers = [np.where(n == 0, 0.0, n * np.log(p)) for n, p in ((a, lost), (b, won), (rest, 1 - lost - won))]
    return np.where(ok, np.exp(logs[count] - logs[a] - logs[b] - logs[rest] + sum(powers)), 0.0)


def test_no_discordant_pair_proves_no_more_than_the_rule_of_three() -> None:
    bounds = paired_bounds(0, 0, 200, 0.05)
    assert bounds.upper == pytest.approx(1 - 0.05 ** (1 / 200), rel=0.01)
    assert bounds.lower == -bounds.upper


@pytest.mark.parametrize("count", [20, 60])
@pytest.mark.parametrize("drop", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("won", [0.0, 0.01, 0.1, 0.3])
def test_exact_upper_bound_misses_the_truth_at_most_5_percent_of_the_time(count: int, drop: float, won: float) -> None:
    probability = chances(count, won + drop, won)
    seen = [(a, b) for a, b in zip(*np.nonzero(probability > 1e-9), strict=True)]
    missed = sum(float(probability[a, b]) for a, b in seen if paired_bounds(int(a), int(b), count, 0.05).upper < drop)
    assert missed <= 0.05


def test_score_bound_errs_little_where_discordant_pairs_are_many() -> None:
    rng = np.random.default_rng(0)
    count, drop, won = 2000, 0.02, 0.03
    drawn = rng.multinomial(count, [won + drop, won, 1 - 2 * won - drop], size=20000)
    found = {(int(a), int(b)) for a, b, _ in drawn}
    upper = {pair: paired_bounds(*pair, count, 0.05).upper for pair in found}
    missed = np.mean([upper[(int(a), int(b))] < drop for a, b, _ in drawn])
    assert 0.04 <= missed <= 0.056


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(61, 400))
def test_bounds_hold_the_estimate_and_mirror(lost: int, won: int, count: int) -> None:
    bounds, mirrored = paired_bounds(lost, won, count, 0.05), paired_bounds(won, lost, count, 0.05)
    assert bounds.lower <= (lost - won) / count <= bounds.upper
    assert (bounds.lower, bounds.upper) == (-mirrored.upper, -mirrored.lower)
    assert paired_bounds(lost, won, count, 0.01).upper >= bounds.upper - 0.02 / count
    assert paired_bounds(lost + 1, won, count, 0.05).upper >= bounds.upper - 0.02 / count


@given(st.integers(0, 50), st.integers(1, 50))
def test_binomial_bounds_are_clopper_and_pearsons(hits: int, count: int) -> None:
    hits = min(hits, count)
    found = binomial_bounds(hits, count, 0.05)

    def at_most(k: int, share: float) -> float:
        return sum(math.comb(count, i) * share**i * (1 - share) ** (count - i) for i in range(k + 1))

    assert found.lower <= hits / count <= found.upper
    if hits < count:
        assert at_most(hits, found.upper) == pytest.approx(0.05, abs=1e-6)
    if hits > 0:
        assert 1 - at_most(hits - 1, found.lower) == pytest.approx(0.05, abs=1e-6)
    assert share_bound(count, count, 0.05) == 1


def test_bootstrap_of_a_skewed_mean_holds_its_error() -> None:
    rng = np.random.default_rng(1)
    truth, count, missed, runs = math.exp(0.125), 300, 0, 500
    for _ in range(runs):
        data = rng.lognormal(0.0, 0.5, count)
        bounds = bootstrap_bounds(
            data.mean(),
            lambda times, data=data: times @ data / count,
            count,
            0.05,
            without_each=(data.sum() - data) / (count - 1),
            resamples=400,
        )
        missed += bounds.upper < truth
    assert missed / runs <= 0.075  # 5 % and what 500 runs scatter


def test_bootstrap_sees_what_it_did_not_draw() -> None:
    differences = np.zeros(200)
    bounds = bootstrap_bounds(0.0, lambda times: times @ differences / 200, 200, 0.05, differing=0)
    assert bounds.upper == pytest.approx(0.01487, abs=1e-4)
    assert "0 did" in bounds.method
    assert bounds == bootstrap_bounds(0.0, lambda times: times @ differences / 200, 200, 0.05, differing=0)
