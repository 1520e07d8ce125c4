"""Whether smoothing a tensor pays, measured: the error of the products that read it, with and without factors.

The prediction (`smoothing`) takes each channel's largest value for its range and all rounding errors for independent.
Neither holds. Where few samples made those peaks, factors follow chance, and data to come saturate; where `auto` clips
a tail, much of what smoothing promises is gained already; and of MiniLM's GELU outputs it says 6 dB where 9 are gained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trtforge.calibration.auto import choose_range
from trtforge.calibration.histogram import Histogram
from trtforge.calibration.ranges import Method
from trtforge.calibration.weights import quantize_weight

__all__ = ["Trial"]

_ROWS, _OUTPUTS = 8, 128
"""Rows of a sample and output channels that are judged, evenly spaced: 512 rows of 64 samples, at a cost that the
length of sequences does not raise, and the width of layers only once."""
_BLOCK = 256
"""Rows that are multiplied at once: products of a few rows wait for threads longer than they take."""
_CODE = 127

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
_Float = TypeVar("_Float", np.float32, np.float64)


class Trial:
    """One tensor without factors and with each candidate: ranges from what is shown, errors over what is judged.

    Args:
        name: Of the tensor, for errors.
        weights: What it is multiplied with, shape (outputs, inputs).
        candidates: What each input is divided by, each of shape (inputs,).
        method: Of the ranges, as the calibration will choose them.
    """

    def __init__(self, name: str, weights: Floats, candidates: Sequence[Floats], method: Method) -> None:
        self._name, self._weights, self._method = name, _spread(weights, _OUTPUTS).astype(np.float32), method
        self._divisors = [divisor.astype(np.float32) for divisor in (np.ones(weights.shape[1]), *candidates)]
        self._histograms = [Histogram() for _ in self._divisors]
        self._prepared: list[tuple[np.float32, Singles]] = []
        self._pending: dict[int, list[Singles]] = {}
        self._errors: dict[int, Floats] = {}

    def show(self, rows: Singles) -> None:
        """Counts rows of shape (n, inputs) for all ranges.

        Raises:
            CalibrationError: values that are not finite.
        """
        for histogram, divisor in zip(self._histograms, self._divisors, strict=True):
            histogram.add(rows / divisor, where=self._name)

    def judge(self, rows: Singles, kind: int = 0) -> None:
        """Adds the squared errors on other rows, of one kind of several; nothing may be shown after that.

        Rows that are not finite are left out: where the data themselves have them, the pass for ranges refuses it, and
        a cut sample (`crops`) may be nothing but padding.
        """
        some = _spread(rows, _ROWS)
        if np.isfinite(some).all():
            self._pending.setdefault(kind, []).append(some)
            if sum(map(len, self._pending[kind])) >= _BLOCK:
                self._measure(kind)

    def choose(self) -> tuple[int, float]:
        """The best candidate, and how many times less error it leaves on the kind of rows where it gains least.

        The gain is 0.0 where no row of kind 0 was judged, or there is no error to lessen.
        """
        for kind in tuple(self._pending):
            self._measure(kind)
        if 0 not in self._errors:
            return 0, 0.0
        gains = [
            np.divide(errors[0], errors[1:], out=np.zeros(len(errors) - 1), where=errors[1:] > 0)
            for errors in self._errors.values()
        ]
        least = np.min(gains, axis=0)
        best = int(np.argmax(least))
        return best, float(least[best])

    def _measure(self, kind: int) -> None:
        if not self._prepared:
            self._prepared = [self._prepare(index) for index in range(len(self._divisors))]
        rows = np.concatenate(self._pending.pop(kind))
        wanted = rows @ self._weights.T
        errors = self._errors.setdefault(kind, np.zeros(len(self._divisors)))
        for index, (divisor, (scale, weights)) in enumerate(zip(self._divisors, self._prepared, strict=True)):
            codes = np.clip(np.rint(rows / divisor / scale), -_CODE, _CODE)
            errors[index] += float(np.sum((codes * scale @ weights.T - wanted) ** 2, dtype=np.float64))

    def _prepare(self, index: int) -> tuple[np.float32, Singles]:
        scale = choose_range(self._histograms[index], self._method).scale("int8")
        multiplied = self._weights * self._divisors[index]
        codes, scales = quantize_weight(self._name, multiplied, 0, "int8", ir.DataType.FLOAT)
        return np.float32(scale), codes.astype(np.float32) * scales.astype(np.float32)[:, None]


def _spread(rows: NDArray[_Float], count: int) -> NDArray[_Float]:
    """At most `count` of them, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(np.intp)]
