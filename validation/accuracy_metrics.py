"""Task metrics as sums: each sample adds a row of numbers, and a metric is a function of the rows' sum.

That holds for means (top-1) and for ratios that are no means over samples (mean IoU, word error rate), so one
resampling of rows serves them all. Every value is larger for a better model; error rates are given as 1 - rate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.suggest import nearest

__all__ = ["METRICS", "Metric", "Scores", "find_metric", "take", "user_metric"]

_Floats = NDArray[np.float64]
METRICS = ("top1", "top5", "miou", "cosine", "wer", "cer")
"""What can be named; `topK` takes any K."""
_TOP = re.compile(r"top([1-9]\d*)")


@dataclass(frozen=True, slots=True)
class Metric:
    """How predictions and labels become rows, and sums of rows a value.

    Attributes:
        name: What people call it.
        rows: `(predictions, labels) -> (samples, columns)`, float64.
        value: `(..., columns) -> (...)`: the metric of summed rows.
        target: What a model's own output is as a label: its class, its map, itself.
        whole: A function of all predictions and labels that gives one number; then there are no rows.
    """

    name: str
    rows: Callable[[Any, Any], _Floats]
    value: Callable[[_Floats], _Floats]
    target: Callable[[Any], Any] = field(default=lambda outputs: outputs)
    whole: Callable[[Any, Any], float] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What one model scored on the samples.

    Attributes:
        metric: What was measured.
        rows: `(samples, columns)`, float64; no columns where the metric is a function of everything at once.
        predictions: Everything that such a function takes; None for the others.
        labels: Likewise.
        not_finite: Samples whose predictions hold NaN or Inf.
    """

    metric: Metric
    rows: _Floats
    predictions: Any = None
    labels: Any = None
    not_finite: int = 0

    @property
    def count(self) -> int:
        """How many samples."""
        return len(self.rows)

    @property
    def value(self) -> float:
        """The metric over all samples."""
        if self.metric.whole is not None:
            return self.metric.whole(self.predictions, self.labels)
        return float(self.metric.value(self.rows.sum(0)))

    @property
    def binary(self) -> NDArray[np.bool_] | None:
        """Which samples are right, where each is right or wrong and counts as one; None elsewhere."""
        if self.rows.shape[1] != 2 or not (self.rows[:, 1] == 1).all() or not np.isin(self.rows[:, 0], (0, 1)).all():
            return None
        return np.asarray(self.rows[:, 0] == 1)

    def resampled(self, times: NDArray[np.int64]) -> _Floats:
        """The metric where each sample counts so many times: `(resamples, samples) -> (resamples,)`."""
        if self.metric.whole is None:
            return self.metric.value(times @ self.rows)
        found = []
        for row in times:
            index = np.repeat(np.arange(self.count), row)
            found.append(self.metric.whole(take(self.predictions, index), take(self.labels, index)))
        return np.array(found, dtype=np.float64)

    def without_each(self) -> _Floats | None:
        """The metric without each sample, `(samples,)`; None where that would cost a call for each."""
        return None if self.metric.whole is not None else self.metric.value(self.rows.sum(0) - self.rows)


def find_metric(
    name: str, *, classes: int | None = None, decode: Callable[[Any], Sequence[Any]] | None = None
) -> Metric:
    """The metric of that name.

    Args:
        name: "top1" and so on, "miou", "cosine", "wer", "cer".
        classes: For miou on outputs that are maps of classes already.
        decode: For wer and cer: from outputs to one text, or one sequence of integers, a sample.

    Raises:
        ConfigError: there is none of that name.
    """
    if found := _TOP.fullmatch(name):
        most = int(found[1])
        return Metric(name, lambda p, t: _top_rows(p, t, most), _ratio, lambda outputs: _best(_floats(outputs)))
    if name == "miou":
        return Metric(name, lambda p, t: _overlap_rows(p, t, classes), _mean_overlap, lambda outputs: _map(outputs)[0])
    if name == "cosine":
        return Metric(name, _cosine_rows, _ratio)
    if name in ("wer", "cer"):
        split = str.split if name == "wer" else list
        read = decode or _as_sequences

        def rows(predictions: Any, labels: Any) -> _Floats:
            return _edit_rows(read(predictions), labels, split)

        return Metric(name, rows, lambda sums: 1 - _ratio(sums), read)
    raise ConfigError(
        f"there is no accuracy metric {name!r}",
        fix=f"{nearest(name, METRICS)}; or name a function of yours as package.module:function",
    )


def user_metric(name: str, function: Callable[[Any, Any], Any], predictions: Any, labels: Any) -> Metric:
    """The user's own `function(predictions, labels)`, larger being better.

    It gives one number a sample (`(samples,)`), of which the mean is taken, or one number for all samples at once; a
    first batch tells which.

    Raises:
        ConfigError: it gives neither.
        Exception: whatever it raises.
    """

    def rows(predictions: Any, labels: Any) -> _Floats:
        scores = np.asarray(function(predictions, labels), dtype=np.float64)
        return np.stack([scores, np.ones_like(scores)], 1)

    def whole(predictions: Any, labels: Any) -> float:
        return float(np.asarray(function(predictions, labels), dtype=np.float64))

    first = np.asarray(function(predictions, labels))
    count = len(labels)
    if first.dtype.kind not in "fiub" or first.shape not in ((), (count,)):
        raise ConfigError(
            f"metric {name} gave {first.dtype} of shape {list(first.shape)} for {count} samples",
            fix="return one number a sample, of shape (samples,), or one number for all of them",
        )
    return Metric(name, rows, _ratio, whole=whole if first.ndim == 0 else None)


def take(values: Any, index: NDArray[np.int64]) -> Any:
    """Some of the samples of an array, a mapping of arrays, or a list."""
    if isinstance(values, Mapping):
        return {name: array[index] for name, array in values.items()}
    return values[index] if isinstance(values, np.ndarray) else [values[i] for i in index]


def _ratio(sums: _Floats) -> _Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1], dtype=np.float64)


def _floats(outputs: Any) -> _Floats:
    """Logits with every sample's NaN told apart from its numbers: argmax takes NaN for the largest."""
    return np.asarray(outputs, dtype=np.float64)


def _best(logits: _Floats) -> NDArray[np.int64]:
    best = logits.argmax(-1)
    return np.where(np.isnan(logits).any(-1), -1, best)


def _top_rows(predictions: Any, labels: Any, most: int) -> _Floats:
    """Rights and labelled positions of each sample; a label below 0 counts for nothing, a row with NaN is wrong."""
    logits, wanted = _floats(predictions), np.asarray(labels)
    if wanted.shape != logits.shape[:-1] or wanted.dtype.kind not in "iu":
        raise ConfigError(
            f"top-{most} takes logits (samples, …, classes) and integer labels (samples, …)",
            why=f"the output is {list(logits.shape)}, the labels are {wanted.dtype} {list(wanted.shape)}",
            fix="name the right `output`, and let the loader give class numbers",
        )
    counted = wanted >= 0
    if counted.any() and wanted.max() >= logits.shape[-1]:
        raise ConfigError(
            f"label {int(wanted.max())} is none of the output's {logits.shape[-1]} classes",
            fix="number the classes from 0, in the order of the output",
        )
    chosen = np.take_along_axis(logits, np.maximum(wanted, 0)[..., None].astype(np.int64), -1)
    # By rank, ties to the lower class, as argmax breaks them.
    order = np.arange(logits.shape[-1])
    before = (logits > chosen) | ((logits == chosen) & (order < np.maximum(wanted, 0)[..., None]))
    right = (before.sum(-1) < most) & ~np.isnan(logits).any(-1) & counted
    axes = tuple(range(1, right.ndim))
    return np.stack([right.sum(axes), counted.sum(axes)], 1).astype(np.float64)


def _map(outputs: Any) -> tuple[NDArray[np.int64], int | None]:
    """A map of classes from logits `(n, classes, …)`, and how many classes; integers are a map already."""
    array = np.asarray(outputs)
    if array.dtype.kind in "iu":
        return array.astype(np.int64), None
    logits = array.astype(np.float64)
    return np.where(np.isnan(logits).any(1), -1, logits.argmax(1)), logits.shape[1]


def _overlap_rows(predictions: Any, labels: Any, classes: int | None) -> _Floats:
    """Intersections, then unions, of every class in each sample; labels that are no class are ignored."""
    found, known = _map(predictions)
    wanted = np.asarray(labels)
    number = classes or known
    if number is None:
        raise ConfigError("miou of an integer output needs `classes`", fix="say how many classes there are")
    if found.shape != wanted.shape or wanted.dtype.kind not in "iu":
        raise ConfigError(
            "mean IoU takes an output (n, classes, height, width) or (n, height, width), and integer labels",
            why=f"the output's map is {list(found.shape)}, the labels are {wanted.dtype} {list(wanted.shape)}",
            fix="bring labels to the output's size in the loader, with nearest neighbours",
        )
    counts = np.zeros((len(found), 2 * number))
    for row, (mine, theirs) in enumerate(
        zip(found.reshape(len(found), -1), wanted.reshape(len(found), -1), strict=True)
    ):
        judged = (theirs >= 0) & (theirs < number)
        mine, theirs = mine[judged], theirs[judged].astype(np.int64)
        both = np.bincount(theirs[mine == theirs], minlength=number)
        drawn = np.bincount(mine[(mine >= 0) & (mine < number)], minlength=number)
        counts[row, :number] = both
        counts[row, number:] = drawn + np.bincount(theirs, minlength=number) - both
    return counts


def _mean_overlap(sums: _Floats) -> _Floats:
    """The mean over classes that occur at all."""
    number = sums.shape[-1] // 2
    both, either = sums[..., :number], sums[..., number:]
    overlap = np.divide(both, either, out=np.zeros_like(both, dtype=np.float64), where=either > 0)
    return np.asarray(overlap.sum(-1) / np.maximum((either > 0).sum(-1), 1))


def _cosine_rows(predictions: Any, labels: Any) -> _Floats:
    """Each sample's cosine; NaN, and a zero vector beside one that is none, count as -1."""
    first = np.asarray(predictions, dtype=np.float64)
    second = np.asarray(labels, dtype=np.float64)
    if first.shape != second.shape:
        raise ConfigError(
            f"cosine takes labels of the output's shape: {list(second.shape)} is not {list(first.shape)}",
            fix="let the loader give vectors, or say `labels: model` to compare with PyTorch's own output",
        )
    first, second = first.reshape(len(first), -1), second.reshape(len(second), -1)
    # Scaled first, so that squares neither overflow nor vanish.
    with np.errstate(all="ignore"):
        first = first / np.abs(first).max(1, keepdims=True)
        second = second / np.abs(second).max(1, keepdims=True)
        cosines = (first * second).sum(1) / np.sqrt((first**2).sum(1) * (second**2).sum(1))
    cosines = np.where(np.isfinite(cosines), np.clip(cosines, -1, 1), -1.0)
    return np.stack([cosines, np.ones_like(cosines)], 1)


def _as_sequences(outputs: Any) -> Sequence[Any]:
    array = np.asarray(outputs)
    if array.dtype.kind not in "iu" or array.ndim != 2:
        raise ConfigError(
            f"wer and cer need words: the output is {array.dtype} {list(array.shape)}",
            fix="name a `decode: package.module:function` that takes the output and gives one text a sample",
        )
    return [row[row >= 0].tolist() for row in array]


def _edit_rows(predictions: Sequence[Any], labels: Any, split: Callable[[str], list[str]]) -> _Floats:
    """Edits and length of the label in each sample."""
    if len(predictions) != len(labels):
        raise ConfigError(
            f"{len(predictions)} texts were decoded for {len(labels)} labels",
            fix="let `decode` give one text a sample",
        )
    rows = []
    for mine, theirs in zip(predictions, labels, strict=True):
        found, wanted = _words(mine, split), _words(theirs, split)
        rows.append((_edits(found, wanted), len(wanted)))
    return np.array(rows, dtype=np.float64)


def _words(value: Any, split: Callable[[str], list[str]]) -> list[Any]:
    if isinstance(value, str):
        return split(value)
    return [int(item) for item in np.asarray(value).reshape(-1) if int(item) >= 0]


def _edits(found: Sequence[Any], wanted: Sequence[Any]) -> int:
    """Levenshtein's distance, a row of his table at a time."""
    above = list(range(len(wanted) + 1))
    for row, word in enumerate(found, 1):
        here = [row]
        for column, other in enumerate(wanted, 1):
            here.append(min(above[column] + 1, here[-1] + 1, above[column - 1] + (word != other)))
        above = here
    return above[-1]
