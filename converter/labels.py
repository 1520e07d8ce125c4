"""Batches with their labels: the inputs as calibration reads them, and what else the loader gives with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from trtforge.calibration.loaders import iterate_source, read_batches
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.runner import Tensors
from trtforge.runtime.specs import InputSpec, Profile

__all__ = ["read_labelled"]

_NAMES = ("labels", "label", "targets", "target", "y")


def read_labelled(
    source: object, specs: Sequence[InputSpec], profiles: Sequence[Profile], limit: int | None, *, wanted: bool
) -> Iterator[tuple[Tensors, Any]]:
    """Each batch and its labels.

    Labels are what follows the inputs: `y` of `(x, y)`, `((a, b), y)` or `({...}, y)`, and in a mapping the one key
    that is no input, or "labels", "label", "targets", "target" or "y" among several.

    Args:
        source: As for `read_batches`.
        specs: The model's inputs.
        profiles: The shapes allowed.
        limit: Stop after so many batches; None reads to the end.
        wanted: False leaves labels out: each is None.

    Yields:
        Inputs by name, and labels: an array `(samples, …)` or a list of `samples` texts or sequences.

    Raises:
        ConfigError: a batch without labels, or with another number of them than of samples.
        CalibrationError: as `read_batches`.
    """
    found: list[Any] = []

    def items() -> Iterator[object]:
        for item in iterate_source(source):
            found.append(_label(item, specs) if wanted else None)
            yield item

    for number, feeds in enumerate(read_batches(items(), specs, profiles, limit=limit)):
        label = found.pop()
        samples = len(next(iter(feeds.values())))
        yield feeds, _fit(label, samples, number) if wanted else None


def _label(item: object, specs: Sequence[InputSpec]) -> Any:
    if isinstance(item, Mapping):
        names = {spec.name for spec in specs}
        others = [key for key in item if key not in names]
        chosen = others if len(others) == 1 else [name for name in _NAMES if name in others][:1]
        if not chosen:
            raise _missing(f"the keys {', '.join(map(repr, item))}")
        return item[chosen[0]]
    if isinstance(item, (tuple, list)) and len(item):
        nested = isinstance(item[0], (tuple, list, Mapping)) and len(item) == 2
        rest = item[1:] if nested else item[len(specs) :]
        if len(rest):
            return rest[0]
        raise _missing(f"{len(item)} elements for {len(specs)} inputs")
    raise _missing(f"a single {type(item).__name__}")


def _missing(what: str) -> ConfigError:
    return ConfigError(
        f"the accuracy loader gives no labels: a batch is {what}",
        fix="give (inputs, labels), or say `labels: model` to measure agreement with PyTorch's own answers",
    )


def _fit(label: Any, samples: int, number: int) -> Any:
    if hasattr(label, "detach"):
        label = label.detach().cpu().numpy()
    if isinstance(label, str):
        label = [label]
    if isinstance(label, (list, tuple)) and not all(
        np.isscalar(value) and not isinstance(value, str) for value in label
    ):
        values = [value.detach().cpu().numpy() if hasattr(value, "detach") else value for value in label]
        same = all(isinstance(value, np.ndarray) and value.shape == values[0].shape for value in values)
        label = np.stack(values) if same else values
    elif not isinstance(label, list):
        label = np.asarray(label)
    if isinstance(label, list) and label and np.isscalar(label[0]) and not isinstance(label[0], str):
        label = np.asarray(label)
    if isinstance(label, np.ndarray) and samples == 1 and (label.ndim == 0 or len(label) != 1):
        label = label[None]
    if len(label) != samples:
        raise ConfigError(
            f"batch {number} has {samples} samples and {len(label)} labels", fix="give one label for each sample"
        )
    return label
