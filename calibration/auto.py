"""From what a pass collected to ranges: one threshold a tensor, by one method or by the one that fits the tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from trtforge import __version__
from trtforge.calibration.collect import Collected
from trtforge.calibration.histogram import BINS, Histogram
from trtforge.calibration.ranges import METHODS, MadeFrom, Method, Ranges, TensorRange
from trtforge.calibration.thresholds import (
    LEVELS,
    PERCENTILE,
    entropy_threshold,
    measure_fit,
    mse_threshold,
    percentile_threshold,
)
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.suggest import nearest

__all__ = ["choose_range", "choose_ranges", "describe_method", "made_from"]

_SEARCHES: Mapping[str, Callable[[Histogram], float]] = {
    "entropy": entropy_threshold,
    "percentile": percentile_threshold,
    "mse": mse_threshold,
    "max": lambda histogram: histogram.peak,
}
_WORTH_CLIPPING = 1.0
"""Decibels. On EfficientNet-Lite0's input 0.4 dB of clipping in its histogram cost 4 dB at the output."""
_SETTINGS: Mapping[str, str] = {
    "entropy": f"entropy, {BINS} bins to {LEVELS} levels",
    "percentile": f"percentile {PERCENTILE}",
    "mse": "mse, int8",
    "max": "max",
    "auto": "auto 1",
}


def describe_method(method: Method) -> str:
    """The method with its settings: what a cache compares.

    Raises:
        CalibrationError: there is no such method.
    """
    if method not in _SETTINGS:
        raise CalibrationError(f"there is no calibration method {method!r}", fix=nearest(method, METHODS))
    return _SETTINGS[method]


def choose_ranges(collected: Collected, method: Method = "auto") -> Ranges:
    """The range of every tensor, and what they were made from.

    Raises:
        CalibrationError: there is no such method.
    """
    described = describe_method(method)
    tensors = {name: choose_range(histogram, method) for name, histogram in collected.histograms.items()}
    return Ranges(tensors, made_from(collected, described), collected.smoothing)


def made_from(collected: Collected, method: str) -> MadeFrom:
    """Where ranges from this state come from; `method` as `describe_method` writes it."""
    return MadeFrom(
        graph=collected.graph,
        data=f"{collected.data:064x}",
        samples=collected.samples,
        shapes={name: tuple(sorted(shapes)) for name, shapes in sorted(collected.shapes.items())},
        method=method,
        provider=collected.provider,
        versions={"trtforge": __version__, "onnxruntime": collected.onnxruntime},
        batch=collected.batch,
    )


def choose_range(histogram: Histogram, method: Method = "auto") -> TensorRange:
    """The range of one tensor.

    Raises:
        CalibrationError: there is no such method.
    """
    describe_method(method)
    chosen, reason = (method, "") if method != "auto" else _choose(histogram)
    threshold = _SEARCHES[chosen](histogram) if histogram.peak > 0 else 0.0
    fit = measure_fit(histogram, threshold)
    return TensorRange(threshold, chosen, histogram.peak, fit.clipped_fraction, fit.sqnr_db, histogram.count, reason)


def _choose(histogram: Histogram) -> tuple[Method, str]:
    """The method for one tensor, and why.

    Clipping shifts whatever it touches in one direction, layer after layer, where rounding errors average out. So it
    has to pay: the maximum stands unless a threshold below it raises SQNR by at least `_WORTH_CLIPPING`. Then the
    least squared error is taken. Where values pile up at the top (ReLU6, images with white in them), entropy takes the
    pile for outliers, and even the least squared error cuts into it; the maximum keeps it exactly. Entropy is no
    candidate: it follows the distribution, not the error, and was the worst of all on EfficientNet-Lite0.
    """
    if histogram.peak == 0:
        return "max", "all zero"
    whole = measure_fit(histogram, histogram.peak).sqnr_db
    cut = measure_fit(histogram, mse_threshold(histogram)).sqnr_db
    gain = _decibels(cut) - _decibels(whole)
    if gain < _WORTH_CLIPPING:
        return "max", f"clipping gains {max(gain, 0.0):.2f} dB"
    return "mse", f"clipping gains {gain:.2f} dB"


def _decibels(sqnr: float | None) -> float:
    return sqnr if sqnr is not None else 0.0
