"""One pass over the data: every batch runs through the float model once and leaves nothing but histograms behind."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from trtforge.calibration.histogram import Histogram, merge
from trtforge.calibration.stream import (
    OnSamples,
    Unit,
    count_workers,
    hash_sample,
    run_units,
    split_units,
    splits_samples,
)
from trtforge.calibration.tally import Tally
from trtforge.calibration.taps import Taps
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.graph import OnnxModel
from trtforge.runtime.onnx_runner import onnxruntime_version
from trtforge.runtime.runner import Array, Tensors

__all__ = ["Collected", "OnSamples", "Shard", "collect", "merge_collected", "scan"]

_HASH_BITS = 256


@dataclass(frozen=True, slots=True)
class Shard:
    """The `index`-th of `total` equal parts of the data, counted from 1: samples are dealt out in turn.

    Raises:
        CalibrationError: unless 1 <= index <= total.
    """

    index: int = 1
    total: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.total:
            raise CalibrationError(f"shard {self.index}/{self.total} does not exist", fix="shards are 1/N to N/N")

    def holds(self, unit: int) -> bool:
        """Whether the unit with this number, from 0, belongs to it."""
        return unit % self.total == self.index - 1


@dataclass(slots=True)
class Collected:
    """What a pass over data found, exactly; `merge_collected` puts several together.

    Attributes:
        histograms: One for each tensor.
        samples: How many samples ran.
        data: Sum modulo 2**256 of the SHA-256 of every sample: equal data in any order has an equal sum.
        shapes: For each input, the shapes that samples had, batch left out.
        graph: `graph_hash` of the model.
        batch: "sample" where samples ran one at a time, "loader" where they ran in the loader's batches.
        provider: The onnxruntime provider.
        onnxruntime: Its version.
        shards: The parts of the data in it.
        smoothing: What `graph` was smoothed by before it ran; see `Ranges`.
    """

    histograms: dict[str, Histogram]
    samples: int = 0
    data: int = 0
    shapes: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    graph: str = ""
    batch: str = "sample"
    provider: str = ""
    onnxruntime: str = ""
    shards: tuple[Shard, ...] = (Shard(),)
    smoothing: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def collect(
    model: OnnxModel,
    tensors: Sequence[str],
    batches: Iterable[Tensors],
    *,
    provider: str = "cpu",
    shard: Shard = Shard(),
    by_sample: bool | None = None,
    workers: int | None = None,
    on_samples: OnSamples | None = None,
) -> Collected:
    """Runs the float model over the data and gathers a histogram of every tensor asked for.

    Args:
        model: The float model.
        tensors: Values of its main graph.
        batches: Inputs by name, as `read_batches` gives them; read once, and no further ahead than the workers need.
        provider: "cpu" or "cuda".
        shard: Which part of the samples (of the batches, where they cannot be split) to run; all of them are read.
        by_sample: Split batches into samples. None does where every input begins with one and the same dynamic
            dimension, and the provider is the CPU.
        workers: Samples to run side by side; None is the number of usable cores, 8 at most.
        on_samples: Told how many samples have run.

    Returns:
        The state, which depends on the multiset of samples alone.

    Raises:
        CalibrationError: no such tensor, activations that are not finite (tensor and batch are named), or no samples.
        ParityError: onnxruntime failed on a batch.
        Exception: whatever `batches` raises, as it is.
    """
    if by_sample is None:
        by_sample = splits_samples(model, provider)
    count = (workers if by_sample else None) or count_workers(by_sample=by_sample)
    units = split_units(batches, by_sample=by_sample)
    mine = (unit for number, unit in enumerate(units) if shard.holds(number))
    with ThreadPoolExecutor(1, thread_name_prefix="taps") as aside:
        making = aside.submit(Taps, model.path, tensors, threads=1 if by_sample else None, provider=provider)
        try:
            first = list(itertools.islice(mine, 1))  # the loader begins while the session is made
        finally:
            taps = making.result()
    for unit in first:
        taps.settle(unit.feeds)
    found = _run(taps, tensors, itertools.chain(first, mine), count, on_samples)
    if found.samples == 0:
        raise CalibrationError(
            f"shard {shard.index}/{shard.total} has no samples",
            why="there are fewer samples than shards" if shard.total > 1 else "the data is empty",
            fix="use fewer shards, or more data",
        )
    found.graph, found.batch = model.hash, "sample" if by_sample else "loader"
    found.provider, found.onnxruntime, found.shards = provider, onnxruntime_version(), (shard,)
    return found


def scan(model: OnnxModel, batches: Iterable[Tensors], *, provider: str = "cpu") -> Collected:
    """What `collect` would say of the data, without running the model: no histograms, but samples, hash and shapes."""
    by_sample = splits_samples(model, provider)
    found = Collected({})
    for unit in split_units(batches, by_sample=by_sample):
        _note(found, unit)
    found.graph, found.batch, found.provider = model.hash, "sample" if by_sample else "loader", provider
    found.onnxruntime = onnxruntime_version()
    return found


def merge_collected(parts: Sequence[Collected]) -> Collected:
    """What one pass over the data of all parts would have found, to the bit.

    Raises:
        CalibrationError: parts of different models, tensors, providers, versions or divisions of the data; a part that
            is missing, or there twice.
    """
    if not parts:
        raise CalibrationError("there are no parts to merge", fix="give the files that `--shard` wrote")
    first = parts[0]
    for part in parts[1:]:
        _check_same(first, part)
    shards = tuple(sorted((s for part in parts for s in part.shards), key=lambda s: (s.total, s.index)))
    _check_complete(shards)
    whole = Collected(
        dict(first.histograms),
        graph=first.graph,
        batch=first.batch,
        provider=first.provider,
        onnxruntime=first.onnxruntime,
        shards=shards,
        smoothing=first.smoothing,
    )
    for part in parts:
        _add(whole, part, histograms=part is not first)
    return whole


def _add(whole: Collected, part: Collected, *, histograms: bool = True) -> None:
    if histograms:
        for name, histogram in part.histograms.items():
            whole.histograms[name] = merge(whole.histograms[name], histogram)
    whole.samples += part.samples
    whole.data = (whole.data + part.data) % (1 << _HASH_BITS)
    for name, shapes in part.shapes.items():
        whole.shapes.setdefault(name, set()).update(shapes)


def _check_same(first: Collected, other: Collected) -> None:
    for what, mine, theirs in (
        ("models", first.graph[:12], other.graph[:12]),
        ("tensors", sorted(first.histograms), sorted(other.histograms)),
        ("providers", first.provider, other.provider),
        ("versions of onnxruntime", first.onnxruntime, other.onnxruntime),
        ("smoothing factors of tensors", sorted(first.smoothing.items()), sorted(other.smoothing.items())),
        ("ways to batch", first.batch, other.batch),
        ("numbers of shards", {s.total for s in first.shards}, {s.total for s in other.shards}),
    ):
        if mine != theirs:
            raise CalibrationError(
                f"the parts come from different {what}: {mine} and {theirs}",
                why="their sum would be the state of no run",
                fix="run all shards with one model, one configuration and one version of onnxruntime",
            )


def _check_complete(shards: Sequence[Shard]) -> None:
    total = shards[0].total
    have = [shard.index for shard in shards]
    twice = sorted({index for index in have if have.count(index) > 1})
    missing = sorted(set(range(1, total + 1)) - set(have))
    if twice or missing:
        what = f"{'twice' if twice else 'missing'}: shard {', '.join(f'{i}/{total}' for i in twice or missing)}"
        raise CalibrationError(f"the parts are not the whole data; {what}", fix="merge each of the shards once")


@dataclass(slots=True)
class _Seat:
    """What a worker has to itself; `state` has no histograms yet."""

    read: Callable[[Tensors], Iterator[dict[str, Array]]]
    state: Collected = field(default_factory=lambda: Collected({}))
    tallies: dict[tuple[str, ...], Tally] = field(default_factory=dict)
    """By the tensors that come together."""

    def add(self, unit: Unit) -> None:
        """Runs it, and counts every element of every tensor."""
        for tensors in self.read(unit.feeds):
            names = tuple(tensors)
            tally = self.tallies.get(names) or self.tallies.setdefault(names, Tally(names))
            tally.add(tensors, unit.where)
        _note(self.state, unit)


def _run(
    taps: Taps, tensors: Sequence[str], units: Iterable[Unit], workers: int, on_samples: OnSamples | None
) -> Collected:
    seats: queue.SimpleQueue[_Seat] = queue.SimpleQueue()
    for _ in range(workers):
        seats.put(_Seat(taps.reader()))

    def work(unit: Unit) -> int:
        seat = seats.get()
        try:
            seat.add(unit)
        finally:
            seats.put(seat)
        return unit.samples

    run_units(units, work, workers, on_samples)
    whole = Collected({name: Histogram() for name in tensors})
    for _ in range(workers):
        seat = seats.get()
        _add(whole, seat.state)
        for tally in seat.tallies.values():
            _add(whole, Collected(tally.histograms()))
    return whole


def _note(state: Collected, unit: Unit) -> None:
    state.samples += unit.samples
    state.data = (state.data + hash_sample(unit.feeds)) % (1 << _HASH_BITS)
    for name, feed in unit.feeds.items():
        state.shapes.setdefault(name, set()).add(feed.shape[1:])
