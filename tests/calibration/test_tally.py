"""Many histograms in one call: what each of them would have counted alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trtforge.calibration.count import native_kernel
from trtforge.calibration.histogram import Histogram
from trtforge.calibration.tally import Tally
from trtforge.runtime.errors import CalibrationError

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
samples = st.lists(
    st.fixed_dictionaries({name: arrays(np.float32, st.integers(0, 40), elements=floats) for name in "ab"}), max_size=6
)


@pytest.fixture(autouse=True, params=["compiled", "numpy"])
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setenv("TRTFORGE_NATIVE", "0")
        native_kernel.cache_clear()
        yield
    native_kernel.cache_clear()


def alone(samples: list[dict[str, np.ndarray]], name: str) -> Histogram:
    histogram = Histogram()
    for sample in samples:
        histogram.add(sample[name])
    return histogram


@given(samples)
def test_each_tensor_is_counted_as_if_it_were_alone(samples: list[dict[str, np.ndarray]]) -> None:
    tally = Tally(["b", "a"])
    for sample in samples:
        tally.add(sample, "batch 0")
    assert tally.histograms() == {name: alone(samples, name) for name in "ba"}
    assert tally.histograms() == {name: alone(samples, name) for name in "ba"}  # asking changes nothing


def test_arrays_that_are_filled_anew_are_counted_anew() -> None:
    rng = np.random.default_rng(0)
    array = np.zeros((2, 3000), np.float32)
    half = np.zeros(50, np.float16)
    seen: list[dict[str, np.ndarray]] = []
    tally = Tally(["x", "columns", "half"])
    for step in range(20):  # the range grows more than once
        array[:] = rng.standard_normal(array.shape) * 1.5**step
        half[:] = rng.standard_normal(50)
        sample = {"x": array, "columns": array[:, ::7], "half": half}
        seen.append({name: part.copy() for name, part in sample.items()})
        tally.add(sample, "batch 0")
    assert tally.histograms() == {name: alone(seen, name) for name in ("x", "columns", "half")}


def test_what_is_wrong_is_named() -> None:
    array = np.linspace(-1, 1, 100_000, dtype=np.float32)
    tally = Tally(["x"])
    tally.add({"x": array}, "batch 0")
    array[70_000:70_002] = np.nan, np.inf
    with pytest.raises(
        CalibrationError, match="tensor 'x' in batch 3, sample 1 holds 1 NaN and 1 infinite values among 100000"
    ):
        tally.add({"x": array}, "batch 3, sample 1")
    with pytest.raises(CalibrationError, match="tensor 'x' in batch 4 holds int64, not floats"):
        tally.add({"x": np.arange(3)}, "batch 4")
