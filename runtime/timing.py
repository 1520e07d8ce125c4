"""How long calls take on a GPU: several sides take turns in one run, so that what else the machine does hits all."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

__all__ = ["DEFAULT_EFFORT", "Call", "Effort", "Gpu", "Timing", "time_sides"]

Call = Callable[[], Any]
"""One run of a model on inputs that stay; it may return before the GPU is done."""

_LEAST_CALLS = 10
_MOST_LATENCIES = 200


class Gpu(Protocol):
    """What is asked of the GPU; a test puts a fake here."""

    def time_ms(self, run: Callable[[], object]) -> float:
        """Milliseconds between events before and after what `run` puts on the current stream; waits for the latter."""
        ...

    def used_bytes(self) -> int:
        """Memory of the GPU that is in use, by any process; caches of freed memory are emptied first."""
        ...


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: `rounds` in which every side lasts about `round_ms`, once one by one and once queued."""

    rounds: int = 7
    round_ms: float = 80.0
    warm_up: int = 10


DEFAULT_EFFORT = Effort()


@dataclass(frozen=True, slots=True)
class Timing:
    """One side's figures in milliseconds.

    Attributes:
        median_ms: Latency: one call, waited for before the next.
        p90_ms: Of the latencies.
        p99_ms: Of the latencies.
        queued_ms: A call out of many that are given to the GPU without waiting: the reciprocal of throughput. The
            median of the rounds.
        latencies: How many single calls were timed.
    """

    median_ms: float
    p90_ms: float
    p99_ms: float
    queued_ms: float
    latencies: int

    def to_json(self) -> dict[str, Any]:
        """As `bench --json` holds it."""
        return asdict(self)


def time_sides(sides: Mapping[str, Call], gpu: Gpu, effort: Effort = DEFAULT_EFFORT) -> dict[str, Timing]:
    """Times every side, by turns, round by round.

    Args:
        sides: Calls by name.
        gpu: Where they run.
        effort: How long.

    Returns:
        By name.
    """
    counts = {name: _calibrate(call, gpu, effort) for name, call in sides.items()}
    single: dict[str, list[float]] = {name: [] for name in sides}
    queued: dict[str, list[float]] = {name: [] for name in sides}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection in the middle of one side's round would be that side's p99
    try:
        for _ in range(effort.rounds):
            for name, call in sides.items():
                count = counts[name]
                queued[name].append(gpu.time_ms(_repeat(call, count)) / count)
                single[name] += [gpu.time_ms(call) for _ in range(min(count, _MOST_LATENCIES))]
    finally:
        if collecting:
            gc.enable()
    return {name: _summarize(single[name], queued[name]) for name in sides}


def _calibrate(call: Call, gpu: Gpu, effort: Effort) -> int:
    for _ in range(effort.warm_up):
        call()
    once = gpu.time_ms(_repeat(call, _LEAST_CALLS)) / _LEAST_CALLS
    return max(_LEAST_CALLS, int(effort.round_ms / once) if once > 0 else _MOST_LATENCIES)


def _repeat(call: Call, count: int) -> Call:
    def run() -> None:
        for _ in range(count):
            call()

    return run


def _summarize(single: Sequence[float], queued: Sequence[float]) -> Timing:
    ordered = sorted(single)
    return Timing(
        statistics.median(ordered),
        _quantile(ordered, 0.90),
        _quantile(ordered, 0.99),
        statistics.median(queued),
        len(ordered),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The least value that at least this share of all values does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
