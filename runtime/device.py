"""The GPU of this machine, asked of the driver alone: neither torch nor the CUDA toolkit is needed."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

__all__ = ["DeviceFacts", "device_facts", "gpu_present"]

# CUdevice_attribute of cuda.h
_MULTIPROCESSOR_COUNT = 16
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """The first visible GPU.

    Attributes:
        name: As the driver names it.
        compute_capability: "9.0".
        sm_count: Streaming multiprocessors.
        cuda_version: The newest CUDA that the driver runs, "13.0".
        memory_bytes: All of the GPU's memory.
    """

    name: str
    compute_capability: str
    sm_count: int
    cuda_version: str
    memory_bytes: int


def gpu_present() -> bool:
    """Whether a GPU can be used from this process."""
    return device_facts() is not None


@functools.cache
def device_facts() -> DeviceFacts | None:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves visible, or None without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, driver = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        return None
    if cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDriverGetVersion(ctypes.byref(driver)):
        return None
    name = ctypes.create_string_buffer(256)
    memory = ctypes.c_size_t()
    if cuda.cuDeviceGetName(name, len(name), device) or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device):
        return None

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    return DeviceFacts(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{attribute(_COMPUTE_CAPABILITY_MAJOR)}.{attribute(_COMPUTE_CAPABILITY_MINOR)}",
        sm_count=attribute(_MULTIPROCESSOR_COUNT),
        # cuda.h: 1000 * major + 10 * minor
        cuda_version=f"{driver.value // 1000}.{driver.value % 1000 // 10}",
        memory_bytes=memory.value,
    )
