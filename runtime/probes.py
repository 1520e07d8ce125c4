"""What a library says of itself once it is loaded. Loading may fail or crash, so that it happens in a child process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtforge.runtime.child import ChildCrashError, Emit, run_child
from trtforge.runtime.errors import MissingDependencyError, TrtForgeError

__all__ = ["probe", "probe_onnxruntime_task", "probe_torch_task"]


def probe(task: str, args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The facts of one library, or `{"error": why it does not load}`.

    Args:
        task: "torch.probe", "onnx.probe" or "trt.probe".
        args: The task's arguments.
    """
    try:
        return run_child(task, args or {})
    except ChildCrashError as error:
        return {"error": f"{error.what}; {error.why}"}
    except TrtForgeError as error:
        return {"error": error.what}


def probe_torch_task(args: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """The child's side: torch's version, the CUDA it was built for (None: a CPU build), and whether it finds a GPU."""
    try:
        import torch
    except (ImportError, OSError) as error:  # ctypes, with which torch loads CUDA's libraries, raises OSError
        raise MissingDependencyError(f"torch does not load: {error}") from error
    # torch warns where the driver is older than its CUDA; that is what `sees_gpu` says.
    return {"version": torch.__version__, "cuda": torch.version.cuda, "sees_gpu": torch.cuda.is_available()}


def probe_onnxruntime_task(args: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """The child's side: onnxruntime's version and its execution providers."""
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise MissingDependencyError(f"onnxruntime does not load: {error}") from error
    return {"version": onnxruntime.__version__, "providers": list(onnxruntime.get_available_providers())}
