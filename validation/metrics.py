"""How far a candidate's array is from the reference's: plain measures, computed in float64 a block at a time.

Statistics are gathered as `Sums`, which add up: blocks make an array, arrays of several samples make the pooled
figures of one output. `Sums.measures()` turns them into the figures that people read and tolerances judge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtforge.runtime.runner import Array

__all__ = ["Measures", "Noise", "Sums", "add_sums", "is_float", "measure", "measure_noise", "sum_errors"]

_BLOCK = 1 << 16
"""Values a block: its float64 copies (0.5 MB each) stay in a core's cache, and memory does not grow with the array."""

_FLOAT32_HOLDS = frozenset({"float32", "float16", "bfloat16"})

_Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sums:
    """What must be known of two arrays to measure them; a commutative monoid under `add_sums`, zero being `Sums()`.

    Everything but the counts is over the places where both arrays are finite.

    Attributes:
        count: Places compared, finite or not.
        finite: Places where both are finite.
        reference_mean: Mean of the reference.
        reference_m2: Sum of (reference - mean)^2; kept as it is, since E[x^2] - E[x]^2 cancels for a large mean.
        reference_sq: Sum of reference^2.
        candidate_sq: Sum of candidate^2.
        product: Sum of reference * candidate.
        error_sq: Sum of (candidate - reference)^2.
        max_abs: Greatest |candidate - reference|.
        max_rel: Greatest |candidate - reference| / |reference| where the reference is not 0.
        mismatches: Places that are not equal, a NaN or Inf on either side included.
        violations: Places where |candidate - reference| > atol + rtol * |reference|, NaN and Inf included.
        reference_nonfinite: NaN and Inf in the reference.
        candidate_nonfinite: NaN and Inf in the candidate.
        reference_min: Least value of the reference (+inf where there is none).
        reference_max: Greatest value of the reference (-inf where there is none).
    """

    count: int = 0
    finite: int = 0
    reference_mean: float = 0.0
    reference_m2: float = 0.0
    reference_sq: float = 0.0
    candidate_sq: float = 0.0
    product: float = 0.0
    error_sq: float = 0.0
    max_abs: float = 0.0
    max_rel: float = 0.0
    mismatches: int = 0
    violations: int = 0
    reference_nonfinite: int = 0
    candidate_nonfinite: int = 0
    reference_min: float = math.inf
    reference_max: float = -math.inf

    @property
    def mean_square(self) -> float:
        """Mean of reference^2: the power of the signal; 0 where nothing is finite."""
        return self.reference_sq / self.finite if self.finite else 0.0

    @property
    def std(self) -> float:
        """Population standard deviation of the reference; 0 where nothing is finite."""
        return math.sqrt(self.reference_m2 / self.finite) if self.finite else 0.0

    def measures(self, pooled: Sums | None = None) -> Measures:
        """The figures.

        Args:
            pooled: The sums of the whole output over all samples, where `self` is one sample of it. Then the standard
                deviation is the whole output's, and noise is set against the greater of this sample's power and the
                whole output's: the one value of a regression model may happen to be near 0 in one sample, and
                a feature map may hold nothing, without the candidate being any worse there.
        """
        whole = self if pooled is None else pooled
        return Measures(
            count=self.count,
            sqnr_db=_decibel(max(self.mean_square, whole.mean_square) * self.finite, self.error_sq),
            cosine=_cosine(self),
            max_abs_over_std=_over(self.max_abs, whole.std),
            max_abs=self.max_abs,
            max_rel=self.max_rel,
            rms=math.sqrt(self.mean_square),
            std=whole.std,
            mismatches=self.mismatches,
            violations=self.violations,
            reference_nonfinite=self.reference_nonfinite,
            candidate_nonfinite=self.candidate_nonfinite,
        )


@dataclass(frozen=True, slots=True)
class Measures:
    """How far the candidate c is from the reference r; sums and maxima go over places where both are finite.

    Attributes:
        count: Number of values.
        sqnr_db: Signal to quantization noise ratio in dB, 10 log10(sum r^2 / sum (c - r)^2) (Lin et al., "Fixed Point
            Quantization of Deep Convolutional Networks", ICML 2016); +inf for equal arrays, -inf where r is 0 and c
            is not. 6.02 dB are one bit.
        cosine: sum r c / sqrt(sum r^2 sum c^2), in [-1, 1]; 1 for equal arrays, 0 where only one of them is zero.
            Blind to a wrong scale.
        max_abs_over_std: max |c - r| / std(r), no unit; +inf where r is constant and c differs. Unlike SQNR it sees
            a single wrong value, and a constant offset in r does not flatter it.
        max_abs: max |c - r|, in the output's unit.
        max_rel: max |c - r| / |r| where r is not 0; for information, since values near 0 make it large.
        rms: sqrt(mean r^2), in the output's unit.
        std: Population standard deviation of r, in the output's unit.
        mismatches: Number of values that are not equal; NaN equals nothing.
        violations: Number of values with |c - r| > atol + rtol |r|, numpy's `allclose` criterion with r as its `b`.
        reference_nonfinite: Number of NaN and Inf in r.
        candidate_nonfinite: Number of NaN and Inf in c.
    """

    count: int
    sqnr_db: float
    cosine: float
    max_abs_over_std: float
    max_abs: float
    max_rel: float
    rms: float
    std: float
    mismatches: int
    violations: int
    reference_nonfinite: int
    candidate_nonfinite: int

    @property
    def mismatch(self) -> float:
        """Share of values that are not equal, in [0, 1]."""
        return self.mismatches / self.count if self.count else 0.0

    def to_json(self) -> dict[str, Any]:
        """All fields; JSON has no infinity, so those and NaN become `"inf"`, `"-inf"` and `"nan"`."""
        out: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            out[field.name] = value if math.isfinite(value) else str(value)
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measures:
        """The inverse of `to_json`."""
        values: dict[str, Any] = {f.name: float(data[f.name]) for f in fields(cls)}
        return cls(**{f.name: int(values[f.name]) if f.type == "int" else values[f.name] for f in fields(cls)})


def is_float(array: Array) -> bool:
    """Whether the values are floating point (bfloat16 included), so that closeness means something."""
    # ml_dtypes registers bfloat16 with kind "V"
    return array.dtype.kind == "f" or "float" in array.dtype.name


def measure(reference: Array, candidate: Array, *, atol: float = 0.0, rtol: float = 0.0) -> Measures:
    """The figures of one pair of arrays; see `Measures` for the formulas and `sum_errors` for what is raised."""
    return sum_errors(reference, candidate, atol=atol, rtol=rtol).measures()


class Noise(NamedTuple):
    """The figures of `measure_noise`: `sqnr_db` as in `Measures`, and the largest finite |r|."""

    sqnr_db: float
    greatest: float


def measure_noise(reference: Array, candidate: Array) -> Noise:
    """What `measure` says of noise, some thirty times as fast for floats of 32 bits and less.

    -inf dB where NaN or Inf came in.

    Squares are summed in float32 in blocks, and the blocks in float64: good to four digits, which is 0.001 dB. Where
    that could overflow or underflow, or something is not finite, it is done in float64 as in `measure`.

    Raises:
        ValueError: the shapes differ.
    """
    if {reference.dtype.name, candidate.dtype.name} <= _FLOAT32_HOLDS and reference.shape == candidate.shape:
        signal = noise = greatest = 0.0
        for ref, cand in zip(_float32_blocks(reference), _float32_blocks(candidate), strict=True):
            with np.errstate(all="ignore"):  # what comes of it is looked at
                power, error = _square(ref), _square(cand - ref)
            if power is None or error is None:
                break
            signal, noise = signal + power, noise + error
            greatest = max(greatest, float(ref.max()), -float(ref.min()))
        else:
            return Noise(_decibel(signal, noise), greatest)
    found = measure(reference, candidate)
    broken = found.candidate_nonfinite > found.reference_nonfinite
    finite = np.abs(reference[np.isfinite(reference)])
    return Noise(-math.inf if broken else found.sqnr_db, float(finite.max(initial=0.0)))


def _float32_blocks(array: Array) -> Iterator[NDArray[np.float32]]:
    flat = array.reshape(-1)
    return (flat[start : start + _BLOCK].astype(np.float32, copy=False) for start in range(0, flat.size, _BLOCK))


def _square(block: NDArray[np.float32]) -> float | None:
    """The sum of squares; None where float32 may not hold it or its terms."""
    total = float(np.dot(block, block))
    return total if 1e-25 < total < 1e30 or not block.any() else None


def sum_errors(
    reference: Array, candidate: Array, *, atol: float = 0.0, rtol: float = 0.0, block: int = _BLOCK
) -> Sums:
    """Gathers the sums of one pair of arrays in blocks of `block` values.

    Args:
        reference: Any shape and dtype of `specs.DTYPES`.
        candidate: The same shape; the dtype may differ.
        atol: Absolute part of what counts as a violation.
        rtol: Part of it that is relative to the reference.
        block: Number of values converted to float64 at once.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes {reference.shape} and {candidate.shape} differ")
    total = Sums()
    for ref, cand in _blocks(reference, candidate, block):
        total = add_sums(total, _sum_block(ref, cand, atol, rtol))
    return total


def add_sums(a: Sums, b: Sums) -> Sums:
    """The sums of both parts together; means and squared deviations by Chan, Golub and LeVeque (1979)."""
    finite = a.finite + b.finite
    delta = b.reference_mean - a.reference_mean
    share = b.finite / finite if finite else 0.0
    return Sums(
        count=a.count + b.count,
        finite=finite,
        reference_mean=a.reference_mean + delta * share,
        reference_m2=a.reference_m2 + b.reference_m2 + delta * delta * a.finite * share,
        reference_sq=a.reference_sq + b.reference_sq,
        candidate_sq=a.candidate_sq + b.candidate_sq,
        product=a.product + b.product,
        error_sq=a.error_sq + b.error_sq,
        max_abs=max(a.max_abs, b.max_abs),
        max_rel=max(a.max_rel, b.max_rel),
        mismatches=a.mismatches + b.mismatches,
        violations=a.violations + b.violations,
        reference_nonfinite=a.reference_nonfinite + b.reference_nonfinite,
        candidate_nonfinite=a.candidate_nonfinite + b.candidate_nonfinite,
        reference_min=min(a.reference_min, b.reference_min),
        reference_max=max(a.reference_max, b.reference_max),
    )


def _blocks(reference: Array, candidate: Array, block: int) -> Iterator[tuple[Array, Array]]:
    ref, cand = reference.reshape(-1), candidate.reshape(-1)
    for start in range(0, ref.size, block):
        yield ref[start : start + block], cand[start : start + block]


# Doubles beyond 1e154 overflow when squared: a measure then becomes inf or NaN, which no tolerance accepts.
@np.errstate(over="ignore", invalid="ignore")
def _sum_block(reference: Array, candidate: Array, atol: float, rtol: float) -> Sums:
    ref: _Float64 = reference.astype(np.float64)
    cand: _Float64 = candidate.astype(np.float64)
    # Integers are compared as they are: float64 holds them exactly only up to 2^53.
    unequal = ref != cand if is_float(reference) or is_float(candidate) else reference != candidate
    bad_ref, bad_cand = ~np.isfinite(ref), ~np.isfinite(cand)
    bad = bad_ref | bad_cand
    count, broken = ref.size, int(np.count_nonzero(bad))
    mismatches = int(np.count_nonzero(unequal | bad))
    if broken:
        ref, cand = ref[~bad], cand[~bad]
    if broken == count:
        return Sums(
            count=count,
            mismatches=mismatches,
            violations=broken,
            reference_nonfinite=int(np.count_nonzero(bad_ref)),
            candidate_nonfinite=int(np.count_nonzero(bad_cand)),
        )
    error = cand - ref
    abs_error, abs_ref = np.abs(error), np.abs(ref)
    nonzero = abs_ref > 0
    mean = float(ref.mean())
    centred = ref - mean
    return Sums(
        count=count,
        finite=ref.size,
        reference_mean=mean,
        reference_m2=_dot(centred, centred),
        reference_sq=_dot(ref, ref),
        candidate_sq=_dot(cand, cand),
        product=_dot(ref, cand),
        error_sq=_dot(error, error),
        max_abs=float(abs_error.max()),
        max_rel=float((abs_error[nonzero] / abs_ref[nonzero]).max()) if nonzero.any() else 0.0,
        mismatches=mismatches,
        violations=broken + int(np.count_nonzero(abs_error > atol + rtol * abs_ref)),
        reference_nonfinite=int(np.count_nonzero(bad_ref)),
        candidate_nonfinite=int(np.count_nonzero(bad_cand)),
        reference_min=float(ref.min()),
        reference_max=float(ref.max()),
    )


def _dot(a: _Float64, b: _Float64) -> float:
    # Not `a @ b`: its BLAS threads, under other load, made a block of 2^16 fifty times slower.
    return float(np.einsum("i,i->", a, b))


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    # A difference of logarithms: the quotient of two finite doubles may overflow.
    return 10 * (math.log10(signal) - math.log10(noise))


def _cosine(sums: Sums) -> float:
    if sums.error_sq == 0:
        return 1.0
    norms = math.sqrt(sums.reference_sq) * math.sqrt(sums.candidate_sq)
    return max(-1.0, min(1.0, sums.product / norms)) if norms else 0.0


def _over(value: float, scale: float) -> float:
    if value == 0:
        return 0.0
    return value / scale if scale else math.inf
