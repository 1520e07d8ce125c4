"""What goes in and out of a model: dtypes, shapes with named dimensions, and the ranges of those dimensions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtforge.runtime.errors import ConfigError

__all__ = [
    "DTYPES",
    "DimRange",
    "InputSpec",
    "Profile",
    "TensorSpec",
    "ValueRange",
    "is_dim_name",
    "profile_points",
    "resolve_shape",
]

DTYPES: Mapping[str, int] = {
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "int8": 1, "uint8": 1, "int32": 4, "int64": 8, "bool": 1,
}  # fmt: skip
"""Element types by their numpy/torch name, and their size in bytes."""

_NO_NAME = re.compile(r"\s*(unk__\d+|\?|-\d+|none)?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DimRange:
    """The sizes one dynamic dimension takes in one optimization profile, inclusive.

    Raises:
        ConfigError: unless 1 <= min <= opt <= max.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ConfigError(
                f"dimension range [{self.min}, {self.opt}, {self.max}] is not 1 <= min <= opt <= max",
                fix="write [min, opt, max] in ascending order, starting at 1 or more",
            )


Profile = Mapping[str, DimRange]
"""One optimization profile: the range of each named dimension."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (a key of `DTYPES`) and shape of one input or output; a `str` in it names a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def to_json(self) -> dict[str, Any]:
        """`{"name", "dtype", "shape"}`, as manifests hold it."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        """The inverse of `to_json`."""
        return cls(str(data["name"]), str(data["dtype"]), tuple(data["shape"]))


@dataclass(frozen=True, slots=True)
class ValueRange:
    """The values that generated inputs take, both ends included; for `bool`, `min == max == 1` means all true."""

    min: float
    max: float


@dataclass(frozen=True, slots=True)
class InputSpec(TensorSpec):
    """An input, and what may be generated for it.

    Attributes:
        values: The range of its values; None: standard normal, or small integers.
        elements: Where its values decide shapes: each of them, in order, a number or the name of the dimension that it
            is. Empty: its values are mere data.
    """

    values: ValueRange | None = None
    elements: tuple[int | str, ...] = ()

    @property
    def dims(self) -> frozenset[str]:
        """The dimensions that its shape or its values name."""
        return frozenset(dim for dim in (*self.shape, *self.elements) if isinstance(dim, str))


def resolve_shape(shape: Sequence[int | str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The concrete shape once every named dimension has a size.

    Raises:
        KeyError: a name in `shape` that `sizes` lacks.
    """
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in shape)


def profile_points(profile: Profile) -> dict[str, dict[str, int]]:
    """`{"min": sizes, "opt": sizes, "max": sizes}` of one profile."""
    return {end: {name: getattr(dim, end) for name, dim in profile.items()} for end in ("min", "opt", "max")}


def is_dim_name(text: str) -> bool:
    """Whether axes that bear this name in an ONNX file are of one size.

    tf2onnx and onnx's own shape inference write `unk__7`, others `?`, `-1`, `None` or nothing where a size is unknown,
    on any axis.
    """
    return _NO_NAME.fullmatch(text) is None
