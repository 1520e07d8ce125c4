"""How errors are distributed: counts of |error| by powers of two, and errors by the size of what they are errors of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

import numpy as np

from trtforge.runtime.runner import Array

__all__ = ["Magnitude", "count_exponents", "errors_by_magnitude"]

_BLOCK = 1 << 16
_LOWEST = -64
"""Errors below 2^-64 are counted there: no format in use resolves them."""


@dataclass(frozen=True, slots=True)
class Magnitude:
    """Errors of the values r with 2^(exponent-1) <= |r| < 2^exponent; zeros count at the lowest exponent, -64.

    Attributes:
        exponent: See above.
        count: Places where both sides are finite.
        rms: Root of the mean squared error there.
        greatest: Greatest |error| there.
    """

    exponent: int
    count: int
    rms: float
    greatest: float

    def to_json(self) -> list[float]:
        """All fields, in order."""
        return list(astuple(self))


def errors_by_magnitude(pairs: Iterable[tuple[Array, Array]]) -> tuple[Magnitude, ...]:
    """Errors against the size of the reference's values, by powers of two, ascending.

    Rounding to a float type leaves an error that grows with the value (a slope of 1), rounding to integer steps one
    that does not (a slope of 0), and clipping one that starts at the end of the range.

    Args:
        pairs: Reference and candidate of each sample, of one shape. NaN and Inf on either side are not counted.
    """
    offset = -_LOWEST
    counts = np.zeros(2 * offset + 2, np.int64)
    squares, greatest = np.zeros(len(counts)), np.zeros(len(counts))
    for reference, candidate in pairs:
        ref, cand = reference.reshape(-1), candidate.reshape(-1)
        for start in range(0, ref.size, _BLOCK):
            value = ref[start : start + _BLOCK].astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):
                error = np.abs(cand[start : start + _BLOCK].astype(np.float64) - value)
            finite = np.isfinite(error)
            value, error = value[finite], error[finite]
            exponents = np.where(value == 0, _LOWEST, np.frexp(value)[1])
            places = np.clip(exponents, _LOWEST, -_LOWEST) + offset
            counts += np.bincount(places, minlength=len(counts))
            squares += np.bincount(places, weights=error**2, minlength=len(counts))
            np.maximum.at(greatest, places, error)
    return tuple(
        Magnitude(int(place) - offset, int(counts[place]), float(np.sqrt(squares[place] / counts[place])),
                  float(greatest[place]))
        for place in np.flatnonzero(counts)
    )  # fmt: skip


def count_exponents(pairs: Iterable[tuple[Array, Array]]) -> tuple[tuple[int, int], ...]:
    """How many values err by 2^(e-1) or more and less than 2^e, for each e that occurs, ascending.

    Rounding makes a hill a few powers of two wide; a second hill far to its right is another kind of error.

    Args:
        pairs: Reference and candidate of each sample, of one shape. Equal values and NaN or Inf are not counted.
    """
    counts: dict[int, int] = {}
    for reference, candidate in pairs:
        ref, cand = reference.reshape(-1), candidate.reshape(-1)
        for start in range(0, ref.size, _BLOCK):
            with np.errstate(invalid="ignore", over="ignore"):
                error = cand[start : start + _BLOCK].astype(np.float64) - ref[start : start + _BLOCK].astype(np.float64)
            error = error[np.isfinite(error) & (error != 0)]
            if not error.size:
                continue
            exponents = np.maximum(np.frexp(error)[1], _LOWEST)
            low = int(exponents.min())
            for offset, count in enumerate(np.bincount(exponents - low).tolist()):
                if count:
                    counts[low + offset] = counts.get(low + offset, 0) + count
    return tuple(sorted(counts.items()))
