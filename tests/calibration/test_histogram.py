"""The state of a histogram: exact, and a commutative monoid."""

from __future__ import annotations

import _ctypes
import ctypes
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trtforge.calibration import count
from trtforge.calibration.count import (
    BINS,
    INFINITY_BITS,
    MIN_EXPONENT,
    CountJobs,
    count_numpy,
    count_one,
    count_while_below,
    native_kernel,
    peak_bits,
)
from trtforge.calibration.histogram import Histogram, merge
from trtforge.runtime.errors import CalibrationError

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
values = arrays(np.float32, st.integers(0, 60), elements=floats)
ordinary = arrays(np.float32, st.integers(0, 60), elements=st.floats(-10, 10, width=32))


def histogram_of(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


def expected(array: np.ndarray) -> Histogram:
    """The definition, in exact rational arithmetic on doubles: float32 over a power of two fits in one."""
    magnitudes = np.abs(array.astype(np.float64))
    peak = float(magnitudes.max(initial=0.0))
    exponent = MIN_EXPONENT
    while peak >= math.ldexp(BINS, exponent):
        exponent += 1
    bins = np.floor(np.ldexp(magnitudes, -exponent)).astype(np.int64)
    return Histogram(exponent, np.bincount(bins, minlength=BINS).astype(np.int64), peak)


@given(st.one_of(values, ordinary))
def test_every_element_is_in_the_bin_it_belongs_to(array: np.ndarray) -> None:
    assert histogram_of(array) == expected(array)


@given(st.lists(st.one_of(values, ordinary), max_size=5), st.randoms())
def test_order_and_batches_do_not_matter(parts: list[np.ndarray], random: object) -> None:
    whole = histogram_of(np.concatenate([np.zeros(0, np.float32), *parts]))
    random.shuffle(parts)  # type: ignore[attr-defined]
    assert histogram_of(*parts) == whole


@given(values, values, ordinary)
def test_merge_is_a_commutative_monoid(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    x, y, z = histogram_of(a), histogram_of(b), histogram_of(c)
    assert merge(x, y) == merge(y, x) == histogram_of(a, b)
    assert merge(merge(x, y), z) == merge(x, merge(y, z))
    assert merge(x, Histogram()) == x == merge(Histogram(), x)
    assert x == histogram_of(a)  # nothing given is changed


@pytest.mark.parametrize(
    ("array", "exponent", "filled"),
    [
        (np.zeros(7), MIN_EXPONENT, {0: 7}),
        (np.full(5, -3.0), -9, {1536: 5}),
        (np.array(6.0), -8, {1536: 1}),
        (np.array([1e-45, 2.8e-45, 0.0]), MIN_EXPONENT, {0: 1, 1: 1, 2: 1}),
        (np.array([1e30, 1.0]), 89, {0: 1, 1615: 1}),
        (np.array([np.finfo(np.float32).max, np.finfo(np.float32).tiny]), 117, {0: 1, 2047: 1}),
        (np.array([-0.0]), MIN_EXPONENT, {0: 1}),
    ],
    ids=["zeros", "constant", "one element", "subnormal", "1e30", "float32 max", "negative zero"],
)
def test_extremes(array: np.ndarray, exponent: int, filled: dict[int, int]) -> None:
    histogram = histogram_of(array.astype(np.float32))
    assert histogram.exponent == exponent
    assert {int(i): int(histogram.counts[i]) for i in np.flatnonzero(histogram.counts)} == filled
    assert histogram.count == array.size
    assert histogram.peak == np.abs(array.astype(np.float32)).max()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
@pytest.mark.parametrize("place", [0, 5000, 99_999])
def test_not_finite_is_refused_and_named(bad: float, place: int) -> None:
    array = np.linspace(-1, 1, 100_000, dtype=np.float32)
    array[place] = bad
    with pytest.raises(
        CalibrationError, match=r"tensor 'x' in batch 3 holds \d NaN and \d infinite values among 100000"
    ):
        Histogram().add(array, where="tensor 'x' in batch 3")


def test_float64_beyond_float32_is_infinite() -> None:
    with pytest.raises(CalibrationError, match="0 NaN and 1 infinite"):
        Histogram().add(np.array([1e39, 1.0]))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats(dtype: type) -> None:
    array = np.array([0.5, -1.25, 3.0], dtype)
    assert histogram_of(array) == histogram_of(array.astype(np.float32))


def test_integers_have_no_range() -> None:
    with pytest.raises(CalibrationError, match="holds int64, not floats"):
        Histogram().add(np.arange(3))


def test_layout_does_not_matter() -> None:
    array = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    assert histogram_of(array.transpose(2, 0, 1)[::2]) == histogram_of(np.ascontiguousarray(array[:, :, ::2]))


def test_used_bins_resolve_the_range_at_least_to_a_thousandth() -> None:
    for peak in (1.0, 1.999, 2.0, 3e-20, 7e20):
        histogram = histogram_of(np.array([peak], np.float32))
        assert BINS // 2 < histogram.used <= BINS
        assert (histogram.used - 1) * histogram.width <= histogram.peak < histogram.used * histogram.width


@pytest.fixture(scope="module")
def native() -> None:
    if native_kernel() is None:
        pytest.skip("installed without a C compiler")


@pytest.mark.usefixtures("native")
@settings(max_examples=60)
@given(values, st.integers(-126, 117))
def test_compiled_loop_counts_as_numpy_does(array: np.ndarray, exponent: int) -> None:
    kernel = native_kernel()
    assert kernel is not None
    found, wanted = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    whole = bool(np.all(np.abs(array.astype(np.float64)) < math.ldexp(BINS, exponent)))
    if array.size == 0:
        return
    result = count_one(kernel, array, exponent, found)
    if whole:
        assert result == count_numpy(array, exponent, wanted)
        assert np.array_equal(found, wanted)
        assert result == (array.size, peak_bits(array), 0)
    else:  # the block that holds the large element is left alone
        assert result == (0, 0, peak_bits(array))
        assert not found.any()


@pytest.mark.usefixtures("native")
def test_compiled_loop_stops_before_the_block_that_needs_a_wider_grid() -> None:
    array = np.ones(10_000, np.float32)
    array[9_000] = 5000.0
    counts = np.zeros(BINS, np.int64)
    done, bits, beyond = count_while_below(array, 0, counts)
    assert beyond == np.float32(5000).view(np.uint32)
    assert 0 < done <= 9_000
    assert counts[1] == done
    assert bits == np.float32(1).view(np.uint32)


def compile_library(source: Path, library: Path, *options: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    subprocess.run([compiler, "-O3", "-shared", "-fPIC", *options, str(source), "-o", str(library)], check=True)


@pytest.fixture(scope="module", params=["for this CPU", "encode_avx2", "encode"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CountJobs:
    library = tmp_path_factory.mktemp("count") / "count.so"
    if request.param == "encode_avx2" and "avx2" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this CPU has no AVX2")
    chosen = [f"-DENCODE={request.param}"] if request.param.startswith("encode") else []
    compile_library(Path(count.__file__).with_name("count.c"), library, *chosen)
    return count._bind(ctypes.CDLL(str(library)))


@pytest.mark.parametrize("size", [1, 7, 8, 15, 16, 17, 1023, 1024, 1025, 100_003])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
def test_compiled_loops_count_any_share_of_zeros(compiled: CountJobs, size: int, share: float) -> None:
    rng = np.random.default_rng(size)
    array = rng.standard_normal(size).astype(np.float32)
    array[rng.random(size) < share] = 0
    array[rng.random(size) < 0.1] = -0.0
    array[rng.random(size) < 0.1] = 6  # saturated
    for start in range(min(size, 3)):  # not on a boundary of vectors
        found, wanted = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
        assert count_one(compiled, array[start:], -8, found) == count_numpy(array[start:], -8, wanted)
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 8.0, -8.0, 1e30])
def test_compiled_loops_see_what_does_not_fit_wherever_it_stands(compiled: CountJobs, bad: float) -> None:
    for place in [*range(40), 1023]:
        array = np.zeros(1024, np.float32)
        array[place] = bad
        counts = np.zeros(BINS, np.int64)
        assert count_one(compiled, array, -8, counts) == (0, 0, peak_bits(array))
        assert not counts.any()


@pytest.fixture
def fresh_kernel() -> Iterator[None]:
    native_kernel.cache_clear()
    yield
    native_kernel.cache_clear()


@pytest.mark.usefixtures("fresh_kernel")
def test_numpy_counts_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTFORGE_NATIVE", "0")
    assert native_kernel() is None


@pytest.mark.usefixtures("fresh_kernel")
@pytest.mark.parametrize("found", ["nothing", "text", "foreign", "older"])
def test_a_library_that_does_not_count_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    library = tmp_path / "calibration" / "_count.abi3.so"
    library.parent.mkdir()
    if found == "text":
        library.write_text("not a library")
    elif found == "foreign":  # a library without the function
        library.symlink_to(_ctypes.__file__)
    elif found == "older":  # the first release's function took other arguments under another name
        source = tmp_path / "older.c"
        source.write_text("long trtforge_count(const float *x, long n) { return n + (long)x[0]; }")
        subprocess.run(
            [shutil.which("cc") or pytest.skip("no C compiler"), "-shared", "-fPIC", source, "-o", library], check=True
        )
    monkeypatch.setattr("trtforge.runtime.native._PACKAGE", tmp_path)
    assert native_kernel() is None


def test_peak_bits_find_nan_of_either_sign() -> None:
    for bad in (np.nan, np.inf):
        for sign in (1, -1):
            array = np.array([1.0, -2.0, bad, 0.0], np.float32)
            array[2] = np.copysign(array[2], sign)
            assert peak_bits(array) >= INFINITY_BITS
