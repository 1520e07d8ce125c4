"""Samples cut to the smallest shapes of a profile."""

from __future__ import annotations

import numpy as np

from trtforge.calibration.crops import crop_sample, smallest_shapes
from trtforge.runtime.specs import DimRange, InputSpec

SPECS = [
    InputSpec("ids", "int64", ("n", "s")),
    InputSpec("bias", "float32", (1, "s", "s")),
    InputSpec("t", "float32", ()),
]
FEEDS = {
    "ids": np.arange(6).reshape(1, 6),
    "bias": np.arange(36, dtype=np.float32).reshape(1, 6, 6),
    "t": np.float32(3).reshape(()),
}


def test_every_named_dimension_is_cut_alike() -> None:
    cut = crop_sample(FEEDS, SPECS, {"n": 1, "s": 2})
    assert cut is not None
    np.testing.assert_array_equal(cut["ids"], [[0, 1]])
    np.testing.assert_array_equal(cut["bias"], [[[0, 1], [6, 7]]])
    assert cut["t"] == 3


def test_a_sample_that_is_small_already_is_none() -> None:
    assert crop_sample(FEEDS, SPECS, {"n": 1, "s": 6}) is None
    assert crop_sample(FEEDS, SPECS, {"n": 1, "s": 8}) is None


def test_smallest_shapes_of_profiles() -> None:
    def profile(least: int) -> dict[str, DimRange]:
        return {"n": DimRange(1, 4, 8), "s": DimRange(least, 64, 64)}

    assert smallest_shapes(SPECS, [profile(4), profile(16), profile(4)]) == [{"n": 1, "s": 4}, {"n": 1, "s": 16}]
    assert smallest_shapes(SPECS, []) == []
    size = InputSpec("size", "int64", (1,), elements=("s",))
    assert smallest_shapes([*SPECS, size], [profile(4)]) == []
