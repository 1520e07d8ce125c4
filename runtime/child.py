"""Work that may crash natively runs in a child process: this is both ends of it.

A child is `python -m trtforge.runtime.child FD`, never `multiprocessing`: an unguarded user script, a notebook and a
local class all work, and nothing is pickled. Only JSON and paths cross. The child has a session of its own (Ctrl-C on
the terminal reaches the parent alone), reports on a pipe of its own (native libraries print to stdout), and dies when
told to (SIGTERM) or when its parent is gone. The parent alone owns temporary folders.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from trtforge.runtime import errors
from trtforge.runtime.faults import explain_os_error
from trtforge.runtime.watch import signal_at_parents_end

__all__ = ["TASKS", "ChildCrashError", "Emit", "OnEvent", "child_environment", "module_command", "run_child"]

Emit = Callable[..., None]
"""Called in the child as `emit("progress", phase="…", done=3, total=9)`; reaches the parent's `on_event` as a dict."""
OnEvent = Callable[[dict[str, Any]], None]

TASKS: dict[str, str] = {
    "trt.build": "trtforge.runtime.trt.build:build_task",
    "trt.run": "trtforge.runtime.trt.execute:run_task",
    "trt.time": "trtforge.runtime.trt.execute:time_task",
    "trt.probe": "trtforge.runtime.trt.probe:probe_task",
    "torch.probe": "trtforge.runtime.probes:probe_torch_task",
    "onnx.probe": "trtforge.runtime.probes:probe_onnxruntime_task",
    "trt.inspect": "trtforge.runtime.trt.execute:inspect_task",
    "onnx.run": "trtforge.runtime.onnx_runner:run_task",
    "onnx.run_many": "trtforge.runtime.onnx_batch:run_many_task",
}
"""What a child can do: `module:function`, called as `function(args, emit) -> JSON-able dict`."""

_GRACE_SECONDS = 5.0
_POLL_SECONDS = 1.0
_MODULE = "trtforge.runtime.child"
_RUN_MODULE = (
    "import runpy, sys; del sys.path[0]; module = sys.argv.pop(1); "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


class ChildCrashError(errors.TrtForgeError):
    """A child ended without an answer: a native crash, or it was killed. `signal` is its name, or "" after an exit.

    An exit is a bug of ours; a signal is none, and the command's exit code is that of a stage that failed.
    """

    def __init__(self, what: str, *, why: str = "", fix: str = "", signal_name: str = "") -> None:
        super().__init__(what, why=why, fix=fix)
        self.signal = signal_name
        if signal_name:
            self.exit_code = 3


@dataclass(slots=True)
class _Answer:
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = None


def module_command(module: str) -> list[str]:
    """The command that runs a module with this Python as its console script would be run.

    The user's folder may hold a `typing.py`: it must not come first on the path, which -P says from Python 3.11 on.
    """
    return [sys.executable, *(("-P", "-m") if sys.version_info >= (3, 11) else ("-c", _RUN_MODULE)), module]


def child_environment() -> dict[str, str]:
    """Variables that a child of ours needs beside those of this process."""
    return {**_python_path(), "PYTHONUTF8": "1"}


def run_child(
    task: str, args: Mapping[str, Any], *, on_event: OnEvent | None = None, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs one task of `TASKS` in a child process and waits for its answer.

    Args:
        task: A key of `TASKS`.
        args: JSON-able; paths as `str`.
        on_event: Called in this thread with every event that the child emits.
        env: Variables added to the child's environment.

    Returns:
        What the task returned.

    Raises:
        TrtForgeError: the same class, `what`, `why` and `fix` that the task raised.
        ChildCrashError: the child died without an answer; its last lines on stderr are in `why`.
        KeyboardInterrupt: passed on once the child has been stopped.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}")
    request = json.dumps({"task": task, "args": dict(args)}) + "\n"
    answer = _Answer()
    # A file, not a pipe: however much a native library prints, it never blocks.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process, events_fd = _spawn(log, env)
        try:
            _feed(process, request.encode())
            for event in _events(events_fd, process):
                _take(event, answer, on_event)
            code = _wait(process, answered=answer.result is not None or answer.error is not None)
        except BaseException:
            _stop(process)
            raise
        finally:
            os.close(events_fd)
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        if answer.error is not None:
            raise _revive(answer.error)
        if answer.result is not None:
            return answer.result
        raise _crashed(task, code, log)


def _spawn(log: TextIO, env: Mapping[str, str] | None) -> tuple[subprocess.Popen[bytes], int]:
    read_fd, write_fd = os.pipe()
    try:
        process = subprocess.Popen(
            [*module_command(_MODULE), str(write_fd)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(write_fd,),
            start_new_session=True,
            bufsize=0,
            env={**os.environ, **child_environment(), **(env or {})},
        )
    except BaseException:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
    return process, read_fd


def _feed(process: subprocess.Popen[bytes], request: bytes) -> None:
    assert process.stdin is not None
    view = memoryview(request)
    # stdin stays open after the request: its end tells the child that the parent is gone.
    with contextlib.suppress(BrokenPipeError):
        while view:
            view = view[process.stdin.write(view) or 0 :]


def _events(fd: int, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """Every whole event until the child is gone; what a crash cut in two is dropped."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    pending = bytearray()
    while True:
        if not poll.poll(_POLL_SECONDS * 1000):
            # A process that another thread forked meanwhile may hold the pipe open after the child's end.
            if process.poll() is not None and not poll.poll(0):
                return
            continue
        block = os.read(fd, 1 << 16)
        if not block:
            return
        pending += block
        if b"\n" in block:
            *lines, rest = pending.split(b"\n")
            pending = bytearray(rest)
            for line in lines:
                yield json.loads(line)


def _wait(process: subprocess.Popen[bytes], *, answered: bool) -> int:
    """The exit code; a child that has answered and yet doesn't end is stopped."""
    try:
        return process.wait(_GRACE_SECONDS if answered else None)
    except subprocess.TimeoutExpired:
        _stop(process)
        return 0


def _python_path() -> dict[str, str]:
    """What a child needs to find this very code where trtforge runs from a checkout that is not installed."""
    # Unresolved: `trtforge/runtime` is a link in a checkout, and its target's folder is no package.
    root = Path(__file__).parents[2]
    if root.name in ("site-packages", "dist-packages"):
        return {}
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{inherited}{os.pathsep}{root}" if inherited else str(root)}


def _take(event: dict[str, Any], answer: _Answer, on_event: OnEvent | None) -> None:
    kind = event.get("event")
    if kind == "result":
        answer.result = event["value"]
    elif kind == "error":
        answer.error = event["value"]
    elif on_event is not None:
        on_event(event)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for stop in (process.terminate, process.kill):
        with contextlib.suppress(ProcessLookupError):
            stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
            return


def _revive(error: Mapping[str, str]) -> errors.TrtForgeError:
    known = getattr(errors, error["type"], None)
    kind = known if isinstance(known, type) and issubclass(known, errors.TrtForgeError) else errors.TrtForgeError
    return kind(error["what"], why=error.get("why", ""), fix=error.get("fix", ""))


def _crashed(task: str, code: int, log: TextIO) -> ChildCrashError:
    log.seek(0)
    tail = [line for line in log.read().splitlines() if line.strip()][-12:]
    name = ""
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
    ended = f"was ended by {name or f'signal {-code}'}" if code < 0 else f"exited with code {code}"
    fix = ""
    if name:
        fix = "free memory, or use a larger machine" if name == "SIGKILL" else "report it with the lines above"
    return ChildCrashError(
        f"the child process of {task} {ended} without an answer",
        why="its last words:\n    " + "\n    ".join(tail) if tail else "it said nothing before it ended",
        fix=fix,
        signal_name=name,
    )


def _die_with_parent() -> None:
    signal_at_parents_end(signal.SIGKILL)

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os._exit(143)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _as_utf8(value: Any) -> Any:
    """A parent in an ASCII locale writes the bytes of a path as surrogates; native libraries take UTF-8 alone."""
    if isinstance(value, str):
        return os.fsdecode(os.fsencode(value))  # this process runs in UTF-8 mode
    if isinstance(value, list):
        return [_as_utf8(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_utf8(item) for key, item in value.items()}
    return value


def _main(write_fd: int) -> int:
    request_line = bytearray()
    while not request_line.endswith(b"\n"):  # nothing follows the request
        block = os.read(0, 1 << 16)
        if not block:
            return 143
        request_line += block
    _die_with_parent()
    lock = threading.Lock()

    def send(event: dict[str, Any]) -> None:
        data = (json.dumps(event) + "\n").encode()
        with lock:
            while data:
                data = data[os.write(write_fd, data) :]

    def send_error(error: errors.TrtForgeError) -> None:
        value = {"type": type(error).__name__, "what": error.what, "why": error.why, "fix": error.fix}
        send({"event": "error", "value": value})

    def emit(kind: str, **fields: Any) -> None:
        send({"event": kind, **fields})

    request = _as_utf8(json.loads(request_line))
    module, _, function = TASKS[request["task"]].partition(":")
    try:
        task = getattr(importlib.import_module(module), function)
        send({"event": "result", "value": task(request["args"], emit)})
    except errors.TrtForgeError as error:
        send_error(error)
    except OSError as error:
        explained = explain_os_error(error)
        if explained is None:
            raise
        send_error(explained)
    return 0


if __name__ == "__main__":
    status = _main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: destructors of native libraries crash or hang at the interpreter's end, and all is said.
    os._exit(status)
