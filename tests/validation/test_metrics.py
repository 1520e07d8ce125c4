import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trtforge.validation.metrics import Measures, Sums, add_sums, measure, measure_noise, sum_errors


def given(*strategies):
    """Without a deadline: the machine may be busy."""
    return lambda test: settings(deadline=None)(hypothesis_given(*strategies)(test))


_VALUES = st.floats(-1e6, 1e6, width=32)
_ARRAYS = hnp.arrays(np.float32, st.integers(1, 60), elements=_VALUES)


@st.composite
def pairs(draw):
    """A reference and a candidate of one size."""
    size = draw(st.integers(1, 60))
    arrays = hnp.arrays(np.float32, size, elements=_VALUES)
    return draw(arrays), draw(arrays)


def assert_close(a: Sums, b: Sums) -> None:
    # Sums of signed terms may cancel: they are compared on the scale of what was added up.
    scale = 1 + max(abs(a.reference_sq), abs(a.candidate_sq), abs(a.error_sq))
    for name in Sums.__dataclass_fields__:
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-9, abs=1e-9 * scale), name


def test_known_values():
    found = measure(np.array([3.0, 4.0], np.float32), np.array([3.0, 3.0], np.float32))
    assert found.sqnr_db == pytest.approx(10 * math.log10(25))
    assert found.cosine == pytest.approx(21 / (5 * math.sqrt(18)))
    assert found.max_abs == 1
    assert found.std == 0.5
    assert found.max_abs_over_std == 2
    assert found.max_rel == 0.25
    assert found.rms == pytest.approx(math.sqrt(12.5))
    assert found.mismatch == 0.5


@given(_ARRAYS)
def test_identical(array):
    found = measure(array, array.copy())
    assert found.sqnr_db == math.inf
    assert found.cosine == 1.0
    assert (found.max_abs, found.max_rel, found.max_abs_over_std, found.mismatches) == (0, 0, 0, 0)


@given(pairs(), st.integers(-20, 20))
def test_scale_invariant(pair, exponent):
    ref, cand = pair
    scale = 2.0**exponent
    a, b = measure(ref, cand), measure(ref * np.float64(scale), cand * np.float64(scale))
    assert b.sqnr_db == pytest.approx(a.sqnr_db)
    assert b.cosine == pytest.approx(a.cosine, abs=1e-9)
    assert b.max_abs_over_std == pytest.approx(a.max_abs_over_std, rel=1e-6)
    assert b.max_abs == pytest.approx(a.max_abs * scale)


@given(pairs(), st.randoms(use_true_random=False))
def test_order_of_values_does_not_matter(pair, random):
    ref, cand = pair
    order = list(range(len(ref)))
    random.shuffle(order)
    assert_close(sum_errors(ref, cand), sum_errors(ref[order], cand[order]))


@given(pairs(), st.integers(1, 17))
def test_blocks_add_up_to_the_whole(pair, block):
    ref, cand = pair
    assert_close(sum_errors(ref, cand), sum_errors(ref, cand, block=block))


@given(pairs(), pairs(), pairs())
def test_sums_are_a_commutative_monoid(x, y, z):
    a, b, c = (sum_errors(*pair) for pair in (x, y, z))
    assert add_sums(a, Sums()) == a
    assert_close(add_sums(Sums(), a), a)
    assert_close(add_sums(a, b), add_sums(b, a))
    assert_close(add_sums(add_sums(a, b), c), add_sums(a, add_sums(b, c)))


@given(pairs(), st.floats(1.01, 100))
def test_more_noise_is_worse(pair, factor):
    ref, noise = (array.astype(np.float64) for array in pair)
    assume(np.abs(ref).max() > 1e-3)
    assume(np.abs(noise).max() > 1e-3)
    a, b = measure(ref, ref + noise), measure(ref, ref + factor * noise)
    assert b.sqnr_db < a.sqnr_db
    assert b.sqnr_db == pytest.approx(a.sqnr_db - 20 * math.log10(factor), abs=1e-3)
    assert b.max_abs > a.max_abs


@given(pairs())
def test_cosine_follows_from_sqnr_at_most(pair):
    """The least cosine that an error of this size can make: sqrt(1 - noise / signal)."""
    found = measure(*pair)
    if 0 < found.sqnr_db < math.inf:
        assert found.cosine >= math.sqrt(1 - 10 ** (-found.sqnr_db / 10)) - 1e-6


def test_large_mean_does_not_cancel():
    """E[x^2] - E[x]^2 in float64 gives 0 or less here."""
    ref = 1e9 + np.array([0.0, 1.0] * 500)
    assert measure(ref, ref).std == pytest.approx(0.5)
    assert sum_errors(ref, ref, block=7).std == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_is_counted_and_left_out(bad):
    ref = np.array([1, 2, 3, bad], np.float32)
    cand = np.array([1, bad, 3, bad], np.float32)
    found = measure(ref, cand, atol=1.0)
    assert (found.reference_nonfinite, found.candidate_nonfinite) == (1, 2)
    assert found.sqnr_db == math.inf
    assert found.mismatches == 2, "equal places of Inf and NaN count as different"
    assert found.violations == 2


def test_all_nonfinite():
    found = measure(np.full(3, np.nan), np.full(3, np.nan))
    assert (found.count, found.reference_nonfinite, found.mismatches) == (3, 3, 3)


def test_zero_reference():
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    assert measure(zeros, ones).sqnr_db == -math.inf
    assert measure(zeros, ones).cosine == 0
    assert measure(zeros, ones).max_abs_over_std == math.inf
    assert measure(zeros, zeros).sqnr_db == math.inf


def test_integers_beyond_float64():
    a, b = np.array([2**53], np.int64), np.array([2**53 + 1], np.int64)
    assert measure(a, b).mismatches == 1


def test_bool():
    assert measure(np.array([True, False]), np.array([True, True])).mismatch == 0.5


def test_bfloat16_costs_what_eight_bits_cost():
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    assert measure(values, values.astype(ml_dtypes.bfloat16)).sqnr_db == pytest.approx(55.6, abs=0.1)
    assert measure(values, values.astype(np.float16)).sqnr_db == pytest.approx(73.6, abs=0.1)


def test_violations_are_those_of_numpy_allclose():
    ref, cand = np.array([1.0, 10.0, 100.0]), np.array([1.2, 10.2, 100.2])
    found = measure(ref, cand, atol=0.1, rtol=0.005)
    assert found.violations == np.count_nonzero(~np.isclose(cand, ref, atol=0.1, rtol=0.005))


def test_sample_is_measured_by_the_outputs_scale():
    quiet = sum_errors(np.array([0.001]), np.array([0.002]))
    loud = sum_errors(np.array([1.0, -1.0]), np.array([1.0, -1.0]))
    pooled = add_sums(quiet, loud)
    assert quiet.measures().sqnr_db == pytest.approx(0)
    assert quiet.measures(pooled).sqnr_db > 55
    assert quiet.measures(pooled).std == pooled.std


def test_strided_and_scalar_arrays():
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert measure(grid.T, np.ascontiguousarray(grid.T)).sqnr_db == math.inf
    assert measure(np.float32(1).reshape(()), np.float32(2).reshape(())).max_abs == 1


def test_empty():
    assert measure(np.zeros((0, 3)), np.zeros((0, 3))).count == 0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        sum_errors(np.zeros((2, 3)), np.zeros((3, 2)))


@st.composite
def float32_pairs(draw):
    """Of every magnitude that float32 has; NaN and Inf now and then; more than a block, sometimes."""
    reference, candidate = (draw(hnp.arrays(np.float32, st.just(30), elements=st.floats(width=32))) for _ in range(2))
    if draw(st.booleans()):
        candidate = np.where(np.isfinite(reference), reference, candidate)
    repeats = draw(st.sampled_from([1, 5000]))
    return np.tile(reference, repeats), np.tile(candidate, repeats)


@given(float32_pairs(), st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
def test_noise_by_float32_is_that_by_float64(pair, dtype):
    reference = pair[0]
    with np.errstate(over="ignore"):
        candidate = pair[1].astype(dtype)
    exact, found = measure(reference, candidate), measure_noise(reference, candidate)
    if exact.candidate_nonfinite > exact.reference_nonfinite:
        assert found.sqnr_db == -math.inf
    else:
        assert found.sqnr_db == pytest.approx(exact.sqnr_db, abs=1e-3)
    assert found.greatest == np.abs(reference[np.isfinite(reference)]).max(initial=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e25])
def test_noise_by_float32_at_every_scale(scale):
    rng = np.random.default_rng(0)
    reference = (rng.standard_normal(200_000) * scale).astype(np.float32)
    candidate = (reference * (1 + 1e-3 * rng.standard_normal(200_000))).astype(np.float32)
    assert measure_noise(reference, candidate).sqnr_db == pytest.approx(measure(reference, candidate).sqnr_db, abs=1e-3)


def test_overflowing_doubles_meet_no_limit():
    huge = np.array([1e200, -1e200])
    assert not measure(huge, huge * 1.5).sqnr_db >= 0


@given(pairs(), st.sampled_from([0.0, np.nan, np.inf]))
def test_json_round_trip(pair, extra):
    ref, cand = pair
    found = measure(np.append(ref, extra), np.append(cand, 0))
    text = json.dumps(found.to_json(), allow_nan=False)
    assert Measures.from_json(json.loads(text)) == found
