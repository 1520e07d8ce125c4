"""The device of an engine as torch sees it: its memory, its current stream, and what to say when it is full."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from trtforge.runtime.errors import ArtifactError, ConfigError
from trtforge.runtime.lanes import Buffer, Lane, OnLayer, Session, Shape

__all__ = ["byte_size", "current_gpu_stream", "lane_opener", "no_memory"]


def lane_opener(
    session: Session, device: torch.device, graphs: int, on_layer: OnLayer | None = None
) -> Callable[[int], Lane]:
    """What opens one more lane of a session in a profile, with buffers on `device` and so many graphs at most.

    It raises ArtifactError where TensorRT gives no context even after torch gave back the memory that it keeps.
    """

    def open_lane(profile: int) -> Lane:
        session.enter_thread()
        try:
            context = session.open_context(profile, on_layer)
        except ArtifactError:
            if device.type != "cuda":
                raise
            torch.cuda.empty_cache()  # torch may sit on what TensorRT needs
            context = session.open_context(profile, on_layer)
        return Lane(context, profile, _allocator(device), graphs)

    return open_lane


def byte_size(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of a contiguous tensor."""
    return math.prod(shape) * dtype.itemsize


def current_gpu_stream() -> int:
    """The handle of the calling thread's current stream on the first GPU.

    Raises:
        ConfigError: another GPU is current, or the stream is being captured.
    """
    # Handle 0 is the default stream of whichever device is current.
    if torch.cuda.current_device() != 0:
        raise ConfigError(
            f"the current device is cuda:{torch.cuda.current_device()}, and the engine is on cuda:0",
            fix="call it under `with torch.cuda.device(0):`, or choose the GPU with CUDA_VISIBLE_DEVICES",
        )
    if torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            "the current stream is being captured in a CUDA graph",
            why="an engine's call waits for what other streams do with its memory, which no graph can hold",
            fix="capture what comes before and after it; the engine replays a graph of its own",
        )
    return int(torch.cuda.current_stream().cuda_stream)


def no_memory(device: torch.device) -> ArtifactError:
    """The error for a call that found the device full."""
    return ArtifactError(
        f"there is no memory left on {device} for this call",
        fix="free tensors, call with smaller inputs, or load the engine with fewer contexts",
    )


def _allocator(device: torch.device) -> Callable[[int], Buffer]:
    return lambda size_bytes: torch.empty(size_bytes, dtype=torch.uint8, device=device)
