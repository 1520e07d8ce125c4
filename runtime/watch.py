"""A command in two processes: one works, and one watches it, to say what happened where native code ends the other.

The worker is a fork, made before anything heavy is loaded: it costs milliseconds. Terminal, streams and process group
are the same, so that Ctrl-C, Ctrl-Z, bars and debuggers are as without a watcher. What that is to know afterwards is
noted in memory that both have; Python's `faulthandler` writes there too.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

__all__ = ["Crash", "keep_watch", "note", "signal_at_parents_end"]

_STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_PR_SET_PDEATHSIG = 1
_FROM_KERNEL = 0x80  # SI_KERNEL: a terminal's Ctrl-C, which the whole process group gets
_FRAMES = 8
_FRAME = re.compile(r'  File "(.+)", line (\d+) in (.+)')

_notes: int | None = None


@dataclass(frozen=True, slots=True)
class Crash:
    """How the worker ended without an answer.

    Attributes:
        signal: Its name.
        seconds: After its start.
        notes: All that was noted, by key.
        frames: Where Python was in the thread that crashed, the innermost first; empty where nobody could say.
    """

    signal: str
    seconds: float
    notes: dict[str, list[Any]]
    frames: list[str]

    def last(self, key: str) -> str:
        """What was noted last, or ""."""
        return str(self.notes.get(key, [""])[-1])


def note(**facts: Any) -> None:
    """Leaves JSON-able facts for the watcher, where there is one."""
    if _notes is not None:
        with contextlib.suppress(OSError):  # `ulimit -f` counts this too
            os.write(_notes, json.dumps(facts).encode() + b"\n")


def keep_watch(on_crash: Callable[[Crash], int]) -> None:
    """Returns in the worker. The watcher ends here with its exit code, after a crash with the one of `on_crash`.

    Does nothing where a fork would lose threads.
    """
    if sys.platform != "linux" or threading.active_count() > 1:
        return
    global _notes
    start, watcher = time.perf_counter(), os.getpid()
    notes = os.memfd_create("trtforge-notes")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it cannot wait for a process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_STOPS, signal.SIGCHLD})
    try:
        worker = os.fork()
    except OSError:  # `ulimit -u`
        worker = 0
    if worker:
        _exit_like(worker, notes, start, on_crash)
    if os.getpid() != watcher:
        _notes = notes
        signal_at_parents_end(signal.SIGTERM)
        if os.getppid() != watcher:  # it was gone before
            os.kill(os.getpid(), signal.SIGTERM)
        if not faulthandler.is_enabled():
            faulthandler.enable(notes)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def signal_at_parents_end(number: int) -> None:
    """From now on the end of the parent's thread that started this process sends `number` to it, on Linux."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _exit_like(worker: int, notes: int, start: float, on_crash: Callable[[Crash], int]) -> NoReturn:
    status = _wait(worker)
    if not os.WIFSIGNALED(status):
        os._exit(os.WEXITSTATUS(status))  # nothing of this process's own is open
    number = os.WTERMSIG(status)
    if number in _STOPS:  # before the worker could unwind, or after
        os._exit(128 + number)
    name = f"signal {number}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(number).name
    sys.exit(on_crash(Crash(name, time.perf_counter() - start, *_read(notes))))


def _wait(worker: int) -> int:
    """The worker's status at its end; until then signals are passed on to it."""
    while True:
        found = signal.sigwaitinfo({*_STOPS, signal.SIGCHLD})
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            return status
        if found.si_signo in _STOPS and found.si_code != _FROM_KERNEL:
            os.kill(worker, found.si_signo)


def _read(file: int) -> tuple[dict[str, list[Any]], list[str]]:
    """All notes by key; and where Python was in the thread that crashed."""
    notes: dict[str, list[Any]] = {}
    frames: list[str] = []
    crashed: list[str] = []
    os.lseek(file, 0, os.SEEK_SET)
    for line in os.fdopen(file, encoding="utf-8", errors="replace"):
        if line.startswith("{"):
            for key, value in json.loads(line).items():
                notes.setdefault(key, []).append(value)
        elif line.startswith("Fatal Python error"):
            frames = crashed = []  # what came before was of a process that the worker forked
        elif line.startswith(("Thread", "Current thread")):
            frames = []
            crashed = frames if line.startswith("Current") else crashed
        elif found := _FRAME.match(line):
            frames.append(f"{found[1]}, line {found[2]}, in {found[3]}")
    # A thread that a native library started is not among them; the main thread is the last.
    return notes, (crashed or frames)[:_FRAMES]
