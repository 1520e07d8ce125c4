"""From a histogram to the threshold at which a tensor's range is cut: entropy, percentile, mean squared error, maximum.

All are searched on one histogram, exactly, in a few milliseconds: sums over any stretch of bins are differences of
prefix sums, so that a candidate costs its quantization levels and not its bins.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtforge.calibration.histogram import BINS, Histogram

__all__ = ["LEVELS", "PERCENTILE", "Fit", "entropy_divergences", "entropy_threshold", "measure_fit", "mse_threshold"]
__all__ += ["percentile_threshold"]

LEVELS = 128
"""Levels that entropy distinguishes, and the smallest number of bins that a threshold keeps."""
PERCENTILE = 99.99
"""Share of the elements that `percentile` keeps, in percent."""

_CODES = 127
_MSE_CANDIDATES = 48

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a threshold represents a histogram in int8.

    Attributes:
        clipped_fraction: Share of the elements that saturate: those in bins at or above the threshold.
        sqnr_db: Mean square over mean squared error, in dB; None where there is no signal or no error.
    """

    clipped_fraction: float
    sqnr_db: float | None


def entropy_threshold(histogram: Histogram) -> float:
    """The |x| whose clipping and quantization to 128 levels changes the distribution least.

    The candidate of the least Kullback-Leibler divergence, the largest of equal ones, as NVIDIA's reference chooses
    (`_compute_amax_entropy` in ModelOpt's `torch/quantization/calib/histogram.py`, 0.47).
    """
    counts = histogram.counts[: histogram.used]
    if len(counts) <= LEVELS:
        return histogram.peak
    divergences = entropy_divergences(counts)
    best = len(divergences) - 1 - int(np.argmin(divergences[::-1]))
    return min((best + LEVELS) * histogram.width, histogram.peak)


def entropy_divergences(counts: NDArray[np.int64]) -> Floats:
    """KL divergence in nats between a histogram cut at each candidate and its quantization to 128 levels.

    A candidate keeps the first n bins, n from 128 to len(counts). The reference distribution P is those bins with all
    that is cut off added to the last one. Q spreads the counts of each of 128 equal stretches evenly over those of its
    bins that are not empty, and knows nothing of what was cut. Bin 0 counts as much as bin 1: exact zeros, of which
    ReLU makes many, quantize without error at any threshold.

    Args:
        counts: int64 of shape (n,), n > 128.

    Returns:
        float64 of shape (n - 127,), infinite where P has a bin that Q lacks.
    """
    bins = counts.astype(np.float64)
    bins[0] = bins[1]
    total = bins.sum()
    if total == 0:
        return np.zeros(len(bins) - LEVELS + 1)
    weighted = bins * _log(bins)  # h log h
    kept = np.cumsum(bins)[LEVELS - 1 :]
    kept_weighted = np.cumsum(weighted)[LEVELS - 1 :]
    # With N elements, of which C are kept, and the sum s and the v bins that are not empty of each level:
    #   KL = sum_bins h/N log(h/N) - sum_levels s/N log(s/(v C)),
    # but for the last bin kept, whose h has the N - C others added to it in P alone.
    stretches = _Stretches(bins)
    last, others = bins[LEVELS - 1 :], total - kept
    filled = last + others
    reference = kept_weighted - weighted[LEVELS - 1 :] + filled * _log(filled)
    with np.errstate(divide="ignore", invalid="ignore"):
        density = np.where(last > 0, stretches.last_density(), 0.0)
        cross = stretches.spread() + np.where(others > 0, others * np.log(density), 0.0)
        divergence: Floats = (reference - cross) / total + np.log(kept / total)
    divergence[kept == 0] = np.inf
    return divergence


class _Stretches:
    """Sums over the stretches of bins that levels are.

    Levels of a candidate of n bins are n // 128 bins long, or one more. So all levels of all candidates together are
    no more than 17 lengths at 2048 places: each logarithm is taken once, and candidates add what they share.
    """

    def __init__(self, bins: Floats) -> None:
        self.codes = _level_codes()[: len(bins) - LEVELS + 1]
        sums = np.concatenate(([0.0], np.cumsum(bins)))
        filled = np.concatenate(([0], np.cumsum(bins > 0)))
        ends = np.minimum(np.arange(BINS) + np.arange(_LENGTHS)[:, None], len(bins))
        starts = np.minimum(np.arange(BINS), len(bins))
        self.sums = sums[ends] - sums[starts]
        self.filled = np.maximum(filled[ends] - filled[starts], 1)

    def spread(self) -> Floats:
        """For each candidate, the sum over levels of s log(s / v)."""
        terms = self.sums * (_log(self.sums) - np.log(self.filled))
        spread: Floats = terms.reshape(-1)[self.codes].sum(axis=1)
        return spread

    def last_density(self) -> Floats:
        """For each candidate, s / v of its last level."""
        code = self.codes[:, -1]
        density: Floats = self.sums.reshape(-1)[code] / self.filled.reshape(-1)[code]
        return density


_LENGTHS = -(-BINS // LEVELS) + 1


@functools.lru_cache(maxsize=1)
def _level_codes() -> NDArray[np.intp]:
    """Length * BINS + start of each level of each candidate; shape (BINS - 127, 128)."""
    candidates = np.arange(LEVELS, BINS + 1)[:, None]
    # Bin j of n belongs to level floor(128 j / n), so that level l starts at ceil(l n / 128).
    edges = -(-candidates * np.arange(LEVELS + 1) // LEVELS)
    codes: NDArray[np.intp] = (np.diff(edges, axis=1) * BINS + edges[:, :-1]).astype(np.intp)
    return codes


def _log(values: Floats) -> Floats:
    """Natural logarithms of counts, 0 for 0: what multiplies them is 0 there."""
    return np.log(np.maximum(values, 1.0))


def percentile_threshold(histogram: Histogram, percentile: float = PERCENTILE) -> float:
    """The smallest bin edge below which `percentile` percent of the elements lie."""
    below = np.cumsum(histogram.counts)
    needed = below[-1] * (percentile / 100)
    edge = int(np.searchsorted(below, needed, side="left")) + 1
    return min(edge * histogram.width, histogram.peak)


def mse_threshold(histogram: Histogram) -> float:
    """The threshold of the least mean squared error in int8, of 48 even steps, then of 16 finer ones around it."""
    used = histogram.used
    if used <= LEVELS:
        return histogram.peak
    values, counts = _centers(histogram, used)
    stride = max(1, (used - LEVELS) // _MSE_CANDIDATES)
    best = _least_error(histogram, values, counts, np.arange(used, LEVELS - 1, -stride))
    near = np.arange(min(best + stride, used), max(best - stride, LEVELS) - 1, -max(1, stride // 8))
    return min(_least_error(histogram, values, counts, near) * histogram.width, histogram.peak)


def _least_error(histogram: Histogram, values: Floats, counts: Floats, ends: NDArray[np.int64]) -> int:
    errors = _squared_errors(values, counts, np.minimum(ends * histogram.width, histogram.peak))
    return int(ends[np.argmin(errors)])


def measure_fit(histogram: Histogram, threshold: float) -> Fit:
    """Clipping and int8 SQNR of a threshold, with every element at the centre of its bin (those of bin 0 at zero)."""
    used = histogram.used
    total = histogram.count
    if total == 0:
        return Fit(0.0, None)
    edge = used if threshold >= histogram.peak else max(0, int(np.ceil(threshold / histogram.width)))
    clipped = int(histogram.counts[edge:used].sum()) / total
    if histogram.peak == 0 or threshold <= 0:
        return Fit(clipped, None)
    values, counts = _centers(histogram, used)
    error = float(_squared_errors(values, counts, np.array([threshold]))[0])
    signal = float((counts * values * values).sum())
    return Fit(clipped, 10 * float(np.log10(signal / error)) if signal > 0 and error > 0 else None)


def _centers(histogram: Histogram, used: int) -> tuple[Floats, Floats]:
    """Values and counts of the bins that are not empty."""
    values = (np.arange(used) + 0.5) * histogram.width
    values[0] = 0.0
    values[-1] = min(values[-1], histogram.peak)
    counts = histogram.counts[:used]
    filled = counts > 0
    return np.asarray(values[filled], np.float64), counts[filled].astype(np.float64)


def _squared_errors(values: Floats, counts: Floats, thresholds: Floats) -> Floats:
    """Summed squared error of int8 at each threshold; the values are sorted and not negative."""
    scales = (thresholds / _CODES)[:, None]
    codes = values / scales  # changed in place: fresh memory takes longer than the arithmetic
    np.rint(codes, out=codes)
    np.minimum(codes, _CODES, out=codes)
    codes *= scales
    codes -= values
    np.square(codes, out=codes)
    errors: Floats = codes @ counts
    return errors
