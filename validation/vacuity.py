"""Whether a comparison could have shown a difference at all. What could not is "not proved", never "passed"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from trtforge.runtime.runner import Array, Tensors
from trtforge.validation.metrics import Sums, add_sums, sum_errors

__all__ = [
    "LEAST_CONTRAST_DB",
    "Doubt",
    "Pair",
    "contrast",
    "different_inputs",
    "telling_pairs",
    "why_constant",
    "why_unresolved",
]

LEAST_CONTRAST_DB = 20 * math.log10(2)
"""How far, in dB, the error must be below the difference between the reference's outputs for two inputs.

If |c - r1| < |r1 - r2| / 2 then c is nearer to r1 than to r2 (triangle inequality): the candidate's answer is known to
be the answer to its own input. SQNR alone does not tell: a randomly initialised ResNet-50 answers any two noise images
35 dB alike, so its answers to pictures with red and blue swapped would meet a limit of 30 dB (measured).
"""

Pair = tuple[int, int]


class Doubt(NamedTuple):
    """Why a comparison proves nothing, and what to do about it."""

    reason: str
    fix: str


_PAIRS = 12
_ALIVE = (
    "prove a model that computes something: give it trained weights (`checkpoint`), or initialise the layers that are "
    "zero, such as the heads of torchvision's ViT; an output that is so by design belongs in `fixed_outputs`"
)


def different_inputs(inputs: Sequence[Tensors]) -> list[Pair]:
    """Pairs of samples whose inputs differ, in shape or in a value."""
    return [pair for pair in combinations(range(len(inputs)), 2) if _differ(inputs[pair[0]], inputs[pair[1]])]


def telling_pairs(different: Sequence[Pair], shapes: Sequence[tuple[int, ...]]) -> list[Pair]:
    """Pairs of samples that show whether an output of these shapes depends on the inputs' values; at most twelve.

    Samples of one shape where there are any: what differs between shapes may come from the sizes alone. Else any two of
    `different`, which are then compared over the corner that they share.
    """
    alike = [(a, b) for a, b in different if shapes[a] == shapes[b]]
    found = alike or [(a, b) for a, b in different if len(shapes[a]) == len(shapes[b])]
    return found[:_PAIRS]


def contrast(arrays: Sequence[Array], pairs: Sequence[Pair]) -> Sums:
    """How far the arrays of each pair are from one another, over the corner of both that has the same indices."""
    total = Sums()
    for a, b in pairs:
        corner = tuple(slice(min(m, n)) for m, n in zip(arrays[a].shape, arrays[b].shape, strict=True))
        total = add_sums(total, sum_errors(arrays[a][corner], arrays[b][corner]))
    return total


def why_constant(pooled: Sums) -> Doubt | None:
    """A doubt where the reference holds nothing to compare: it is empty, or one value everywhere."""
    if pooled.count == 0:
        return Doubt("it is empty in every sample", "prove on sizes and inputs for which it holds something")
    if pooled.finite and pooled.reference_min == pooled.reference_max:
        value = f"{pooled.reference_min:g}" if pooled.reference_min else "0"
        return Doubt(f"the reference is {value} everywhere", _ALIVE)
    return None


def why_unresolved(pooled: Sums, between: Sums, *, pairs: int) -> Doubt | None:
    """A doubt where the samples do not show that the candidate answers its own input.

    Args:
        pooled: Candidate against reference, all samples.
        between: `contrast` of the reference's outputs.
        pairs: How many pairs that is over.
    """
    if not pairs or not between.finite:
        return Doubt(
            "there are no two samples with different inputs to show that it depends on them",
            "record at least two samples whose inputs differ",
        )
    if between.error_sq == 0:
        return Doubt("the reference is the same whatever the input", _ALIVE)
    error = pooled.error_sq / pooled.finite if pooled.finite else 0.0
    difference = between.error_sq / between.finite
    if error == 0 or 10 * math.log10(difference / error) >= LEAST_CONTRAST_DB:
        return None
    return Doubt(
        f"candidate and reference are nearly as far apart as the reference's outputs for two inputs "
        f"({10 * math.log10(difference / error):.1f} dB less, {LEAST_CONTRAST_DB:.0f} dB are needed)",
        "either the candidate is wrong, or this model hardly tells these inputs apart: prove it with trained weights "
        "on real inputs (a loader), or in a more exact precision",
    )


def _differ(a: Tensors, b: Tensors) -> bool:
    return any(name not in b or not np.array_equal(array, b[name]) for name, array in a.items())
