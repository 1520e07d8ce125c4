"""A replay of a CUDA graph between its copies: in one call of compiled code, or else in the driver's calls one by one.

A plain call of an engine is five calls of the driver and more: wait, copy in, launch, copy out, record. ctypes lets go
of the interpreter's lock in each of them, and where other threads wait for it each time may be a switch between them:
eight threads made half the calls of one so. `replay.c` makes them all in one, as `count.c` does for calibration: it is
compiled where the package is installed, if there is a compiler, and `TRTFORGE_NATIVE=0` leaves it unused.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Protocol

from trtforge.runtime.native import load_native

__all__ = ["CALLS", "Driver", "DriverCalls", "Executable", "NativeReplay", "native_replay"]

CALLS = ("cuStreamWaitEvent", "cuMemcpyDtoDAsync", "cuGraphLaunch", "cuMemcpyDtoDAsync", "cuEventRecord")
"""By `step` of `replay.c`."""


class DriverCalls(ctypes.Structure):
    """`driver` of `replay.c`: addresses of functions."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("wait", "copy", "launch", "record")]


class Driver(Protocol):
    """Of `streams.Streams`: what a replay takes."""

    calls: DriverCalls

    def check(self, code: int, name: str) -> None: ...


class Executable(Protocol):
    """A graph by its handle, destroyed with its last reference."""

    handle: int


class _Replay(ctypes.Structure):
    """`replay` of `replay.c`."""

    _fields_ = [
        ("cuda", ctypes.POINTER(DriverCalls)),
        ("done", ctypes.c_void_p),
        ("graph", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("inside", ctypes.POINTER(ctypes.c_uint64)),
        ("sizes", ctypes.POINTER(ctypes.c_size_t)),
    ]


@functools.cache
def native_replay() -> Any | None:
    """The compiled function, or None."""
    library = load_native("runtime/_replay")
    try:
        function = library.trtforge_replay if library else None
    except AttributeError:
        return None
    if function is not None:
        function.restype = ctypes.c_int
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return function


class NativeReplay:
    """See `lanes.Replay`. One thread at a time.

    Args:
        function: What `native_replay` gives.
        driver: The driver's functions, and who judges what they return.
        graph: The executable graph; kept.
        done: The event of the context's work.
        inputs: How many of the addresses are inputs.
        inside: Addresses in the graph, inputs before outputs; none where it runs at the caller's.
        sizes: Bytes at each of them.
    """

    def __init__(
        self,
        function: Any,
        driver: Driver,
        graph: Executable,
        *,
        done: int,
        inputs: int,
        inside: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        count = len(inside)
        self._function, self._driver, self._graph = function, driver, graph
        self._outside = (ctypes.c_uint64 * count)()
        self._step = ctypes.c_int()
        # The structure holds addresses; ctypes keeps the arrays with it.
        self._replay = _Replay(
            ctypes.pointer(driver.calls),
            done,
            graph.handle,
            inputs,
            count,
            (ctypes.c_uint64 * count)(*inside),
            (ctypes.c_size_t * count)(*sizes),
        )
        # Looked up once: a call is made of microseconds.
        self._arguments = ctypes.addressof(self._replay), ctypes.addressof(self._outside)
        self._step_at = ctypes.addressof(self._step)

    def __call__(self, outside: Sequence[int], stream: int) -> None:
        """See `lanes.Replay`."""
        self._outside[:] = outside  # type: ignore[call-overload]  # any sequence will do
        if code := self._function(*self._arguments, stream, self._step_at):
            self._driver.check(code, CALLS[self._step.value])
