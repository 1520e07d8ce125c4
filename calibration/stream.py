"""How data streams through a model: samples one at a time, as many side by side as there are workers, none kept.

Where the batch is a dimension of its own, samples run one at a time: kernels choose their order of summation by the
batch size, so this is what makes results equal to the bit for any batch size; it holds one sample's activations a core,
not a batch's, and needs no synchronisation inside operators.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from trtforge.runtime.graph import OnnxModel
from trtforge.runtime.onnx_runner import asked_threads
from trtforge.runtime.runner import Tensors
from trtforge.runtime.specs import TensorSpec

__all__ = ["OnSamples", "Unit", "count_workers", "hash_sample", "run_units", "split_units", "splits_samples"]

OnSamples = Callable[[int], None]
"""Called in the caller's thread with the number of samples that have run so far."""

_MAX_WORKERS = 8


@dataclass(slots=True)
class Unit:
    """What runs at once: a sample or a batch, and how errors call it."""

    feeds: Tensors
    samples: int
    where: str


def splits_samples(model: OnnxModel, provider: str) -> bool:
    """Whether samples run one at a time: every input begins with one dynamic dimension, and the provider is the CPU."""
    return _batch_dim(model.inputs) is not None and provider == "cpu"


def _batch_dim(inputs: Sequence[TensorSpec]) -> str | None:
    """The dynamic dimension with which every input begins."""
    first = {spec.shape[0] if spec.shape else None for spec in inputs}
    dim = first.pop() if len(first) == 1 else None
    return dim if isinstance(dim, str) and dim != "?" else None


def split_units(batches: Iterable[Tensors], *, by_sample: bool) -> Iterator[Unit]:
    """The batches, or their samples one by one."""
    for index, batch in enumerate(batches):
        size = min((array.shape[0] for array in batch.values() if array.ndim), default=1)
        if not by_sample:
            yield Unit(batch, size, f"batch {index}")
            continue
        for row in range(size):
            feeds = {name: array[row : row + 1] for name, array in batch.items()}
            yield Unit(feeds, 1, f"batch {index}, sample {row}")


def count_workers(*, by_sample: bool) -> int:
    """As many as OMP_NUM_THREADS says, else usable cores; 8 at most; 1 where batches run whole, on all of them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(asked_threads() or usable, _MAX_WORKERS) if by_sample else 1


def hash_sample(feeds: Tensors) -> int:
    """SHA-256 of names, types, shapes and contents, as a number."""
    digest = hashlib.sha256()
    for name in sorted(feeds):
        array = feeds[name]
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return int.from_bytes(digest.digest(), "big")


def run_units(
    units: Iterable[Unit], work: Callable[[Unit], int], workers: int, on_samples: OnSamples | None = None
) -> int:
    """Calls `work` for every unit, in threads; it gives how many samples it took.

    Units are read in the caller's thread, and no further ahead than the workers need.

    Returns:
        The number of samples.

    Raises:
        Exception: what `units` or `work` raises, as it is.
    """
    done = 0
    waiting: list[Future[int]] = []

    def finish_some() -> None:
        nonlocal done
        finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
        if any(future.exception() is not None for future in finished):
            for future in waiting:  # of several errors the first unit's, whichever came first
                future.result()
        for future in finished:
            waiting.remove(future)
            done += future.result()
            if on_samples is not None:
                on_samples(done)

    with ThreadPoolExecutor(workers, thread_name_prefix="calibrate") as pool:
        try:
            for unit in units:
                if len(waiting) > workers:  # one more than runs, so that no worker waits for the loader's thread
                    finish_some()
                waiting.append(pool.submit(work, unit))
            while waiting:
                finish_some()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return done
