"""Whether float32 products may round their inputs to TF32: what the builder's flag does not decide on TensorRT-RTX.

Measured with RTX 1.6.1 on an H100: BuilderFlag.TF32 cleared or set, a float32 MatMul and Conv have 70.6 dB SQNR (10
bits of mantissa). Built and run under NVIDIA_TF32_OVERRIDE=0 they have 114 and 108 dB (float32). The engine keeps the
value it was built under: under another one it refuses a context, and a context's change of profile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["MatchingTf32", "set_build_tf32"]

_VARIABLE = "NVIDIA_TF32_OVERRIDE"
_LOCK = threading.Lock()  # the environment is the process's

T = TypeVar("T")


def set_build_tf32(tf32: bool) -> None:
    """Sets this process's environment for a build; called in a build child before TensorRT is imported."""
    _set(None if tf32 else "0")


class MatchingTf32:
    """Holds the variable at the value that an engine was built under, from its first context until `release`.

    Not only a context and its change of profile are refused under another value: kernels that TensorRT-RTX compiles
    later, for shapes it has not seen, go by the variable too (measured: TF32's error from a float32 engine). So it is
    held for the whole process as long as such an engine lives, and engines of the other kind cannot live beside it.
    """

    def __init__(self) -> None:
        self._value: str | None = None
        self._holds = False

    def __call__(self, call: Callable[[], T | None], on_retry: Callable[[], None]) -> T | None:
        """What `call` gives, or None (or False) where the engine refuses.

        The engine does not tell its value: "0" is tried first, which every plan but tf32 is built under, then none; or
        only the value that another live engine holds.

        Args:
            call: Asks the engine.
            on_retry: Called between two tries, to forget what TensorRT logged of the first.
        """
        with _LOCK:
            if self._holds:
                return call()
            before = os.environ.get(_VARIABLE)
            values = list(_HELD) or ["0", None]
            for number, value in enumerate(values):
                if number:
                    on_retry()
                _set(value)
                made = call()
                if made:
                    self._value, self._holds = value, True
                    _HELD.setdefault(value, _Held(before)).engines += 1
                    return made
            _set(before)
            return None

    def release(self) -> None:
        """Lets go of the variable; the last engine puts it back as it was before the first."""
        with _LOCK:
            if not self._holds:
                return
            self._holds = False
            held = _HELD[self._value]
            held.engines -= 1
            if not held.engines:
                del _HELD[self._value]
                _set(held.before)


@dataclass(slots=True)
class _Held:
    """What the variable was before, and how many live engines hold it now."""

    before: str | None
    engines: int = 0


_HELD: dict[str | None, _Held] = {}
"""At most one entry: the value that live engines need."""


def _set(value: str | None) -> None:
    if value is None:
        os.environ.pop(_VARIABLE, None)
    else:
        os.environ[_VARIABLE] = value
