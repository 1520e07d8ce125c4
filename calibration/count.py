"""The inner loop of calibration, over every element of every activation: the largest |x|, and counting by bins.

Its time is most of what calibration adds to inference. On activations of which half are zero, in a cache, and one core
(Zen 4), nanoseconds an element: `count.c` 0.24 with AVX-512, 0.31 with AVX2, 0.58 with neither. From memory, before it
left out zeros: `count.c` 0.4, numpy as in `count_numpy` 1.7 to 2.2, `torch.bincount` of int16 1.5 to 3, scipy's
`coo_todense` 0.9 and its int32 codes 0.25; within onnxruntime ScatterElements 4.5, ScatterND 5, TfIdfVectorizer 18,
Unique 41; sorting uint16 7 and more; `np.histogram` 20. numpy holds the interpreter's lock while it counts, so that
two threads count no faster than one; `count.c` does not, and takes all arrays of a sample in one call. It is compiled
where the package is installed, if there is a compiler, and never later. Without it numpy counts, to the same last one;
`TRTFORGE_NATIVE=0` asks for that.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtforge.runtime.native import load_native

__all__ = [
    "BINS",
    "INFINITY_BITS",
    "JOB",
    "MIN_EXPONENT",
    "CountJobs",
    "Counted",
    "count_numpy",
    "count_one",
    "count_while_below",
    "job_grid",
    "native_kernel",
    "peak_bits",
]

BINS = 2048
MIN_EXPONENT = -149
"""Bins of 2**-149 hold one float32 each: none is finer."""
INFINITY_BITS = 0x7F800000

_CHUNK = 1 << 16
_SIGN = 1 << 31
_SMALLEST_SCALED = -126
"""Below this exponent the scale overflows float32, and products of subnormals would round."""

Floats = NDArray[np.float32]
Counts = NDArray[np.int64]
CountJobs = Callable[[NDArray[np.void]], None]

JOB = np.dtype(
    {
        "names": ["x", "size", "counts", "scale", "limit", "peak", "beyond", "done"],
        "formats": ["u8", "i8", "u8", "f4", "u4", "u4", "u4", "i8"],
    },
    align=True,
)
"""`job` in `count.c`: an array to be counted. `x` and `counts` are addresses."""


def peak_bits(flat: Floats) -> int:
    """The bits of the largest |x|; at least `INFINITY_BITS` where some x is infinite or NaN.

    Bits of non-negative floats are ordered as the floats are, so integer maxima find NaN too.
    """
    top = int(flat.view(np.uint32).max())
    # As unsigned, negative floats come above all others and the largest magnitude last; as signed they come below.
    return top if top < _SIGN else max(top - _SIGN, int(flat.view(np.int32).max()))


class Counted(NamedTuple):
    """How many elements were counted, from the start; and the bits of the largest |x| of those, and of the others."""

    done: int
    peak: int
    beyond: int


def count_while_below(flat: Floats, exponent: int, counts: Counts) -> Counted:
    """Adds to `counts` how many |x| lie in each [i, i + 1) * 2**exponent, as long as they are below BINS * 2**exponent.

    An element that is too large, infinite or NaN ends it; what stands just before it may be left out too.

    Args:
        flat: C-contiguous, of one dimension.
        exponent: From -149 to 117.
        counts: int64 of shape (BINS,), changed in place.
    """
    kernel = native_kernel()
    if kernel is not None:
        found = count_one(kernel, flat, exponent, counts)
        if exponent >= _SMALLEST_SCALED or found.beyond >= _limit_bits(exponent):
            return found
    return count_numpy(flat, exponent, counts)


def count_numpy(flat: Floats, exponent: int, counts: Counts) -> Counted:
    """`count_while_below` without a compiler."""
    peak = 0
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        top = peak_bits(chunk)
        if top >= _limit_bits(exponent):
            return Counted(start, peak, peak_bits(flat[start:]))
        peak = max(peak, top)
        if exponent < _SMALLEST_SCALED:
            codes = np.ldexp(chunk.astype(np.float64), -exponent).astype(np.int32)
        else:
            # An exact product, truncated towards zero: the bin, up to its sign.
            codes = np.multiply(chunk, np.float32(2.0**-exponent)).astype(np.int32)
        counts += np.bincount(np.abs(codes), minlength=BINS)
    return Counted(flat.size, peak, 0)


@functools.cache
def _limit_bits(exponent: int) -> int:
    """The bits of BINS * 2**exponent as a float32; those of infinity where it is beyond."""
    limit = BINS * 2.0**exponent
    return int(np.float32(limit).view(np.uint32)) if limit < 2.0**128 else INFINITY_BITS


@functools.cache
def native_kernel() -> CountJobs | None:
    """The compiled loop, over any number of jobs; None unless it was compiled at installation and is wanted."""
    library = load_native("calibration/_count")
    try:
        kernel = _bind(library) if library else None
    except AttributeError:
        kernel = None  # another version's
    if kernel is None:
        return None  # numpy does the same, only slower
    return kernel if _agrees(kernel) else None


def _bind(library: ctypes.CDLL) -> CountJobs:
    function = library.trtforge_count_jobs
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64]

    def count(jobs: NDArray[np.void]) -> None:
        function(jobs.ctypes.data, len(jobs))

    return count


def count_one(kernel: CountJobs, flat: Floats, exponent: int, counts: Counts) -> Counted:
    """`count_while_below` by the compiled loop, which counts nothing where `exponent` is below -126."""
    jobs = np.zeros(1, JOB)
    jobs[0] = (flat.ctypes.data, flat.size, counts.ctypes.data, *job_grid(exponent), 0, 0, 0)
    kernel(jobs)
    return Counted(*(int(jobs[field][0]) for field in Counted._fields))


def job_grid(exponent: int) -> tuple[float, int]:
    """`scale` and `limit` of a job; bins narrower than 2**-126 take nothing, and are left to numpy."""
    return (2.0**-exponent, _limit_bits(exponent)) if exponent >= _SMALLEST_SCALED else (0.0, 0)


def _agrees(kernel: CountJobs) -> bool:
    """Whether the compiled loop counts as numpy does: an ill-compiled one is not used."""
    values = np.random.default_rng(0).standard_normal(10_007).astype(np.float32)
    values[::3] = 0
    values[-1] = np.nan
    found, expected = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    whole = values[:-1]
    if count_one(kernel, whole, -8, found) != count_numpy(whole, -8, expected):
        return False
    refused = count_one(kernel, values[-5:], -8, found)
    return refused.done == 0 and refused.beyond >= INFINITY_BITS and bool(np.array_equal(found, expected))
