"""The inner loop of calibration, over every element of every activation: the largest |x|, and counting by bins.

Its time is nearly all that calibration adds to inference. On MobileNetV2's activations and a Zen 3 core, nanoseconds an
element: `np.histogram` 20, `torch.histc` 12, numpy as in `count_numpy` 3 to 4, scaling plus `torch.bincount` of int16
1.5 to 3, `count.c` 0.8 to 1.3, of which the half is reading memory. numpy is the default: no compiler is ever started
unasked. `TRTFORGE_NATIVE=1` compiles `count.c` once, into the user's cache folder. Both count alike, to the last one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINS", "INFINITY_BITS", "MIN_EXPONENT", "count_numpy", "count_while_below", "native_kernel", "peak_bits"]

BINS = 2048
MIN_EXPONENT = -149
"""Bins of 2**-149 hold one float32 each: none is finer."""
INFINITY_BITS = 0x7F800000

_CHUNK = 1 << 16
_SIGN = 1 << 31
_SMALLEST_SCALED = -126
"""Below this exponent the scale overflows float32, and products of subnormals would round."""
_COMPILE_SECONDS = 60

Floats = NDArray[np.float32]
Counts = NDArray[np.int64]
Kernel = Callable[[Floats, int, Counts], tuple[int, int]]


def peak_bits(flat: Floats) -> int:
    """The bits of the largest |x|; at least `INFINITY_BITS` where some x is infinite or NaN.

    Bits of non-negative floats are ordered as the floats are, so integer maxima find NaN too.
    """
    top = int(flat.view(np.uint32).max())
    # As unsigned, negative floats come above all others and the largest magnitude last; as signed they come below.
    return top if top < _SIGN else max(top - _SIGN, int(flat.view(np.int32).max()))


def count_while_below(flat: Floats, exponent: int, counts: Counts) -> tuple[int, int]:
    """Adds to `counts` how many |x| lie in each [i, i + 1) * 2**exponent, as long as they are below BINS * 2**exponent.

    Args:
        flat: C-contiguous, of one dimension.
        exponent: From -149 to 117.
        counts: int64 of shape (BINS,), changed in place.

    Returns:
        How many elements from the start were counted; and the bits of their largest |x|. An element that is too large,
        infinite or NaN is in none of them.
    """
    kernel = native_kernel() if exponent >= _SMALLEST_SCALED else None
    return (kernel or count_numpy)(flat, exponent, counts)


def count_numpy(flat: Floats, exponent: int, counts: Counts) -> tuple[int, int]:
    """`count_while_below` without a compiler."""
    peak = 0
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        top = peak_bits(chunk)
        if top >= _limit_bits(exponent):
            return start, peak
        peak = max(peak, top)
        if exponent < _SMALLEST_SCALED:
            codes = np.ldexp(chunk.astype(np.float64), -exponent).astype(np.int32)
        else:
            # An exact product, truncated towards zero: the bin, up to its sign.
            codes = np.multiply(chunk, np.float32(2.0**-exponent)).astype(np.int32)
        counts += np.bincount(np.abs(codes), minlength=BINS)
    return flat.size, peak


@functools.cache
def _limit_bits(exponent: int) -> int:
    """The bits of BINS * 2**exponent as a float32; those of infinity where it is beyond."""
    limit = BINS * 2.0**exponent
    return int(np.float32(limit).view(np.uint32)) if limit < 2.0**128 else INFINITY_BITS


@functools.cache
def native_kernel() -> Kernel | None:
    """`count_while_below` in C, for exponents of -126 and more; None unless asked for and to be had."""
    if os.environ.get("TRTFORGE_NATIVE") != "1":
        return None
    try:
        library = ctypes.CDLL(str(_compile()))
    except (OSError, subprocess.SubprocessError):
        return None  # no compiler, no writable cache, a foreign file system: numpy does the same, only slower
    kernel = _bind(library)
    return kernel if _agrees(kernel) else None


def _bind(library: ctypes.CDLL) -> Kernel:
    function = library.trtforge_count
    function.restype = ctypes.c_long
    function.argtypes = [
        ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip

    def count(flat: Floats, exponent: int, counts: Counts) -> tuple[int, int]:
        peak = ctypes.c_uint32(0)
        done = function(
            flat.ctypes.data,
            flat.size,
            2.0**-exponent,
            _limit_bits(exponent),
            counts.ctypes.data,
            ctypes.byref(peak),
        )
        return int(done), peak.value

    return count


def _agrees(kernel: Kernel) -> bool:
    """Whether the compiled loop counts as numpy does: a compiler may be told things by its environment."""
    values = np.random.default_rng(0).standard_normal(10_007).astype(np.float32)
    values[::3] = 0
    values[-1] = np.nan
    found, expected = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    whole = values[:-1]
    return (
        kernel(whole, -8, found) == count_numpy(whole, -8, expected)
        and bool(np.array_equal(found, expected))
        and kernel(values[-5:], -8, found) == (0, 0)
    )


def _compile() -> Path:
    """The shared library for this source, machine and compiler, made where the cache has none."""
    source = Path(__file__).with_name("count.c")
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("no C compiler")
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-x", "c"]
    key = hashlib.sha256(source.read_bytes() + f"{command} {_cpu()}".encode()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trtforge"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library = folder / f"count-{key}.so"
    if library.exists() and library.stat().st_uid == os.getuid():
        return library
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / library.name
        subprocess.run(
            [*command, str(source), "-o", str(made)], check=True, capture_output=True, timeout=_COMPILE_SECONDS
        )
        made.replace(library)
    return library


def _cpu() -> str:
    """What `-march=native` depends on: home folders are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.platform()
    facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return platform.machine() + "".join(facts)
