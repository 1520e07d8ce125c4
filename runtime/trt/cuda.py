"""The few calls of CUDA's driver that running an engine takes; a target needs neither torch nor the CUDA toolkit."""

from __future__ import annotations

import ctypes
from typing import Any

from trtforge.runtime.errors import ArtifactError

__all__ = ["Cuda", "DeviceBuffer"]

# Ordered after the default stream, on which a runtime may still be preparing the engine.
_STREAM_DEFAULT = 0


class Cuda:
    """The first visible GPU's primary context, the one that TensorRT and torch use too, made current; and one stream.

    Copies and kernels go through `stream` in order; `synchronize` waits for them. Host memory given to a copy must live
    until then.

    Raises:
        ArtifactError: there is no driver or no GPU.
    """

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise ArtifactError(
                "there is no NVIDIA driver on this machine, and an engine runs on a GPU alone",
                fix="run this on the target, or install the driver",
            ) from error
        self._call("cuInit", ctypes.c_uint(0))
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        self.make_current()
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_STREAM_DEFAULT))
        self._stream = stream

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream.value or 0)

    def make_current(self) -> None:
        """Makes the context current in this thread; every thread that calls the others needs it."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size_bytes: int) -> DeviceBuffer:
        """Memory on the GPU, aligned to 256 bytes or more; at least one byte, since null is no address for TensorRT."""
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size_bytes, 1)))
        return DeviceBuffer(self, pointer.value, size_bytes)

    def copy_in(self, buffer: DeviceBuffer, host: Any) -> None:
        """Starts copying a C-contiguous numpy array to the GPU."""
        if host.nbytes:
            self._call(
                "cuMemcpyHtoDAsync_v2",
                ctypes.c_uint64(buffer.address),
                ctypes.c_void_p(host.ctypes.data),
                ctypes.c_size_t(host.nbytes),
                self._stream,
            )

    def copy_out(self, host: Any, buffer: DeviceBuffer) -> None:
        """Starts copying from the GPU into a C-contiguous numpy array."""
        if host.nbytes:
            self._call(
                "cuMemcpyDtoHAsync_v2",
                ctypes.c_void_p(host.ctypes.data),
                ctypes.c_uint64(buffer.address),
                ctypes.c_size_t(host.nbytes),
                self._stream,
            )

    def synchronize(self) -> None:
        """Waits for the stream.

        Raises:
            ArtifactError: something in it failed.
        """
        self._call("cuStreamSynchronize", self._stream)

    def free(self, address: int) -> None:
        """Gives memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def close(self) -> None:
        """Destroys the stream; buffers must have been freed."""
        if self._stream:
            self._call("cuStreamDestroy_v2", self._stream)
            self._stream = ctypes.c_void_p()

    def check(self, code: int, name: str) -> None:
        """Judges what the driver's function `name` returned.

        Raises:
            ArtifactError: `code` is not 0.
        """
        if code:
            raise ArtifactError(
                f"the GPU's driver refused {name}: {self.error_text(code)} (CUDA error {code})",
                fix="free memory of the GPU, or try smaller inputs" if code == 2 else "check the GPU with nvidia-smi",
            )

    def error_text(self, code: int) -> str:
        """The driver's words for an error."""
        text = ctypes.c_char_p()
        self._lib.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
        return text.value.decode(errors="replace") if text.value else "unknown error"

    def _call(self, name: str, *args: Any) -> None:
        self.check(getattr(self._lib, name)(*args), name)


class DeviceBuffer:
    """Memory on the GPU: its address and how many bytes were asked for. `free` it; twice does no harm."""

    def __init__(self, cuda: Cuda, address: int, size_bytes: int) -> None:
        self._cuda = cuda
        self.address = address
        self.size_bytes = size_bytes

    def free(self) -> None:
        """Gives the memory back."""
        address, self.address = self.address, 0
        if address:
            self._cuda.free(address)
