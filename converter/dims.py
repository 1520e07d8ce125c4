"""Named dimensions over several profiles, and their names within a graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from trtforge.converter.values import all_values
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.specs import DimRange, InputSpec, Profile

__all__ = ["fix_static", "merge_profiles", "rename_dims"]


def merge_profiles(profiles: Sequence[Profile]) -> dict[str, DimRange]:
    """For each dimension the range that covers it in every profile; `opt` is the first profile's.

    Raises:
        ConfigError: a dimension that is in one profile and not in another, or whose name is no identifier.
    """
    merged: dict[str, DimRange] = {}
    for number, profile in enumerate(profiles):
        for name in sorted(set(profiles[0]) ^ set(profile)):
            raise ConfigError(
                f"dimension {name!r} is in one profile and not in another (profiles 0 and {number})",
                fix="give each profile a range for every dimension",
            )
        for name, dim in profile.items():
            if not name.isidentifier():  # torch.export.Dim takes no other
                raise ConfigError(f"dimension {name!r} is no name", fix="use letters, digits and underscores")
            first = merged.get(name, dim)
            merged[name] = DimRange(min(first.min, dim.min), first.opt, max(first.max, dim.max))
    return merged


def fix_static(specs: Iterable[InputSpec], dims: Mapping[str, DimRange]) -> list[InputSpec]:
    """The specs with each dimension that can have one size only as that size."""
    static = {name: dim.max for name, dim in dims.items() if dim.min == dim.max}
    return [replace(spec, shape=_fixed(spec.shape, static), elements=_fixed(spec.elements, static)) for spec in specs]


def _fixed(dims: Sequence[int | str], static: Mapping[str, int]) -> tuple[int | str, ...]:
    return tuple(static.get(dim, dim) if isinstance(dim, str) else dim for dim in dims)


def rename_dims(model: ir.Model, names: Mapping[str, str | int]) -> None:
    """Renames dimensions, or gives them a size, in the shape of every value; expressions of them (`2*s77`) too."""
    changed = {old: new for old, new in names.items() if old != new}
    if not changed:
        return
    pattern = re.compile(r"(?<!\w)(" + "|".join(re.escape(old) for old in sorted(changed, key=len)[::-1]) + r")(?!\w)")
    for value in all_values(model):
        if value.shape is not None and any(not isinstance(dim, int) for dim in value.shape):
            value.shape = ir.Shape([_renamed(dim, changed, pattern) for dim in value.shape])


def _renamed(
    dim: int | ir.SymbolicDim, names: Mapping[str, str | int], pattern: re.Pattern[str]
) -> int | str | ir.SymbolicDim:
    if isinstance(dim, int) or dim.value is None:
        return dim
    text = str(dim.value)
    return names[text] if text in names else pattern.sub(lambda match: str(names[match.group()]), text)
