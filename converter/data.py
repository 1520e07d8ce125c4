"""The data that YAML names or Python gave."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trtforge.converter.config import ConversionConfig, Loader
from trtforge.converter.references import call_reference
from trtforge.runtime.specs import InputSpec

if TYPE_CHECKING:
    from trtforge.runtime.runner import Tensors

__all__ = ["find_source", "read_data"]


def find_source(config: ConversionConfig, loader: Loader | None, live: object | None) -> object | None:
    """What batches are read from: a function that calls the loader anew each time, or what Python gave; None: neither.

    Raises:
        ConfigError: called on, the loader cannot be imported or called.
    """
    if loader is None:
        return live
    named = loader
    return lambda: call_reference(named.reference, named.kwargs, folder=config.folder, what="loader")


def read_data(
    config: ConversionConfig, loader: Loader | None, live: object | None, specs: tuple[InputSpec, ...], limit: int
) -> Iterator[Tensors] | None:
    """Batches by input name; None where there is neither a loader nor live data.

    Raises:
        ConfigError: the loader cannot be called.
        CalibrationError: a batch does not fit the model, as it is read.
    """
    source = find_source(config, loader, live)
    if source is None:
        return None
    from trtforge.calibration.loaders import read_batches

    return read_batches(source, specs, config.profiles, limit=limit)
