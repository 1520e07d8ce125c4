"""Ctrl-C, SIGTERM and SIGHUP unwind the command line, so that every folder and child is cleaned up on the way out."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["Stopped", "stops_cleanly"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):  # not an error; and not KeyboardInterrupt, which click turns into exit 1
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def stops_cleanly() -> Iterator[None]:
    """Inside, the first of these signals raises `Stopped` in the main thread; the rest are ignored while it unwinds."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def stop(number: int, frame: FrameType | None) -> None:
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    for number in _SIGNALS:
        if before[number] is not signal.SIG_IGN:  # nohup, and a shell's background jobs
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # one that C code had installed
                signal.signal(number, handler)
