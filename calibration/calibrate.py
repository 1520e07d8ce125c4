"""Calibration from end to end: data in, ranges out, through the cache where that still holds."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtforge.calibration.auto import choose_ranges, describe_method, made_from
from trtforge.calibration.cache import differences, load_ranges, save_ranges
from trtforge.calibration.collect import Collected, OnSamples, Shard, collect, scan
from trtforge.calibration.histogram import Histogram
from trtforge.calibration.loaders import read_batches
from trtforge.calibration.ranges import Method, Ranges
from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.graph import OnnxModel
from trtforge.runtime.runner import Array
from trtforge.runtime.specs import InputSpec, Profile

__all__ = ["Calibrated", "Smoothed", "calibrate", "run_shard"]


@dataclass(frozen=True, slots=True)
class Smoothed:
    """Where a smoothed graph comes from: the hash of the graph as exported, and the factors (`smoothing`)."""

    graph: str
    factors: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Ranges, and how they came about.

    Attributes:
        ranges: A range for every tensor asked for.
        reused: They come from the cache, and nothing ran.
        why_not: Why the cache was not used, where there is one.
        histograms: What the thresholds were chosen from; empty where the cache was used.
    """

    ranges: Ranges
    reused: bool
    why_not: tuple[str, ...]
    histograms: Mapping[str, Histogram]


def calibrate(
    model: OnnxModel,
    tensors: Sequence[str],
    source: object,
    specs: Sequence[InputSpec],
    profiles: Sequence[Profile] = (),
    *,
    method: Method = "auto",
    batches: int | None = None,
    cache: Path | None = None,
    provider: str = "cpu",
    smoothed: Smoothed | None = None,
    on_samples: OnSamples | None = None,
) -> Calibrated:
    """The ranges of `tensors` in the float model, over the data of `source`.

    Args:
        model: The float model.
        tensors: What placement says is to be measured.
        source: Anything that `read_batches` takes.
        specs: The model's inputs.
        profiles: The shapes allowed.
        method: "auto", "entropy", "percentile", "mse" or "max".
        batches: How many batches to read at most; None reads all.
        cache: A `calibration.json`. It is reused where model, data, shapes, method, provider and versions are the same,
            and written where they are not. The data is read and hashed for that; an iterator, which can be read only
            once, is calibrated on in any case.
        provider: "cpu" or "cuda".
        smoothed: What `model` was made from, by dividing tensors; None where it is the graph as exported.
        on_samples: Told how many samples have run.

    Raises:
        CalibrationError, ConfigError: as `read_batches`, `collect` and `choose_ranges`.
        ArtifactError: the cache cannot be written.
        Exception: whatever the source raises, as it is.
    """
    describe_method(method)
    read = functools.partial(_read, source, specs, profiles, batches)
    why_not: tuple[str, ...] = ()
    if cache is not None and cache.exists():
        cached, why_not = _look(cache, model, tensors, source, read, method, provider, smoothed)
        if cached is not None:
            return Calibrated(cached, True, (), {})
    collected = collect(model, tensors, read(), provider=provider, on_samples=on_samples)
    _mark(collected, smoothed)
    ranges = choose_ranges(collected, method)
    if cache is not None:
        save_ranges(cache, ranges)
    return Calibrated(ranges, False, why_not, collected.histograms)


def _read(
    source: object, specs: Sequence[InputSpec], profiles: Sequence[Profile], batches: int | None
) -> Iterator[dict[str, Array]]:
    return read_batches(source, specs, profiles, batches)


def _look(
    cache: Path,
    model: OnnxModel,
    tensors: Sequence[str],
    source: object,
    read: functools.partial[Iterator[dict[str, Array]]],
    method: Method,
    provider: str,
    smoothed: Smoothed | None,
) -> tuple[Ranges | None, tuple[str, ...]]:
    try:
        cached = load_ranges(cache)
    except ArtifactError as error:
        return None, (error.what,)
    if isinstance(source, Iterator):
        return None, ("the data is an iterator, which cannot be read a second time to compare it",)
    graph = smoothed.graph if smoothed is not None else model.hash
    if cached.made_from.graph != graph:  # no need to read the data
        return None, (f"the model was {cached.made_from.graph[:12]!r} and is {graph[:12]!r}",)
    wanted: Collected = scan(model, read(), provider=provider)
    _mark(wanted, smoothed)
    found = differences(cached, made_from(wanted, describe_method(method)), tensors, wanted.smoothing)
    return (None, found) if found else (cached.select(tensors), ())


def _mark(collected: Collected, smoothed: Smoothed | None) -> None:
    if smoothed is not None:
        collected.graph, collected.smoothing = smoothed.graph, smoothed.factors


def run_shard(
    model: OnnxModel,
    tensors: Sequence[str],
    source: object,
    specs: Sequence[InputSpec],
    shard: Shard,
    profiles: Sequence[Profile] = (),
    *,
    batches: int | None = None,
    provider: str = "cpu",
    smoothed: Smoothed | None = None,
    on_samples: OnSamples | None = None,
) -> Collected:
    """The state of one part of the data, for `save_part`; arguments and errors as for `calibrate`."""
    data = read_batches(source, specs, profiles, batches)
    collected = collect(model, tensors, data, provider=provider, shard=shard, on_samples=on_samples)
    _mark(collected, smoothed)
    return collected
