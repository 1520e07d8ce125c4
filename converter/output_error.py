"""The error of a model's outputs as one vector, so that errors of several runs can be compared value by value."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from trtforge.runtime.runner import Tensors
from trtforge.validation.metrics import Sums, add_sums, is_float, sum_errors

__all__ = ["relative_error"]

_VALUES = 1 << 18
"""All of 262 samples with 1,000 classes; 2 MB for each error."""


def relative_error(
    wanted: Mapping[str, Tensors], found: Mapping[str, Tensors], *, values: int = _VALUES
) -> NDArray[np.float64] | None:
    """The float outputs' error values, each output's over its own norm; so the vector's power is relative too.

    Args:
        wanted: Outputs by sample and name.
        found: The same samples and names.
        values: How many to keep at most. Where there are more, those that share a place are added with random signs,
            always the same, which keeps inner products of two errors in the mean over signs (Charikar, Chen and
            Farach-Colton, "Finding frequent items in data streams", ICALP 2002).

    Returns:
        Shape (n,); 0 where either side is not finite. None where NaN or Inf came in.
    """
    outputs = []
    for name, first in next(iter(wanted.values())).items():
        if not is_float(first):
            continue
        pairs = [(tensors[name], found[sample][name]) for sample, tensors in wanted.items()]
        sums = Sums()
        for reference, candidate in pairs:
            sums = add_sums(sums, sum_errors(reference, candidate))
        if sums.candidate_nonfinite > sums.reference_nonfinite:
            return None
        if sums.reference_sq > 0:
            outputs.append((pairs, math.sqrt(sums.reference_sq)))
    error = np.zeros(min(sum(reference.size for pairs, _ in outputs for reference, _ in pairs), values))
    signs, place = np.random.default_rng(0), 0
    for pairs, norm in outputs:
        for reference, candidate in pairs:
            start = 0
            while start < reference.size:
                size = min(reference.size - start, error.size - place)
                before, after = (a.ravel()[start : start + size].astype(np.float64) for a in (reference, candidate))
                finite = np.isfinite(before) & np.isfinite(after)
                difference = np.subtract(after, before, out=np.zeros(size), where=finite)
                error[place : place + size] += difference / norm * signs.choice((-1.0, 1.0), size)
                start, place = start + size, (place + size) % error.size
    return error
