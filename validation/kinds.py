"""The kinds of error that a layer is blamed for, and how noise is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["Kind", "Symptom", "decibels"]

Kind = Literal["graph", "overflow", "underflow", "clipping", "rounding", "cancellation"]


@dataclass(frozen=True, slots=True)
class Symptom:
    """What is wrong with a piece: `reason` is a clause for people, with the numbers."""

    kind: Kind
    reason: str


def decibels(noise: float) -> str:
    """A noise-to-signal ratio as SQNR: "31.2 dB", "exact", "NaN or Inf"."""
    if math.isinf(noise):
        return "NaN or Inf"
    return f"{-10 * math.log10(noise):.1f} dB" if noise else "exact"
