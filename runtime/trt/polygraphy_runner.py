"""Polygraphy's TrtRunner on one of our engines, as its users run it; to measure against."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trtforge.runtime.errors import MissingDependencyError
from trtforge.runtime.trt.tf32 import Tf32Hold

__all__ = ["open_polygraphy"]


def open_polygraphy(engine: Path, backend: str, *, tf32: bool) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function from torch tensors on the GPU to outputs there, by name.

    Args:
        engine: The plan file.
        backend: "tensorrt" or "tensorrt-rtx": what built it. Polygraphy takes one of them for the whole process.
        tf32: Whether it was built with TF32 allowed.

    Raises:
        MissingDependencyError: it is not installed.
    """
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(backend == "tensorrt-rtx"))  # read when it is imported
    try:
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    except ImportError as error:
        raise MissingDependencyError(f"polygraphy does not load: {error}", fix="pip install polygraphy") from error
    hold = Tf32Hold(tf32)
    runner = TrtRunner(EngineFromBytes(BytesFromPath(str(engine))))
    try:
        runner.activate()
    except BaseException:
        hold.release()
        raise

    def infer(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return dict(runner.infer(feeds, check_inputs=False, copy_outputs_to_host=False))

    weakref.finalize(infer, _close, runner, hold)
    return infer


def _close(runner: Any, hold: Tf32Hold) -> None:
    runner.deactivate()
    hold.release()
