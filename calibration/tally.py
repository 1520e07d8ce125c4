"""Adds the activations of sample after sample to their histograms, all of them in one call of the compiled loop."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import numpy as np

from trtforge.calibration.count import JOB, job_grid, native_kernel
from trtforge.calibration.histogram import Histogram, as_float32
from trtforge.runtime.runner import Array

__all__ = ["Tally"]


class Tally:
    """Histograms by name, for one thread.

    A call a tensor would cost MobileNetV2, which has 53, nearly as much as the counting: after each one the thread
    waits for the interpreter. So one call takes all tensors, each as far as it fits the grid that its histogram has;
    what does not, little after the first samples, is left to `Histogram.add`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._histograms = [Histogram() for _ in names]
        self._jobs = np.zeros(len(names), JOB)
        self._described: list[weakref.ref[Array] | None] = [None] * len(names)
        """The arrays that the jobs point to: many come again, filled anew."""
        for index in range(len(names)):
            self._set_grid(index)

    def add(self, activations: Mapping[str, Array], where: str) -> None:
        """Counts every element of every tensor.

        Raises:
            CalibrationError: as `Histogram.add`; `where` says which sample it is.
        """
        kernel = native_kernel()
        if kernel is None:
            for name, histogram in zip(self._names, self._histograms, strict=True):
                histogram.add(activations[name], where=_where(name, where))
            return
        alive = [self._point(index, activations[name], where) for index, name in enumerate(self._names)]
        kernel(self._jobs)
        del alive
        for index in map(int, np.flatnonzero(self._jobs["done"] < self._jobs["size"])):
            name, done = self._names[index], int(self._jobs["done"][index])
            histogram, tensor = self._histograms[index], _where(name, where)
            histogram.reach(int(self._jobs["beyond"][index]), activations[name], where=tensor)
            histogram.add(activations[name], where=tensor, start=done)
            self._set_grid(index)

    def histograms(self) -> dict[str, Histogram]:
        """All that was counted, by name."""
        for histogram, peak in zip(self._histograms, self._jobs["peak"].view(np.float32), strict=True):
            histogram.peak = max(histogram.peak, float(peak))
        return dict(zip(self._names, self._histograms, strict=True))

    def _point(self, index: int, array: Array, where: str) -> Array:
        """Points the job to the elements; what they lie in must live until they are counted."""
        known = self._described[index]
        if known is not None and known() is array:
            return array
        flat = as_float32(array, _where(self._names[index], where))
        job = self._jobs[index]
        job["x"], job["size"] = flat.ctypes.data, flat.size
        self._described[index] = weakref.ref(array) if np.may_share_memory(flat, array) else None
        return flat

    def _set_grid(self, index: int) -> None:
        histogram, job = self._histograms[index], self._jobs[index]
        job["counts"] = histogram.counts.ctypes.data
        job["scale"], job["limit"] = job_grid(histogram.exponent)


def _where(tensor: str, sample: str) -> str:
    return f"tensor {tensor!r} in {sample}"
