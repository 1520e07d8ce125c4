"""One pass over the data: every batch runs through the float model once, and leaves nothing behind but histograms.

Where the batch is a dimension of its own, samples run one at a time, as many side by side as there are cores: kernels
choose their order of summation by the batch size, so this is what makes the result equal to the bit for any batch size;
it holds one sample's activations a core, not a batch's, and needs no synchronisation inside operators.
"""

from __future__ import annotations

import hashlib
import os
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from trtforge.calibration.histogram import Histogram, merge
from trtforge.calibration.taps import Taps
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.graph import OnnxModel
from trtforge.runtime.onnx_runner import onnxruntime_version
from trtforge.runtime.runner import Array, Tensors
from trtforge.runtime.specs import TensorSpec

__all__ = ["Collected", "OnSamples", "Shard", "collect", "merge_collected", "scan"]

OnSamples = Callable[[int], None]
"""Called in the caller's thread with the number of samples that have run so far."""

_MAX_WORKERS = 8
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
        by_sample = _splits(model, provider)
    count = (workers or min(_usable_cores(), _MAX_WORKERS)) if by_sample else 1
    taps = Taps(model.path, tensors, threads=1 if by_sample else None, provider=provider)
    units = _units(batches, by_sample=by_sample)
    mine = (unit for number, unit in enumerate(units) if shard.holds(number))
    found = _run(taps, tensors, mine, count, on_samples)
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
    by_sample = _splits(model, provider)
    found = Collected({})
    for unit in _units(batches, by_sample=by_sample):
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
        dict(first.histograms), 0, 0, {}, first.graph, first.batch, first.provider, first.onnxruntime, shards
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
class _Unit:
    """What runs at once: a sample or a batch, and how errors call it."""

    feeds: Tensors
    samples: int
    where: str


def _splits(model: OnnxModel, provider: str) -> bool:
    return _batch_dim(model.inputs) is not None and provider == "cpu"


def _batch_dim(inputs: Sequence[TensorSpec]) -> str | None:
    """The dynamic dimension with which every input begins."""
    first = {spec.shape[0] if spec.shape else None for spec in inputs}
    dim = first.pop() if len(first) == 1 else None
    return dim if isinstance(dim, str) and dim != "?" else None


def _units(batches: Iterable[Tensors], *, by_sample: bool) -> Iterator[_Unit]:
    for index, batch in enumerate(batches):
        size = min((array.shape[0] for array in batch.values() if array.ndim), default=1)
        if not by_sample:
            yield _Unit(batch, size, f"batch {index}")
            continue
        for row in range(size):
            feeds = {name: array[row : row + 1] for name, array in batch.items()}
            yield _Unit(feeds, 1, f"batch {index}, sample {row}")


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(
    taps: Taps, tensors: Sequence[str], units: Iterator[_Unit], workers: int, on_samples: OnSamples | None
) -> Collected:
    states: queue.SimpleQueue[Collected] = queue.SimpleQueue()
    for _ in range(workers):
        states.put(Collected({name: Histogram() for name in tensors}))

    def work(unit: _Unit) -> int:
        state = states.get()
        try:
            _take(state, taps.run(unit.feeds), unit)
        finally:
            states.put(state)
        return unit.samples

    done = 0
    waiting: deque[Future[int]] = deque()

    def finish_first() -> None:
        nonlocal done
        done += waiting.popleft().result()
        if on_samples is not None:
            on_samples(done)

    with ThreadPoolExecutor(workers, thread_name_prefix="calibrate") as pool:
        try:
            for unit in units:
                if done == 0 and not waiting:
                    taps.settle(unit.feeds)
                if len(waiting) > workers:  # one more than runs, so that no worker waits for the loader's thread
                    finish_first()
                waiting.append(pool.submit(work, unit))
            while waiting:
                finish_first()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    whole = states.get()
    for _ in range(workers - 1):
        _add(whole, states.get())
    return whole


def _take(state: Collected, activations: Mapping[str, Array], unit: _Unit) -> None:
    for name, array in activations.items():
        state.histograms[name].add(array, where=f"tensor {name!r} in {unit.where}")
    _note(state, unit)


def _note(state: Collected, unit: _Unit) -> None:
    state.samples += unit.samples
    state.data = (state.data + _hash(unit.feeds)) % (1 << _HASH_BITS)
    for name, feed in unit.feeds.items():
        state.shapes.setdefault(name, set()).add(feed.shape[1:])


def _hash(feeds: Tensors) -> int:
    digest = hashlib.sha256()
    for name in sorted(feeds):
        array = feeds[name]
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return int.from_bytes(digest.digest(), "big")
