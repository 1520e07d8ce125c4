"""Which batch size serves the most within a limit of latency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trtforge.runtime.timing import Timing

__all__ = ["Tuned", "tune_batch"]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a search for the batch size found.

    Attributes:
        limit_ms: Asked of the 99th percentile of latency.
        batch: The size within the limit that serves the most items a second; None where not even the least is.
        tried: Timings by batch size, ascending.
    """

    limit_ms: float
    batch: int | None
    tried: dict[int, Timing]


def tune_batch(measure: Callable[[int], Timing], low: int, high: int, limit_ms: float) -> Tuned:
    """Doubles the batch until its p99 exceeds the limit, then halves the gap; O(log high) measurements.

    Latency is taken to grow with the batch, throughput is not: GPUs like some sizes better than the next larger one. So
    the answer is the best of all that were measured, not the largest that fits.

    Args:
        measure: Times one batch size.
        low: The least batch size that the engine takes.
        high: The largest.
        limit_ms: What the 99th percentile of latency may be, in milliseconds.
    """
    tried: dict[int, Timing] = {}

    def fits(batch: int) -> bool:
        if batch not in tried:
            tried[batch] = measure(batch)
        return tried[batch].p99_ms <= limit_ms

    good, bad = 0, high + 1
    batch = low
    while batch < bad:
        if not fits(batch):
            bad = batch
            break
        good = batch
        if batch == high:
            break
        batch = min(2 * batch, high)
    while good and bad - good > max(1, good // 16):  # closer is within the noise of a measurement
        middle = (good + bad) // 2
        if middle > high:
            break
        if fits(middle):
            good = middle
        else:
            bad = middle
    within = [size for size, timing in tried.items() if timing.p99_ms <= limit_ms]
    best = max(within, key=lambda size: size / tried[size].queued_ms, default=None)
    return Tuned(limit_ms, best, dict(sorted(tried.items())))
