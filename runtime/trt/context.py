"""One TensorRT execution context on the GPU, with a stream and events of its own: the `Context` of lanes."""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from trtforge.runtime.errors import ArtifactError, ConfigError
from trtforge.runtime.lanes import Graph, OnLayer, Replay, Shape, replay_in_steps
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.trt.gate import GATE
from trtforge.runtime.trt.load import OpenEngine
from trtforge.runtime.trt.replay import NativeReplay, native_replay
from trtforge.runtime.trt.streams import CaptureError, Streams

__all__ = ["GpuContext", "attach_profiler"]

_log = logging.getLogger("trtforge.engine")

_CAPTURE_ATTEMPTS = 3
_SHAPES_KEPT = 1024


class GpuContext:
    """See `lanes.Context`.

    The context runs on its own stream, between events, rather than on the caller's: on the default stream TensorRT
    would wait for the whole device, and nothing can be captured there. Graphs are launched on the caller's.

    Args:
        opened: The engine.
        streams: The driver.
        context: An `IExecutionContext` of it, new, owned from here on.
        profile: The optimization profile in which it stays.

    Raises:
        ArtifactError: it cannot take the profile.
    """

    def __init__(self, opened: OpenEngine, streams: Streams, context: Any, profile: int) -> None:
        self._opened = opened
        self._streams = streams
        self._context = context
        self._names = [spec.name for spec in (*opened.inputs, *opened.outputs)]
        self._host = opened.host_inputs
        self._values: dict[str, Any] = {}
        """The host's memory that TensorRT reads the values of shape inputs from."""
        self.profiler: Any = None
        """What `attach_profiler` gave: kept alive here."""
        self._attempts_left = _CAPTURE_ATTEMPTS
        self._bound: tuple[int, ...] = ()
        self._shapes: tuple[Shape, ...] = ()
        self._compiled: set[tuple[Shape, ...]] = set()
        """Shapes that this context ran with: what they take is compiled."""
        self._stream = streams.create_stream()
        self._done, self._fork, self._join = (streams.create_event() for _ in range(3))
        if profile:
            try:
                self._enter_profile(profile)
            except BaseException:
                self.close()
                raise

    def set_shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        """See `lanes.Context`.

        Raises:
            ConfigError: TensorRT refuses the shapes.
            ArtifactError: an output's shape depends on values.
        """
        self._shapes = tuple(tuple(shape) for shape in inputs)
        with self._entering():
            return self._set_shapes(inputs)

    def _set_shapes(self, inputs: Sequence[Shape]) -> tuple[Shape, ...]:
        context = self._context
        self._opened.log.errors.clear()
        for spec, shape in zip(self._opened.inputs, inputs, strict=True):
            if spec.name in self._host:
                self._set_values(spec, shape)
                continue
            if not context.set_input_shape(spec.name, tuple(shape)):
                raise self._misshapen(f"the engine refuses shape {list(shape)} for input {spec.name!r}")
        if missing := context.infer_shapes():
            raise self._misshapen(
                f"the engine cannot infer its shapes from these inputs; missing: {', '.join(missing)}"
            )
        return tuple(self._output_shape(spec.name) for spec in self._opened.outputs)

    def run(self, addresses: Sequence[int], stream: int) -> None:
        """See `lanes.Context`.

        Raises:
            ArtifactError: TensorRT could not run it.
        """
        streams = self._streams
        self._bind(addresses)
        self._opened.log.errors.clear()
        streams.record(self._fork, stream)
        streams.wait(self._stream, self._fork)
        try:
            with self._entering():
                ran = self._context.execute_async_v3(self._stream)
            if not ran:
                raise self._opened.refused("failed while it ran")
            if len(self._compiled) >= _SHAPES_KEPT:
                self._compiled.clear()
            self._compiled.add(self._shapes)
        finally:
            streams.record(self._join, self._stream)
            streams.wait(stream, self._join)

    def capture(self, addresses: Sequence[int], *, wait: bool) -> Graph | None:
        """See `lanes.Context`."""
        # Not asked before: `is_stream_capturable`. RTX 1.6.1 says no for engines whose captured graph is right.
        if not self._attempts_left:
            return None
        self._bind(addresses)
        with GATE.alone(wait=wait) as entered:
            if not entered:
                return None
            handle = self._record()
        if not handle:
            self._attempts_left -= 1
            return None
        self._attempts_left = _CAPTURE_ATTEMPTS
        return _GpuGraph(self._streams, handle)

    def _record(self) -> int:
        streams = self._streams
        streams.begin_capture(self._stream)
        ran = False
        try:
            ran = self._context.execute_async_v3(self._stream)
        finally:
            handle = 0
            # A capture must be ended, whatever happened; a graph of half a run must not be kept.
            try:
                handle = streams.end_capture(self._stream)
            except CaptureError as error:
                _log.info("no CUDA graph of %s: %s", self._opened.path, error)
            if handle and not ran:
                streams.destroy_graph(handle)
                handle = 0
        return handle

    def make_replay(self, graph: Graph, inputs: int, inside: Sequence[int], sizes: Sequence[int]) -> Replay:
        """See `lanes.Context`."""
        function = native_replay()
        if function is None or not isinstance(graph, _GpuGraph):
            return replay_in_steps(self, graph, inputs, inside, sizes)
        return NativeReplay(function, self._streams, graph, done=self._done, inputs=inputs, inside=inside, sizes=sizes)

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """See `lanes.Context`."""
        if size_bytes:
            self._streams.copy(target, source, size_bytes, stream)

    def begin(self, stream: int) -> None:
        """See `lanes.Context`."""
        self._streams.wait(stream, self._done)

    def end(self, stream: int) -> None:
        """See `lanes.Context`."""
        self._streams.record(self._done, stream)

    def is_idle(self) -> bool:
        """See `lanes.Context`."""
        return self._streams.is_done(self._done)

    def finish(self) -> None:
        """See `lanes.Context`."""
        self._streams.finish(self._done)

    def close(self) -> None:
        """See `lanes.Context`."""
        with GATE.alone(wait=True):
            self._context = self.profiler = None
        for event in (self._done, self._fork, self._join):
            self._streams.destroy_event(event)
        self._streams.destroy_stream(self._stream)

    def _entering(self) -> AbstractContextManager[object]:
        return GATE.shared() if self._shapes in self._compiled else GATE.alone(wait=True)

    def _bind(self, addresses: Sequence[int]) -> None:
        bound = tuple(addresses)
        if bound == self._bound:
            return
        self._bound = ()
        for name, address in zip(self._names, bound, strict=True):
            if name in self._host:
                continue
            if not self._context.set_tensor_address(name, address):
                raise self._opened.refused(f"refuses the memory of {name!r}")
        self._bound = bound

    def _set_values(self, spec: TensorSpec, values: Shape) -> None:
        kind = ctypes.c_int64 if spec.dtype == "int64" else ctypes.c_int32
        self._values[spec.name] = memory = (kind * max(1, len(values)))(*values)
        if not self._context.set_tensor_address(spec.name, ctypes.addressof(memory)):
            raise self._misshapen(f"the engine refuses the values {list(values)} for input {spec.name!r}")

    def _enter_profile(self, profile: int) -> None:
        with GATE.alone(wait=True):
            if not self._context.set_optimization_profile_async(profile, self._stream):
                raise self._opened.refused(f"cannot switch to profile {profile}")
        # It may have copied on the stream: nothing of the context begins before that is done.
        self._streams.record(self._done, self._stream)

    def _output_shape(self, name: str) -> Shape:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise ArtifactError(
                f"the shape {list(shape)} of output {name!r} depends on values",
                fix="return a tensor of a size that the inputs' shapes decide, with a mask or a count beside it",
            )
        return shape

    def _misshapen(self, what: str) -> ConfigError:
        return ConfigError(
            what,
            why="; ".join(self._opened.log.errors[-3:]),
            fix="choose sizes inside the profile, or build the engine with wider `dims`",
        )


class _GpuGraph:
    """An executable graph; destroyed with its last reference."""

    def __init__(self, streams: Streams, handle: int) -> None:
        self._streams = streams
        self.handle = handle
        # Not at the interpreter's exit, where a daemon thread may launch it yet.
        weakref.finalize(self, streams.destroy_graph, handle).atexit = False

    def launch(self, stream: int) -> None:
        self._streams.launch(self.handle, stream)


def attach_profiler(opened: OpenEngine, context: Any, on_layer: OnLayer) -> Any:
    """Makes every run of an `IExecutionContext` wait for the GPU and report its layers.

    Returns:
        The `IProfiler`, which must live as long as the context.
    """

    class Profiler(opened.trt.IProfiler):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            opened.trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            on_layer(layer_name, ms)

    profiler = Profiler()
    context.profiler = profiler
    return profiler
