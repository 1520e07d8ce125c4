"""Seeded inputs from specs: what examples, golden sets and benchmarks run on where the user gave no data."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.runner import Array
from trtforge.runtime.specs import DTYPES, InputSpec, ValueRange, resolve_shape

__all__ = ["has_extremes", "make_inputs", "numpy_dtype"]

_BLOCKS = (1, 2, 4, 8)
_DEFAULT_INTEGERS = (0, 1)
"""Both ends included: indices into any table of two rows or more, and class or segment ids, are then legal."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a key of `DTYPES`; bfloat16 is `ml_dtypes.bfloat16`.

    Raises:
        ConfigError: not a key of `DTYPES`.
    """
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def has_extremes(specs: Sequence[InputSpec]) -> bool:
    """Whether a floating input has `values`, whose ends `make_inputs(..., extreme=True)` can go to."""
    return any(_has_ends(spec) for spec in specs)


def make_inputs(
    specs: Sequence[InputSpec], sizes: Mapping[str, int], seed: int, *, extreme: bool = False
) -> dict[str, Array]:
    """One set of inputs, equal for equal arguments on every machine.

    Floats are standard normal, or uniform over `values`. Integers are uniform over `values`, both ends included, or
    over {0, 1} without; `elements` are the sizes themselves. `bool` is True or False with equal chance; `values` with
    `min == max` makes it all one of them.
    Each tensor has a stream of its own, from the seed and its name: adding an input changes no other one.

    Args:
        specs: The inputs.
        sizes: The size of every dimension that the shapes name.
        seed: Any integer >= 0.
        extreme: Floats with `values` take both ends alone, in patterns: each row along the first axis has a share of
            high values of its own, in blocks of 1, 2, 4 or 8 along the last two axes. Uniform noise averages out in the
            first layer that sums it; these drive activations as far as legal inputs can.

    Returns:
        By name, C-contiguous, of the spec's dtype and resolved shape.

    Raises:
        ConfigError: a named dimension without a size, or values that the dtype cannot hold.
    """
    return {spec.name: _make_input(spec, sizes, seed, extreme) for spec in specs}


def _make_input(spec: InputSpec, sizes: Mapping[str, int], seed: int, extreme: bool) -> Array:
    shape, elements = (_resolve(spec, dims, sizes) for dims in (spec.shape, spec.elements))
    dtype = numpy_dtype(spec.dtype)
    if spec.elements:
        return np.array(elements, dtype).reshape(shape)
    random = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    if spec.dtype == "bool":
        return _booleans(random, shape, spec)
    if np.issubdtype(dtype, np.integer):
        low, high = _integer_bounds(spec, dtype)
        return random.integers(low, high, shape, dtype=dtype, endpoint=True)
    if spec.values is None:
        return random.standard_normal(shape, np.float32).astype(dtype)
    if extreme and _has_ends(spec):
        return _patterns(random, shape, spec.values).astype(dtype)
    return random.uniform(spec.values.min, spec.values.max, shape).astype(dtype)


def _resolve(spec: InputSpec, dims: Sequence[int | str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    try:
        return resolve_shape(dims, sizes)
    except KeyError as missing:
        raise ConfigError(
            f"input {spec.name!r} of shape {list(spec.shape)} names the dimension {missing}, which has no range",
            fix=f"add it to `dims`; known: {', '.join(sizes) or 'none'}",
        ) from None


def _has_ends(spec: InputSpec) -> bool:
    return "float" in spec.dtype and spec.values is not None and spec.values.min < spec.values.max


def _patterns(random: np.random.Generator, shape: tuple[int, ...], values: ValueRange) -> NDArray[np.float64]:
    if not shape:
        return np.array(random.choice([values.min, values.max]))
    high = np.empty(shape, np.bool_)
    for row in range(shape[0]):
        block, share = int(random.choice(_BLOCKS)), random.uniform()
        inner = shape[1:]
        # Only the last two axes are places of a picture or steps of a sequence.
        factors = [block if axis >= len(inner) - 2 else 1 for axis in range(len(inner))]
        pattern = random.uniform(size=[-(-size // factor) for size, factor in zip(inner, factors, strict=True)]) < share
        for axis, factor in enumerate(factors):
            pattern = np.repeat(pattern, factor, axis).take(np.arange(inner[axis]), axis)
        high[row] = pattern
    return np.where(high, values.max, values.min)


def _booleans(random: np.random.Generator, shape: tuple[int, ...], spec: InputSpec) -> Array:
    low, high = (0, 1) if spec.values is None else (bool(spec.values.min), bool(spec.values.max))
    return random.integers(low, high, shape, dtype=np.uint8, endpoint=True).astype(np.bool_)


def _integer_bounds(spec: InputSpec, dtype: np.dtype[Any]) -> tuple[int, int]:
    if spec.values is None:
        return _DEFAULT_INTEGERS
    low, high = int(spec.values.min), int(spec.values.max)
    limits = np.iinfo(dtype)
    if not limits.min <= low <= high <= limits.max:
        raise ConfigError(
            f"input {spec.name!r}: values [{low}, {high}] do not fit {spec.dtype}",
            why=f"it holds {limits.min} to {limits.max}, and the lower end comes first",
        )
    return low, high
