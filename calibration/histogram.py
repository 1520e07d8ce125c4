"""Histograms of |x| whose state does not depend on the order in which elements came, nor on how they were batched.

The bins of a histogram are [i, i + 1) times 2**exponent, for `BINS` values of i. The exponent is the smallest one whose
bins reach the largest |x| seen, so that it is a function of what was seen. Growing by one sums pairs of bins, which is
exact: histograms under `merge` are a commutative monoid whose neutral element is the empty one. Scaling by a power of
two and truncating are exact in float32 as well, so every element is counted in the bin that it belongs to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trtforge.calibration.count import BINS, INFINITY_BITS, MIN_EXPONENT, count_while_below
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.runner import Array

__all__ = ["BINS", "Histogram", "as_float32", "merge"]

_LOG_BINS = 11


@dataclass(slots=True, eq=False)
class Histogram:
    """Counts of |x| on a grid of powers of two; see the module.

    Attributes:
        exponent: A bin is 2**exponent wide. -149 while nothing but zeros was seen.
        counts: int64 of shape (BINS,).
        peak: The largest |x| seen, a float32; 0.0 while there was none.
    """

    exponent: int = MIN_EXPONENT
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    peak: float = 0.0

    @property
    def count(self) -> int:
        """How many elements were seen."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """The width of a bin, exact in float64."""
        return math.ldexp(1.0, self.exponent)

    @property
    def used(self) -> int:
        """How many bins reach from zero to the peak, both included: more than BINS / 2 unless the peak is subnormal."""
        return int(math.ldexp(self.peak, -self.exponent)) + 1

    def add(self, array: Array, *, where: str = "an array", start: int = 0) -> None:
        """Counts every element of a floating-point array of any shape; float64 is rounded to float32 first.

        Of a C-contiguous one the first `start` elements are left out.

        Raises:
            CalibrationError: an element is infinite or NaN (`where` says whose), or the array is not of floats.
        """
        flat = as_float32(array, where)[start:]
        while flat.size:
            done, bits, beyond = count_while_below(flat, self.exponent, self.counts)
            self.peak = max(self.peak, _float(bits))
            flat = flat[done:]
            if flat.size:  # the grid must grow; at most 266 times in a histogram's life
                self.reach(beyond, array, where=where)

    def reach(self, bits: int, array: Array, *, where: str) -> None:
        """Makes the grid hold |x| with these bits, which is in `array` and still to be added.

        Raises:
            CalibrationError: it is infinite or NaN.
        """
        if bits >= INFINITY_BITS:
            raise _not_finite(array, where)
        self._coarsen(_exponent_of(_float(bits)))

    def copy(self) -> Histogram:
        """An independent histogram with the same state."""
        return Histogram(self.exponent, self.counts.copy(), self.peak)

    def _coarsen(self, exponent: int) -> None:
        steps = exponent - self.exponent
        if steps <= 0:
            return
        coarse = np.zeros(BINS, np.int64)
        if steps >= _LOG_BINS:
            coarse[0] = self.counts.sum()
        else:
            coarse[: BINS >> steps] = self.counts.reshape(-1, 1 << steps).sum(axis=1)
        self.exponent, self.counts = exponent, coarse

    def __eq__(self, other: object) -> bool:
        """Whether the whole state is equal, to the bit."""
        if not isinstance(other, Histogram):
            return NotImplemented
        same = self.exponent == other.exponent and self.peak == other.peak
        return same and bool(np.array_equal(self.counts, other.counts))

    __hash__ = None  # type: ignore[assignment]


def merge(first: Histogram, second: Histogram) -> Histogram:
    """The histogram of everything that either of them saw; neither is changed."""
    merged, other = first.copy(), second.copy()
    exponent = max(merged.exponent, other.exponent)
    merged._coarsen(exponent)
    other._coarsen(exponent)
    merged.counts += other.counts
    merged.peak = max(merged.peak, other.peak)
    return merged


def _float(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def _exponent_of(peak: float) -> int:
    """The smallest exponent for which `peak` lies below BINS * 2**exponent."""
    return max(math.frexp(peak)[1] - _LOG_BINS, MIN_EXPONENT) if peak > 0 else MIN_EXPONENT


def as_float32(array: Array, where: str) -> NDArray[np.float32]:
    """The elements in one dimension, C-contiguous; no copy where the array is so already.

    Raises:
        CalibrationError: the array is not of floats.
    """
    if array.dtype == np.float32:
        return np.ascontiguousarray(array, np.float32).reshape(-1)
    # bfloat16 is a type of ml_dtypes, whose `kind` is "V"; all that convert to float32 exactly are welcome here.
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise CalibrationError(f"{where} holds {array.dtype.name}, not floats: it has no range to calibrate")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, and is refused as such
        return np.ascontiguousarray(array).astype(np.float32).reshape(-1)


def _not_finite(array: Array, where: str) -> CalibrationError:
    values = array.astype(np.float64)
    nan, infinite = int(np.isnan(values).sum()), int((np.abs(values) > np.finfo(np.float32).max).sum())
    return CalibrationError(
        f"{where} holds {nan} NaN and {infinite} infinite values among {array.size}",
        why="no finite scale represents them",
        fix="run the float model on this batch: either its data or its weights are broken there",
    )
