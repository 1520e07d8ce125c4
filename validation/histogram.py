"""How errors are distributed: counts of |error| by powers of two, which add up over blocks and samples."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from trtforge.runtime.runner import Array

__all__ = ["count_exponents"]

_BLOCK = 1 << 16
_LOWEST = -64
"""Errors below 2^-64 are counted there: no format in use resolves them."""


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
