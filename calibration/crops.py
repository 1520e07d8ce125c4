"""Samples cut to the smallest shapes that a profile allows, where the data show only others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trtforge.runtime.runner import Array, Tensors
from trtforge.runtime.specs import InputSpec, Profile, profile_points

__all__ = ["crop_sample", "smallest_shapes"]


def smallest_shapes(specs: Sequence[InputSpec], profiles: Sequence[Profile]) -> list[dict[str, int]]:
    """The min of every profile, each once.

    None where an input's values decide shapes (`InputSpec.elements`): cutting arrays alone would contradict them.
    """
    if any(spec.elements for spec in specs):
        return []
    found: list[dict[str, int]] = []
    for profile in profiles:
        sizes = profile_points(profile)["min"]
        if sizes and sizes not in found:
            found.append(sizes)
    return found


def crop_sample(feeds: Tensors, specs: Sequence[InputSpec], sizes: Mapping[str, int]) -> dict[str, Array] | None:
    """The start of a sample along every named dimension; None where it is that small already.

    Args:
        feeds: Arrays by input name.
        specs: Name the dimensions of each.
        sizes: How much is kept of each dimension.
    """
    cut = {
        spec.name: feeds[spec.name][
            tuple(slice(sizes.get(dim)) if isinstance(dim, str) else slice(None) for dim in spec.shape)
        ]
        for spec in specs
    }
    if all(array.shape == feeds[name].shape for name, array in cut.items()):
        return None
    return {name: np.ascontiguousarray(array) for name, array in cut.items()}
