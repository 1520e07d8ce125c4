"""Keeps captures, and what compiles, apart from everything else that TensorRT does in this process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["GATE", "Gate"]


class Gate:
    """Many may pass it `shared` at once, or one `alone`.

    While a stream is captured, CUDA fails every wait for the device, in any thread, and spoils the capture for it.
    TensorRT may wait so whenever it prepares, compiles or enqueues; launching a graph and copying never does.

    What compiles, or writes or reads what was compiled, is alone as well: on an H100 TensorRT-RTX 1.6.1 ended the
    process (SIGSEGV in `execute_async_v3`) where eight threads ran new shapes while one made another context of the
    same engine, which share a runtime cache. That is: loading, making a context, its first run with new shapes, and
    saving the cache. So is what frees an engine or a context.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: set[int] = set()
        self._alone: int | None = None
        self._waiting = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Waits while someone is, or wants to be, alone. Not to be nested."""
        thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._alone is None and not self._waiting)
            self._inside.add(thread)
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(thread)
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self, *, wait: bool) -> Iterator[bool]:
        """Gives whether one is alone: at once, or, with `wait`, as soon as all others have left.

        Never, and at once, in a thread that is inside already: the garbage collector closes engines in any thread, at
        any line of it.
        """
        thread = threading.get_ident()
        with self._changed:
            entered = self._is_empty()
            if not entered and wait and thread not in self._inside and thread != self._alone:
                self._waiting += 1
                try:
                    self._changed.wait_for(self._is_empty)
                finally:
                    self._waiting -= 1
                entered = True
            if entered:
                self._alone = thread
        try:
            yield entered
        finally:
            if entered:
                with self._changed:
                    self._alone = None
                    self._changed.notify_all()

    def _is_empty(self) -> bool:
        return not self._inside and self._alone is None


GATE = Gate()
"""The process's: the rule holds for all engines on a device together."""
