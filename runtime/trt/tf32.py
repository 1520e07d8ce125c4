"""Whether float32 products may round their inputs to TF32: what the builder's flag does not decide on TensorRT-RTX.

Measured with RTX 1.6.1 on an H100: BuilderFlag.TF32 cleared or set, a float32 MatMul and Conv have 70.6 dB SQNR (10
bits of mantissa). Built and run under NVIDIA_TF32_OVERRIDE=0 they have 114 and 108 dB (float32). The engine keeps the
value it was built under: under another one it refuses a context, and a context's change of profile.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = ["MatchingTf32", "set_build_tf32"]

_VARIABLE = "NVIDIA_TF32_OVERRIDE"
_LOCK = threading.Lock()  # the environment is the process's

T = TypeVar("T")


def set_build_tf32(tf32: bool) -> None:
    """Sets this process's environment for a build; called in a build child before TensorRT is imported."""
    _set(None if tf32 else "0")


class MatchingTf32:
    """Calls what an engine refuses under another value of the variable than it was built under.

    The engine does not tell which: the first call tries "0", which every plan but tf32 is built under, then none, and
    later calls keep to the one that worked. Making a context is such a call, and so is switching its profile.
    """

    def __init__(self) -> None:
        self._value: str | None = "0"
        self._known = False

    def __call__(self, call: Callable[[], T | None], on_retry: Callable[[], None]) -> T | None:
        """What `call` gives, or None (or False) where the engine refuses; the environment is left as it was.

        Args:
            call: Asks the engine.
            on_retry: Called between two tries, to forget what TensorRT logged of the first.
        """
        with _LOCK, _restored():
            _set(self._value)
            made = call()
            if not made and not self._known:
                on_retry()
                self._value = None
                _set(None)
                made = call()
            self._known = self._known or bool(made)
            return made


def _set(value: str | None) -> None:
    if value is None:
        os.environ.pop(_VARIABLE, None)
    else:
        os.environ[_VARIABLE] = value


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    before = os.environ.get(_VARIABLE)
    try:
        yield
    finally:
        _set(before)
