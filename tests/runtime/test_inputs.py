from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.inputs import has_extremes, make_inputs
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


def test_extremes_take_both_ends_in_blocks_and_nothing_else() -> None:
    picture = InputSpec("x", "float32", ("n", 3, 16, 16), ValueRange(-1, 2))
    found = make_inputs([picture], {"n": 64}, 0, extreme=True)["x"]
    assert set(np.unique(found)) == {-1, 2}
    shares = (found == 2).mean(axis=(1, 2, 3))
    assert shares.min() < 0.1
    assert shares.max() > 0.9
    whole = found.reshape(64, 3, 2, 8, 2, 8)
    assert (whole.max(axis=(3, 5)) == whole.min(axis=(3, 5))).all(axis=(1, 2, 3)).any(), "some rows have blocks of 8"
    np.testing.assert_array_equal(found, make_inputs([picture], {"n": 64}, 0, extreme=True)["x"])


@pytest.mark.parametrize("shape", [(), (5,), ("n", 7), (0, 3)])
def test_extremes_have_any_rank(shape: tuple[int | str, ...]) -> None:
    found = make_inputs([InputSpec("x", "bfloat16", shape, ValueRange(0, 1))], {"n": 2}, 0, extreme=True)["x"]
    assert found.shape == tuple(2 if dim == "n" else dim for dim in shape)
    assert found.dtype == ml_dtypes.bfloat16


def test_only_floats_with_values_have_extremes() -> None:
    normal, ids = InputSpec("x", "float32", (9,)), InputSpec("i", "int64", (9,), ValueRange(0, 9))
    assert not has_extremes([normal, ids])
    assert has_extremes([normal, InputSpec("z", "float32", (9,), ValueRange(0, 1))])
    for name, array in make_inputs([normal, ids], {}, 3).items():
        np.testing.assert_array_equal(array, make_inputs([normal, ids], {}, 3, extreme=True)[name])
