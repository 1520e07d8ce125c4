"""The GPU of this machine, asked of the driver alone: neither torch nor the CUDA toolkit is needed."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

__all__ = ["DeviceFacts", "device_facts", "gpu_present", "list_devices", "why_no_gpu"]

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
    return next(iter(list_devices()), None)


def list_devices() -> tuple[DeviceFacts, ...]:
    """Every GPU that CUDA_VISIBLE_DEVICES leaves visible, in CUDA's order; empty without a driver or a GPU."""
    cuda, _ = _open_driver()
    if cuda is None:
        return ()
    count = ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = (_facts_of(cuda, ordinal) for ordinal in range(count.value))
    return tuple(facts for facts in found if facts is not None)


def why_no_gpu() -> str:
    """Why `list_devices` is empty; "" where it is not."""
    cuda, why = _open_driver()
    if cuda is None:
        return why
    return "" if list_devices() else "the driver shows no GPU (see CUDA_VISIBLE_DEVICES and nvidia-smi)"


def _open_driver() -> tuple[ctypes.CDLL | None, str]:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, "there is no NVIDIA driver (libcuda.so.1 is not found)"
    if code := cuda.cuInit(0):
        return None, f"the driver is installed and does not start: cuInit gave CUDA error {code}"
    return cuda, ""


def _facts_of(cuda: ctypes.CDLL, ordinal: int) -> DeviceFacts | None:
    device, driver = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDeviceGet(ctypes.byref(device), ordinal) or cuda.cuDriverGetVersion(ctypes.byref(driver)):
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
