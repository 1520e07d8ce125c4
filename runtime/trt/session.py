"""A loaded engine on the GPU: its contexts, and for TensorRT-RTX the cache of what it compiles for this GPU."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtforge.runtime.device import DeviceFacts
from trtforge.runtime.lanes import OnLayer, Shape
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.trt.backend import find_backend
from trtforge.runtime.trt.context import GpuContext, attach_profiler
from trtforge.runtime.trt.cuda import Cuda
from trtforge.runtime.trt.gate import GATE
from trtforge.runtime.trt.load import OpenEngine, check_fit
from trtforge.runtime.trt.options import DEFAULT_LOAD, LoadOptions
from trtforge.runtime.trt.runtime_cache import RuntimeCacheFile
from trtforge.runtime.trt.streams import Streams

__all__ = ["EngineSession"]

_SAVE_EVERY_S = 5.0
_ALIGNMENT = 256  # NvInferRuntime.h, `setTensorAddress`; torch's allocator gives multiples of 512


class EngineSession:
    """See `lanes.Session`. On the first visible GPU.

    Args:
        path: The plan file.
        backend: "tensorrt" or "tensorrt-rtx": what built it.
        version: The release that built it.
        device: The GPU that it was built on, as `check_fit` takes it.
        digest: The plan file's SHA-256 in hex, where the caller knows it; "" to compute it.
        tf32: Whether it was built with TF32 allowed.
        options: As `OpenEngine` takes them.

    Raises:
        MissingDependencyError: the backend is not installed.
        ArtifactError: the engine is corrupt, or not for this machine.
    """

    def __init__(
        self,
        path: Path,
        backend: str,
        version: str | None,
        device: Mapping[str, Any] | None,
        digest: str = "",
        *,
        tf32: bool = False,
        options: LoadOptions = DEFAULT_LOAD,
    ) -> None:
        found = find_backend(backend)
        here = check_fit(path, found, version=version, device=device, options=options)
        self._cuda = Cuda()
        self._streams = Streams(self._cuda)
        with GATE.alone(wait=True):
            self._opened = OpenEngine(path, found, tf32=tf32, options=options)
            self._compiler = _Compiler(self._opened, here, digest) if found.name == "tensorrt-rtx" else None
        self._opening = threading.Lock()
        # What was kept holds what a context takes, most likely: writing it out at once would be for nothing.
        self._saved_at = time.monotonic() if self._compiler and self._compiler.kept else -math.inf
        self._unsaved = False

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """In the engine's order; engines forget the names of dimensions, so they are called `name[axis]`."""
        return self._opened.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """In the engine's order; see `inputs`."""
        return self._opened.outputs

    @property
    def profiles(self) -> tuple[Mapping[str, tuple[Shape, ...]], ...]:
        """See `lanes.Session`."""
        return self._opened.profiles

    @property
    def host_inputs(self) -> frozenset[str]:
        """See `lanes.Session`."""
        return self._opened.host_inputs

    @property
    def alignment(self) -> int:
        """See `lanes.Session`."""
        return _ALIGNMENT

    def open_context(self, profile: int, on_layer: OnLayer | None = None) -> GpuContext:
        """See `lanes.Session`.

        Raises:
            ArtifactError: TensorRT gives none, for want of memory most often.
        """
        opened = self._opened
        with self._opening, GATE.alone(wait=True):
            opened.log.errors.clear()
            create = self._compiler.create_context if self._compiler else opened.engine.create_execution_context
            context = create()
            if context is None:
                raise opened.refused("gives no execution context")
        made = GpuContext(opened, self._streams, context, profile)
        if on_layer is not None:
            made.profiler = attach_profiler(opened, context, on_layer)
        self.kernels_changed()
        return made

    def enter_thread(self) -> None:
        """See `lanes.Session`."""
        self._cuda.make_current()

    def kernels_changed(self) -> None:
        """See `lanes.Session`: saves the runtime cache, though not at each of many new shapes in a row."""
        self._unsaved = True
        if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self._save()

    def close(self) -> None:
        """See `lanes.Session`."""
        if self._unsaved:
            self._save()
        with self._opening, GATE.alone(wait=True):
            self._compiler = None
            self._opened.close()
        self._cuda.close()

    def _save(self) -> None:
        self._unsaved = False
        self._saved_at = time.monotonic()
        with self._opening, GATE.alone(wait=True) as entered:
            if entered and self._compiler is not None:
                self._compiler.save()


class _Compiler:
    """How TensorRT-RTX compiles an engine for the GPU at hand, and the cache of what it compiled.

    Attributes:
        kept: Whether the cache holds what an earlier process compiled.
    """

    def __init__(self, opened: OpenEngine, device: DeviceFacts, digest: str) -> None:
        self._engine = opened.engine
        self._file = RuntimeCacheFile.of_engine(opened.path, opened.backend.version, device, digest)
        self._config = opened.eager_config()
        self._cache = self._config.create_runtime_cache()
        kept = self._file.read() if self._file else None
        self.kept = kept is not None and bool(self._cache.deserialize(kept))
        if kept is not None and not self.kept:
            warnings.warn(
                f"the runtime cache of {opened.path} is not used, and made anew: TensorRT-RTX refuses it, "
                "after a change of driver for instance",
                RuntimeWarning,
                stacklevel=2,
            )
        self._config.set_runtime_cache(self._cache)

    def create_context(self) -> Any:
        return self._engine.create_execution_context(self._config)

    def save(self) -> None:
        kept = self._cache.serialize() if self._file else None
        if kept is not None and self._file:
            self._file.write(bytes(kept))
