"""Rounding of weights by what it does to a layer's output, not by what it does to each weight.

Of a layer with weights w and inputs x, rounding changes the output by e.x, e being the rounding errors. Its variance is
e C e', C the covariance of the inputs: errors of inputs that go together can cancel, and where inputs never vary errors
are free. (The change's mean is no concern here: it goes into the bias, `bias`.) Columns are rounded one after the
other, and what each leaves is compensated in the columns still to come, as optimal brain surgeon does for a pruned
weight: the error of column i over the i-th diagonal element of the Cholesky factor U of C^-1 = U'U, times the i-th row
of U (Frantar et al., "GPTQ", arXiv:2210.17323, equations 2 and 3 and section 3.3; the same algorithm, over the input's
second moments, as "OBQ", arXiv:2208.11580). Columns whose inputs vary most come first, while there are others to take
up their error ("act-order" in GPTQ's code).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["output_noise", "round_weights"]

_DAMPING = 0.01
"""Share of the mean variance added to every input's, as GPTQ does: data seen in calibration is not all there is."""
_BLOCK = 64
"""Columns whose effect on all later ones is taken in one product ("lazy batch updates")."""
_CODE = 127

Floats = NDArray[np.float64]


def round_weights(weights: Floats, scales: Floats, covariance: Floats) -> NDArray[np.int8]:
    """Codes whose output is nearest to that of the weights.

    Args:
        weights: Shape (G, O, K): G groups of O outputs over K inputs.
        scales: Shape (G, O): one scale an output.
        covariance: Shape (G, K, K), symmetric and positive semidefinite, in any unit.

    Returns:
        int8 of shape (G, O, K), in -127...127. Where no input varies, each weight's nearest code.
    """
    variance = np.diagonal(covariance, axis1=1, axis2=2)
    order = np.argsort(-variance, axis=1, kind="stable")
    left = np.take_along_axis(weights / scales[:, :, None], order[:, None, :], axis=2)
    factor = _factor(covariance, order)
    inputs = weights.shape[2]
    codes = np.empty_like(left)
    errors = np.empty_like(left)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        for i in range(start, end):
            codes[:, :, i] = np.clip(np.rint(left[:, :, i]), -_CODE, _CODE)
            errors[:, :, i] = (left[:, :, i] - codes[:, :, i]) / factor[:, None, i, i]
            left[:, :, i + 1 : end] -= errors[:, :, i, None] * factor[:, i, None, i + 1 : end]
        left[:, :, end:] -= errors[:, :, start:end] @ factor[:, start:end, end:]
    back = np.argsort(order, axis=1, kind="stable")
    return np.take_along_axis(codes, back[:, None, :], axis=2).astype(np.int8)


def output_noise(errors: Floats, covariance: Floats) -> float:
    """The variance of the output's error, summed over outputs: `errors` (G, O, K), `covariance` (G, K, K)."""
    return float(np.sum((errors @ covariance) * errors))


def _factor(covariance: Floats, order: NDArray[np.intp]) -> Floats:
    """Upper triangular U with U'U the inverse of the damped covariance, its inputs in `order`."""
    permuted = np.take_along_axis(np.take_along_axis(covariance, order[:, :, None], 1), order[:, None, :], 2)
    inputs = permuted.shape[1]
    mean = np.trace(permuted, axis1=1, axis2=2) / inputs
    damping = np.where(mean > 0, _DAMPING * mean, 1.0)
    inverse = np.linalg.inv(permuted + damping[:, None, None] * np.eye(inputs))
    # The inverse of a symmetric matrix comes out symmetric but for rounding; Cholesky reads one half alone.
    lower = np.linalg.cholesky(inverse)
    return np.asarray(np.swapaxes(lower, 1, 2))
