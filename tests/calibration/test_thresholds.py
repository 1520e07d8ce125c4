"""Thresholds: against a slow search that follows the definition literally, and on distributions of known answer."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.calibration.auto import choose_range
from trtforge.calibration.histogram import Histogram
from trtforge.calibration.thresholds import (
    LEVELS,
    entropy_divergences,
    entropy_threshold,
    measure_fit,
    mse_threshold,
    percentile_threshold,
)


def histogram_of(array: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.add(array.astype(np.float32))
    return histogram


def slow_divergence(counts: np.ndarray, kept: int) -> float:
    """KL(P, Q) of one candidate as NVIDIA's `_compute_amax_entropy` (ModelOpt 0.47) means it, bin by bin."""
    bins = counts.astype(np.float64)
    bins[0] = bins[1]
    levels = np.digitize(np.arange(kept), np.linspace(0, kept, LEVELS + 1)) - 1
    filled = bins[:kept] > 0
    q = np.zeros(kept)
    for level in range(LEVELS):
        members = (levels == level) & filled
        if members.any():
            q[members] = bins[:kept][members].sum() / members.sum()
    p = bins[:kept].copy()
    p[-1] += bins[kept:].sum()
    if q.sum() == 0 or np.any((q == 0) & (p > 0)):
        return float("inf")
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())


SHAPES = {
    "normal": lambda rng: rng.standard_normal(20_000),
    "laplace": lambda rng: rng.laplace(size=20_000),
    "relu6": lambda rng: np.clip(4 * rng.standard_normal(20_000), 0, 6),
    "few": lambda rng: rng.standard_t(2, 300),
    "gaps": lambda rng: np.where(rng.random(9_000) < 0.999, rng.random(9_000), 40 * rng.random(9_000)),
    "integers": lambda rng: rng.integers(0, 50, 5_000).astype(float),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_divergences_are_those_of_the_definition(shape: str) -> None:
    histogram = histogram_of(SHAPES[shape](np.random.default_rng(0)))
    counts = histogram.counts[: histogram.used]
    found = entropy_divergences(counts)
    assert found.shape == (len(counts) - LEVELS + 1,)
    candidates = [*range(LEVELS, len(counts) + 1, 97), len(counts)]
    expected = [slow_divergence(counts, kept) for kept in candidates]
    np.testing.assert_allclose(found[np.array(candidates) - LEVELS], expected, rtol=0, atol=1e-12)


def test_entropy_takes_the_last_of_the_least() -> None:
    # An even distribution is quantized without loss at every multiple of 128 bins; only keeping it all cuts nothing.
    counts = np.full(1024, 10, np.int64)
    divergences = entropy_divergences(counts)
    assert divergences[-1] == pytest.approx(0, abs=1e-12)
    histogram = Histogram(0, np.concatenate([counts, np.zeros(1024, np.int64)]), 1023.5)
    histogram = Histogram(0, np.roll(np.pad(np.full(1025, 10, np.int64), (0, 1023)), 0), 1024.0)
    assert entropy_threshold(histogram) == pytest.approx(1024, rel=0.01)


def test_entropy_cuts_outliers() -> None:
    rng = np.random.default_rng(0)
    histogram = histogram_of(np.concatenate([rng.standard_normal(100_000), [40.0]]))
    assert 3 < entropy_threshold(histogram) < 12


def test_percentile() -> None:
    histogram = histogram_of(np.arange(1, 100_001, dtype=np.float32))
    assert percentile_threshold(histogram, 99.0) == pytest.approx(99_000, abs=histogram.width)
    assert percentile_threshold(histogram, 100.0) == 100_000


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(SHAPES)))
@settings(max_examples=25, deadline=None)
def test_thresholds_lie_within_what_was_seen(seed: int, shape: str) -> None:
    histogram = histogram_of(SHAPES[shape](np.random.default_rng(seed)))
    for method in ("entropy", "percentile", "mse", "max", "auto"):
        found = choose_range(histogram, method)
        assert 0 < found.amax <= histogram.peak
        assert found.peak == histogram.peak
        assert found.count == histogram.count
        assert found.clipped_fraction is not None
        assert 0 <= found.clipped_fraction < 1
        assert found.amax < histogram.peak or found.clipped_fraction == 0


def test_fit_predicts_the_quantization_error() -> None:
    values = np.random.default_rng(0).laplace(size=200_000).astype(np.float32)
    histogram = histogram_of(values)
    threshold = mse_threshold(histogram)
    scale = threshold / 127
    error = values - np.clip(np.rint(values / scale), -127, 127) * scale
    measured = 10 * np.log10(np.square(values).sum() / np.square(error).sum())
    fit = measure_fit(histogram, threshold)
    assert fit.sqnr_db == pytest.approx(measured, abs=0.05)
    assert fit.clipped_fraction == pytest.approx((np.abs(values) > threshold).mean(), abs=1e-5)


def test_mse_is_no_worse_than_any_other_threshold() -> None:
    for shape in SHAPES.values():
        histogram = histogram_of(shape(np.random.default_rng(3)))
        best = measure_fit(histogram, mse_threshold(histogram)).sqnr_db
        assert best is not None
        for share in (0.2, 0.5, 0.8, 1.0):
            other = measure_fit(histogram, histogram.peak * share).sqnr_db
            assert other is None or best >= other - 0.05


@pytest.mark.parametrize(
    "array", [np.zeros(5), np.full(9, 2.5), np.array([7.0]), np.array([1e-44, 3e-45]), np.array([1e30, -1.0])]
)
@pytest.mark.parametrize("method", ["entropy", "percentile", "mse", "max", "auto"])
def test_degenerate_tensors_have_a_scale(array: np.ndarray, method: str) -> None:
    found = choose_range(histogram_of(array), method)
    assert np.isfinite(found.scale("int8"))
    assert found.scale("int8") >= 2.0**-126
    assert found.scale("fp8") >= 2.0**-126


def test_auto_keeps_saturating_activations_whole() -> None:
    rng = np.random.default_rng(0)
    saturated = choose_range(histogram_of(np.clip(2 + 2 * rng.standard_normal(50_000), 0, 6)))
    assert (saturated.method, saturated.amax) == ("max", 6.0)
    tail = choose_range(histogram_of(np.concatenate([rng.standard_normal(100_000), [60.0]])))
    assert tail.method != "max"
    assert tail.amax < 45
    assert "dB" in tail.reason


def test_search_takes_milliseconds() -> None:
    histogram = histogram_of(np.random.default_rng(0).laplace(size=100_000))
    entropy_threshold(histogram)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        entropy_threshold(histogram)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01  # 1 to 2 ms; the benchmark holds it to 3, this keeps it from the reference's 1.9 s
