"""The wire between a batch and the conversions that it started: progress goes up, and its end says that the batch died.

A child is `trtforge convert FILE --only NAME` with the number of an open socket in its environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import threading
from typing import Any

from trtforge.converter.progress import Event

__all__ = ["VARIABLE", "Link", "open_link", "read_event"]

VARIABLE = "TRTFORGE_BATCH_FD"
_GRACE_SECONDS = 10.0


class Link:
    """The child's end."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire

    def show(self, event: Event) -> None:
        """Sends one event up."""
        data = json.dumps(dataclasses.asdict(event)) + "\n"
        with contextlib.suppress(OSError):  # the batch is gone, and the watch is about to end this process
            self._wire.sendall(data.encode())


def open_link() -> Link | None:
    """The link to the batch that started this process, or None; from now on the batch's end ends this process."""
    number = os.environ.pop(VARIABLE, None)  # processes that the user's code starts shall not find it
    if number is None or not number.isdigit():
        return None
    try:
        wire = socket.socket(fileno=int(number))
    except OSError:
        return None
    wire.set_inheritable(False)
    threading.Thread(target=_watch, args=(wire,), daemon=True, name="batch-watch").start()
    return Link(wire)


def read_event(line: bytes) -> Event:
    """An event from the bytes that `Link.show` sent."""
    data: dict[str, Any] = json.loads(line)
    return Event(**data)


def _watch(wire: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while wire.recv(4096):
            pass
    # As if the user had pressed Ctrl-C: the main thread cleans up. Native code may keep it from that.
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
