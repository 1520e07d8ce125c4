"""The asynchronous side of CUDA's driver: streams, events, copies on the GPU, and graphs, by handle.

Of the driver rather than of torch: torch's `CUDAGraph` refuses to replay in one thread while another one captures, and
its streams come from a pool that anyone may share. A handle is an int; 0 is the legacy default stream.
"""

from __future__ import annotations

import ctypes
from typing import Any

from trtforge.runtime.trt.cuda import Cuda
from trtforge.runtime.trt.replay import DriverCalls

__all__ = ["CaptureError", "Streams"]

# cuda.h
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: work on the legacy default stream neither waits for it nor breaks a capture
_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads allocate meanwhile is no concern of it
_NOT_READY = 600  # CUDA_ERROR_NOT_READY

_HANDLE = ctypes.c_void_p
_ADDRESS = ctypes.c_uint64
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuStreamCreate": (ctypes.POINTER(_HANDLE), ctypes.c_uint),
    "cuStreamDestroy_v2": (_HANDLE,),
    "cuStreamWaitEvent": (_HANDLE, _HANDLE, ctypes.c_uint),
    "cuEventCreate": (ctypes.POINTER(_HANDLE), ctypes.c_uint),
    "cuEventDestroy_v2": (_HANDLE,),
    "cuEventRecord": (_HANDLE, _HANDLE),
    "cuEventQuery": (_HANDLE,),
    "cuEventSynchronize": (_HANDLE,),
    "cuMemcpyDtoDAsync_v2": (_ADDRESS, _ADDRESS, ctypes.c_size_t, _HANDLE),
    "cuStreamBeginCapture_v2": (_HANDLE, ctypes.c_int),
    "cuStreamEndCapture": (_HANDLE, ctypes.POINTER(_HANDLE)),
    "cuGraphInstantiateWithFlags": (ctypes.POINTER(_HANDLE), _HANDLE, ctypes.c_ulonglong),
    "cuGraphUpload": (_HANDLE, _HANDLE),
    "cuGraphLaunch": (_HANDLE, _HANDLE),
    "cuGraphDestroy": (_HANDLE,),
    "cuGraphExecDestroy": (_HANDLE,),
}


class CaptureError(Exception):
    """A capture came to nothing; the stream is as it was before. Carries the driver's words."""


class Streams:
    """The driver's calls. The device's context must be current in the calling thread: `Cuda.make_current`.

    Methods raise ArtifactError where the driver refuses, unless they say otherwise.

    Attributes:
        calls: The driver's functions that a replay takes, for compiled code.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        # A handle of our own: the types below are then nobody else's.
        lib = ctypes.CDLL("libcuda.so.1")
        for name, types in _SIGNATURES.items():
            getattr(lib, name).argtypes = types
        self._lib = lib
        # Bound once: these run on every call of an engine.
        self._record, self._wait = lib.cuEventRecord, lib.cuStreamWaitEvent
        self._copy, self._launch = lib.cuMemcpyDtoDAsync_v2, lib.cuGraphLaunch
        functions = (self._wait, self._copy, self._launch, self._record)
        self.calls = DriverCalls(*(ctypes.cast(function, ctypes.c_void_p).value for function in functions))

    def create_stream(self) -> int:
        """A stream that does not wait for the legacy default stream."""
        return self._made("cuStreamCreate", _NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        """Destroys it once its work is done."""
        self.check(self._lib.cuStreamDestroy_v2(stream), "cuStreamDestroy")

    def create_event(self) -> int:
        """An event without timing, which counts as done until it is recorded."""
        return self._made("cuEventCreate", _DISABLE_TIMING)

    def destroy_event(self, event: int) -> None:
        """Destroys it."""
        self.check(self._lib.cuEventDestroy_v2(event), "cuEventDestroy")

    def record(self, event: int, stream: int) -> None:
        """Makes the event stand for all work of the stream so far."""
        if code := self._record(event, stream):
            self.check(code, "cuEventRecord")

    def wait(self, stream: int, event: int) -> None:
        """Makes later work of the stream wait for the event; the host does not."""
        if code := self._wait(stream, event, 0):
            self.check(code, "cuStreamWaitEvent")

    def is_done(self, event: int) -> bool:
        """Whether the work that the event stands for is done."""
        code = self._lib.cuEventQuery(event)
        if code == _NOT_READY:
            return False
        self.check(code, "cuEventQuery")
        return True

    def finish(self, event: int) -> None:
        """Makes the host wait for the event."""
        self.check(self._lib.cuEventSynchronize(event), "cuEventSynchronize")

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copies on the GPU, in the stream's order."""
        if code := self._copy(target, source, size_bytes, stream):
            self.check(code, "cuMemcpyDtoDAsync")

    def begin_capture(self, stream: int) -> None:
        """From here on what this thread puts on the stream is recorded instead of run."""
        self.check(self._lib.cuStreamBeginCapture_v2(stream, _THREAD_LOCAL), "cuStreamBeginCapture")

    def end_capture(self, stream: int) -> int:
        """The recorded work as an executable graph, uploaded to the GPU.

        Raises:
            CaptureError: what was put on the stream cannot be captured, or another thread waited for the whole device
                meanwhile, which CUDA does not allow.
        """
        graph, executable = _HANDLE(), _HANDLE()
        code = self._lib.cuStreamEndCapture(stream, ctypes.byref(graph))
        if code or not graph.value:
            raise CaptureError(self._cuda.error_text(code))
        code = self._lib.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, 0)
        self._lib.cuGraphDestroy(graph)
        if code or not executable.value:
            raise CaptureError(self._cuda.error_text(code))
        # Else the first launch would do it, later than it need be; a failure will show there.
        self._lib.cuGraphUpload(executable, stream)
        return int(executable.value)

    def launch(self, graph: int, stream: int) -> None:
        """Puts the graph's work on the stream."""
        if code := self._launch(graph, stream):
            self.check(code, "cuGraphLaunch")

    def destroy_graph(self, graph: int) -> None:
        """Destroys an executable graph; work of it that is under way still finishes.

        Never raises: the garbage collector calls it.
        """
        self._lib.cuGraphExecDestroy(graph)

    def check(self, code: int, name: str) -> None:
        """Judges what the driver's function `name` returned."""
        self._cuda.check(code, name)

    def _made(self, name: str, flags: int) -> int:
        handle = _HANDLE()
        self.check(getattr(self._lib, name)(ctypes.byref(handle), flags), name)
        return int(handle.value or 0)
