"""Batches from what YAML names or Python gave."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trtforge.converter.config import ConversionConfig, Loader
from trtforge.converter.references import call_reference
from trtforge.runtime.specs import InputSpec

if TYPE_CHECKING:
    from trtforge.runtime.runner import Tensors

__all__ = ["read_data"]


def read_data(
    config: ConversionConfig,
    loader: Loader | None,
    live: object | None,
    specs: tuple[InputSpec, ...],
    limit: int | None,
) -> Iterator[Tensors] | None:
    """Batches by input name; None where there is neither a loader nor live data.

    Raises:
        ConfigError: the loader cannot be called.
        CalibrationError: a batch does not fit the model, as it is read.
    """
    if loader is not None:
        live = call_reference(loader.reference, loader.kwargs, folder=config.folder, what="loader")
    if live is None:
        return None
    from trtforge.calibration.loaders import read_batches

    return read_batches(live, specs, config.profiles, limit=limit)
