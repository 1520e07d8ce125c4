"""The error of outputs as a vector: its power, its inner products, and what is not finite."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from trtforge.converter.output_error import relative_error
from trtforge.runtime.runner import Tensors


def outputs(seed: int, scale: float = 1.0) -> dict[str, Tensors]:
    rng = np.random.default_rng(seed)
    return {
        f"sample-{number}": {
            "logits": (scale * rng.standard_normal((4, 100))).astype(np.float32),
            "map": (50 * scale * rng.standard_normal((4, 20, 20))).astype(ml_dtypes.bfloat16),
            "index": rng.integers(0, 9, 4),
        }
        for number in range(5)
    }


def plus(first: dict[str, Tensors], second: dict[str, Tensors]) -> dict[str, Tensors]:
    return {
        sample: {name: (array + second[sample][name]).astype(array.dtype) for name, array in tensors.items()}
        for sample, tensors in first.items()
    }


def test_its_power_is_the_sum_of_the_outputs_relative_powers() -> None:
    wanted = outputs(0)
    found = plus(wanted, outputs(1, 0.1))
    error = relative_error(wanted, found)
    assert error is not None
    assert error.shape == (5 * (4 * 100 + 4 * 400),)
    power = 0.0
    for name in ("logits", "map"):
        before, after = (np.stack([s[name] for s in side.values()]).astype(np.float64) for side in (wanted, found))
        power += float(((after - before) ** 2).sum() / (before**2).sum())
    assert error @ error == pytest.approx(power, rel=1e-9)
    assert power == pytest.approx(0.02, rel=0.1)


def test_with_few_values_inner_products_are_kept_nearly() -> None:
    wanted = outputs(0)
    one, other = outputs(1, 0.1), outputs(2, 0.1)
    found = [plus(wanted, one), plus(wanted, plus(one, other))]
    exact = [relative_error(wanted, side) for side in found]
    short = [relative_error(wanted, side, values=1000) for side in found]
    for a in range(2):
        for b in range(2):
            x, y, p, q = exact[a], exact[b], short[a], short[b]
            assert x is not None and y is not None and p is not None and q is not None  # noqa: PT018
            assert p.shape == (1000,)
            assert p @ q == pytest.approx(x @ y, rel=0.15)


def test_what_was_not_finite_before_is_no_error_and_what_became_so_is_no_vector() -> None:
    wanted = outputs(0)
    found = plus(wanted, outputs(1, 0.1))
    wanted["sample-1"]["logits"][0, 0] = found["sample-1"]["logits"][0, 0] = np.inf
    error = relative_error(wanted, found)
    assert error is not None
    assert np.isfinite(error).all()
    found["sample-2"]["logits"][0, 0] = np.nan
    assert relative_error(wanted, found) is None
