"""Whether float32 products may round their inputs to TF32: what the builder's flag does not decide on TensorRT-RTX.

Measured with RTX 1.6.1 on an H100: BuilderFlag.TF32 cleared or set, a float32 MatMul and Conv have 70.6 dB SQNR (10
bits of mantissa). Built and run under NVIDIA_TF32_OVERRIDE=0 they have 114 and 108 dB (float32). The engine keeps the
value it was built under, and refuses a context under another one; once the context is made the variable is free.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["create_with_matching_tf32", "set_build_tf32"]

_VARIABLE = "NVIDIA_TF32_OVERRIDE"
_LOCK = threading.Lock()  # the environment is the process's

T = TypeVar("T")


def set_build_tf32(tf32: bool) -> None:
    """Sets this process's environment for a build; called in a build child before TensorRT is imported."""
    if tf32:
        os.environ.pop(_VARIABLE, None)
    else:
        os.environ[_VARIABLE] = "0"


def create_with_matching_tf32(create: Callable[[], T | None], on_retry: Callable[[], None]) -> T | None:
    """Calls `create` under the value that most engines were built under ("0"), then without, until it gives one.

    Args:
        create: Makes an execution context, or gives None where the engine refuses the environment.
        on_retry: Called between the two, to forget what TensorRT logged of the first.

    Returns:
        What `create` gave; None where it gave nothing under either. The environment is left as it was.
    """
    with _LOCK:
        before = os.environ.get(_VARIABLE)
        try:
            os.environ[_VARIABLE] = "0"
            made = create()
            if made is None:
                on_retry()
                del os.environ[_VARIABLE]
                made = create()
            return made
        finally:
            if before is None:
                os.environ.pop(_VARIABLE, None)
            else:
                os.environ[_VARIABLE] = before
