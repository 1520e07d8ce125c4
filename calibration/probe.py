"""A few samples that stand for the data: those with the smallest hashes, whatever their order, batches or shards."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from trtforge.calibration.stream import hash_sample, split_units, splits_samples
from trtforge.runtime.graph import OnnxModel
from trtforge.runtime.runner import Tensors

__all__ = ["PROBE", "choose_samples"]

PROBE = 128
"""Samples kept in memory for what needs several looks at the same data."""


def choose_samples(model: OnnxModel, batches: Iterable[Tensors], count: int = PROBE) -> list[Tensors]:
    """Reads all data and keeps `count` samples, in the order of their hashes.

    Args:
        model: Says whether batches can be split into samples; whole batches are kept where they cannot.
        batches: Inputs by name, as `read_batches` gives them.
        count: How many to keep.

    Raises:
        Exception: whatever `batches` raises, as it is.
    """
    kept: dict[int, Tensors] = {}
    smallest: list[int] = []  # negated: the largest hash kept comes first
    for unit in split_units(batches, by_sample=splits_samples(model, "cpu")):
        number = hash_sample(unit.feeds)
        if number in kept:
            continue
        if len(smallest) == count:
            if number >= -smallest[0]:
                continue
            del kept[-heapq.heapreplace(smallest, -number)]
        else:
            heapq.heappush(smallest, -number)
        # A view would hold on to its whole batch.
        kept[number] = {name: array.copy() for name, array in unit.feeds.items()}
    return [kept[number] for number in sorted(kept)]
