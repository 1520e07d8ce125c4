"""Whether float32 products may round their inputs to TF32: what the builder's flag does not decide on TensorRT-RTX.

Measured with RTX 1.6.1 on an H100: BuilderFlag.TF32 cleared or set, a float32 MatMul and Conv have 70.6 dB SQNR (10
bits of mantissa). Built and run under NVIDIA_TF32_OVERRIDE=0 they have 114 and 108 dB (float32). An engine that was
built under one value refuses a context, and a context's change of profile, under another one. A runtime cache that is
deserialised before the variable is set gives TF32's kernels to a float32 engine, without a word. And what the process
ran first stays: after an engine with TF32 one without it has TF32's error; the other way round both are exact.
"""

from __future__ import annotations

import os
import threading
import weakref

from trtforge.runtime.errors import ArtifactError

__all__ = ["Tf32Hold", "set_build_tf32"]

_VARIABLE = "NVIDIA_TF32_OVERRIDE"
_LOCK = threading.RLock()  # the environment is the process's; a hold may be collected while another is made


def set_build_tf32(tf32: bool) -> None:
    """Sets this process's environment for a build; called in a build child before TensorRT is imported."""
    _set(_value(tf32))


class Tf32Hold:
    """Holds the variable at the value that an engine was built under; made before the engine is deserialised.

    For the whole process, as long as such an engine lives: kernels that are compiled or fetched from a cache later, for
    shapes not seen before, must not go by another value.

    Args:
        tf32: Whether the engine was built with TF32 allowed.

    Raises:
        ArtifactError: an engine of the other kind lives in this process, or one with TF32 has, and this one is without.
    """

    def __init__(self, tf32: bool) -> None:
        global _with_tf32
        value = _value(tf32)
        with _LOCK:
            if any(held != value for held in _HELD):
                this, other = ("with", "without") if tf32 else ("without", "with")
                raise ArtifactError(
                    f"an engine {this} TF32 cannot be loaded while one {other} it lives in this process",
                    why=f"TensorRT reads {_VARIABLE} for the whole process",
                    fix="close the other engine first, or load this one in a process of its own",
                )
            if _with_tf32 and not tf32:
                raise ArtifactError(
                    "an engine without TF32 cannot be loaded where one with it was loaded before",
                    why=f"TensorRT reads {_VARIABLE} once a process: this engine's float32 products would be rounded",
                    fix="load it first, or in a process of its own",
                )
            _with_tf32 = _with_tf32 or tf32
            if value not in _HELD:
                _HELD[value] = _Held(os.environ.get(_VARIABLE))
                _set(value)
            _HELD[value].engines += 1
        self._let_go = weakref.finalize(self, _let_go, value)

    def release(self) -> None:
        """Lets go of the variable, once; the last engine puts it back as it was before the first."""
        self._let_go()


def _let_go(value: str | None) -> None:
    with _LOCK:
        held = _HELD[value]
        held.engines -= 1
        if not held.engines:
            del _HELD[value]
            _set(held.before)


class _Held:
    """What the variable was before, and how many live engines hold it now."""

    def __init__(self, before: str | None) -> None:
        self.before = before
        self.engines = 0


_HELD: dict[str | None, _Held] = {}
"""At most one entry: the value that live engines need."""
_with_tf32 = False
"""Whether this process has loaded an engine with TF32."""


def _value(tf32: bool) -> str | None:
    return None if tf32 else "0"


def _set(value: str | None) -> None:
    if value is None:
        os.environ.pop(_VARIABLE, None)
    else:
        os.environ[_VARIABLE] = value
