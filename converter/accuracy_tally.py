"""The metric's rows of a model's outputs, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.runner import Array, Tensors
from trtforge.validation.accuracy_metrics import Metric, Scores

__all__ = ["Tally", "predictions_of"]


@dataclass(slots=True)
class Tally:
    """Rows of the metric, batch by batch; for a function of everything at once, everything."""

    metric: Metric
    output: str | None
    rows: list[Any] = field(default_factory=list)
    predictions: list[Any] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    not_finite: int = 0

    def add(self, outputs: Tensors, labels: Any) -> int:
        """Takes in one batch and gives how many samples it has."""
        predictions = predictions_of(outputs, self.output)
        count = len(labels)
        arrays = list(predictions.values()) if isinstance(predictions, dict) else [predictions]
        for array in arrays:
            if len(array) != count:
                raise ConfigError(
                    f"the output has {len(array)} rows for {count} samples",
                    why=f"its shape is {list(array.shape)}",
                    fix="name the `output` that has one row a sample",
                )
        bad = np.zeros(count, dtype=bool)
        for array in arrays:
            if array.dtype.kind == "f":
                bad |= ~np.isfinite(array.reshape(count, -1)).all(1)
        self.not_finite += int(bad.sum())
        if self.metric.whole is not None:
            self.predictions.append(predictions)
            self.labels.append(labels)
            self.rows.append(np.zeros((count, 0)))
        else:
            self.rows.append(self.metric.rows(predictions, labels))
        return count

    def scores(self) -> Scores:
        """What was scored so far."""
        whole = self.metric.whole is not None
        return Scores(
            self.metric,
            np.concatenate(self.rows),
            _joined(self.predictions) if whole else None,
            _joined(self.labels) if whole else None,
            self.not_finite,
        )


def predictions_of(outputs: Tensors, output: str | None) -> Any:
    """What is scored: one output's array; all of them by name for the user's own function, where `output` is None."""
    if output is None:
        return {name: _native(array) for name, array in outputs.items()}
    return _native(outputs[output])


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in first}
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    return [item for part in parts for item in part]


def _native(array: Array) -> Array:
    """bfloat16 as float32: numpy's functions don't know it."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
