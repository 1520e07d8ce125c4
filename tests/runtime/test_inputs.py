from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.inputs import make_inputs
from trtforge.runtime.specs import DTYPES, InputSpec, ValueRange


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_shape_and_determinism(dtype: str) -> None:
    spec = InputSpec("x", dtype, ("n", 3, "m"))
    first, second = (make_inputs([spec], {"n": 2, "m": 5}, 7)["x"] for _ in range(2))
    assert first.shape == (2, 3, 5)
    assert first.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
    assert first.flags.c_contiguous
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first.astype(np.float64))) > 1


def test_streams_differ_by_seed_and_name_and_not_by_neighbours() -> None:
    x, y = InputSpec("x", "float32", (64,)), InputSpec("y", "float32", (64,))
    both = make_inputs([x, y], {}, 0)
    assert not np.array_equal(both["x"], both["y"])
    assert not np.array_equal(both["x"], make_inputs([x], {}, 1)["x"])
    np.testing.assert_array_equal(both["y"], make_inputs([y], {}, 0)["y"])


def test_values_are_inclusive() -> None:
    ids = make_inputs([InputSpec("ids", "int64", (1000,), ValueRange(3, 5))], {}, 0)["ids"]
    assert set(ids.tolist()) == {3, 4, 5}
    floats = make_inputs([InputSpec("x", "float32", (1000,), ValueRange(-2, 2))], {}, 0)["x"]
    assert floats.min() >= -2
    assert floats.max() <= 2
    assert floats.std() > 1


def test_defaults() -> None:
    ids = make_inputs([InputSpec("ids", "int32", (100,))], {}, 0)["ids"]
    assert set(ids.tolist()) == {0, 1}
    normal = make_inputs([InputSpec("x", "float32", (10_000,))], {}, 0)["x"]
    assert abs(normal.mean()) < 0.05
    assert abs(normal.std() - 1) < 0.05


@pytest.mark.parametrize(("values", "expected"), [((1, 1), {True}), ((0, 0), {False}), (None, {True, False})])
def test_bools(values: tuple[int, int] | None, expected: set[bool]) -> None:
    spec = InputSpec("mask", "bool", (100,), None if values is None else ValueRange(*values))
    assert set(make_inputs([spec], {}, 0)["mask"].tolist()) == expected


def test_what_cannot_be_generated() -> None:
    with pytest.raises(ConfigError, match="'n', which has no range"):
        make_inputs([InputSpec("x", "float32", ("n",))], {}, 0)
    with pytest.raises(ConfigError, match="do not fit uint8"):
        make_inputs([InputSpec("x", "uint8", (2,), ValueRange(-1, 4))], {}, 0)
