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
    saving the cache.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._alone = False
        self._waiting = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Waits while someone is, or wants to be, alone. Not to be nested."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self, *, wait: bool) -> Iterator[bool]:
        """Gives whether one is alone: at once, or, with `wait`, as soon as all others have left."""
        with self._changed:
            entered = not self._inside and not self._alone
            if not entered and wait:
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: not self._inside and not self._alone)
                finally:
                    self._waiting -= 1
                entered = True
            self._alone = self._alone or entered
        try:
            yield entered
        finally:
            if entered:
                with self._changed:
                    self._alone = False
                    self._changed.notify_all()


GATE = Gate()
"""The process's: the rule holds for all engines on a device together."""
