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

__all__ = ["Calibrated", "calibrate", "run_shard"]


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
        cached, why_not = _look(cache, model, tensors, source, read, method, provider)
        if cached is not None:
            return Calibrated(cached, True, (), {})
    collected = collect(model, tensors, read(), provider=provider, on_samples=on_samples)
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
) -> tuple[Ranges | None, tuple[str, ...]]:
    try:
        cached = load_ranges(cache)
    except ArtifactError as error:
        return None, (error.what,)
    if isinstance(source, Iterator):
        return None, ("the data is an iterator, which cannot be read a second time to compare it",)
    if cached.made_from.graph != model.hash:  # no need to read the data
        return None, (f"the model was {cached.made_from.graph[:12]!r} and is {model.hash[:12]!r}",)
    wanted: Collected = scan(model, read(), provider=provider)
    found = differences(cached, made_from(wanted, describe_method(method)), tensors)
    return (None, found) if found else (cached.select(tensors), ())


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
    on_samples: OnSamples | None = None,
) -> Collected:
    """The state of one part of the data, for `save_part`; arguments and errors as for `calibrate`."""
    data = read_batches(source, specs, profiles, batches)
    return collect(model, tensors, data, provider=provider, shard=shard, on_samples=on_samples)
