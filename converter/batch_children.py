"""Conversions in child processes, several at once: started, listened to, and stopped together."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from trtforge.converter.batch import Failure, Outcome
from trtforge.converter.batch_link import VARIABLE, read_event
from trtforge.converter.crash import explain_end
from trtforge.converter.manifest import read_manifest
from trtforge.converter.progress import Event
from trtforge.runtime.child import child_environment, module_command
from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.publish import sweep_stale

__all__ = ["Asked", "convert_in_children"]

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 15.0
_TAIL_LINES = 12


@dataclass(frozen=True, slots=True)
class Asked:
    """One model to convert, and where its artifact goes."""

    name: str
    target: Path


@dataclass(slots=True)
class _Child:
    asked: Asked
    process: subprocess.Popen[bytes]
    wire: socket.socket
    start: float
    answer: bytearray = field(default_factory=bytearray)
    text: bytearray = field(default_factory=bytearray)
    events: bytearray = field(default_factory=bytearray)
    tail: list[str] = field(default_factory=list)
    stage: str = ""


def convert_in_children(
    file: Path,
    asked: Sequence[Asked],
    output: Path,
    *,
    jobs: int,
    force: bool,
    on_event: Callable[[str, Event], None],
    on_text: Callable[[str], None],
    on_outcome: Callable[[Outcome], None],
) -> None:
    """Runs `trtforge convert FILE --only NAME` for each model, at most `jobs` at once.

    When this is interrupted every child is told to stop, cleans up, and is killed where it does not.

    Args:
        file: The YAML file.
        asked: Its models.
        output: Folder of the artifacts.
        jobs: How many run at once.
        force: Convert what is unchanged too.
        on_event: Called with a model's name and its progress.
        on_text: Called with what a child wrote to its standard error, whole lines.
        on_outcome: Called with each outcome as soon as its child has ended.
    """
    waiting, running = list(asked), list[_Child]()
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(file, waiting.pop(0), output, jobs, force, selector))
                for key, _ in selector.select(_POLL_SECONDS):
                    _take(key, selector, on_event, on_text)
                for child in [child for child in running if child.process.poll() is not None]:
                    _drain(child, selector, on_event, on_text)
                    running.remove(child)
                    on_outcome(_outcome(child))
        except BaseException:
            _stop(running, output)
            raise


def _start(file: Path, asked: Asked, output: Path, jobs: int, force: bool, selector: selectors.BaseSelector) -> _Child:
    ours, theirs = socket.socketpair()
    command = [*module_command("trtforge"), "convert", str(file), "--only", asked.name, "--output", str(output)]
    try:
        process = subprocess.Popen(
            [*command, "--json", *(["--force"] if force else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C on the terminal reaches the batch alone
            bufsize=0,
            env={**_threads(jobs), **os.environ, **child_environment(), VARIABLE: str(theirs.fileno())},
        )
    finally:
        theirs.close()
    child = _Child(asked, process, ours, time.perf_counter())
    for stream in _streams(child):
        os.set_blocking(stream.fileno(), False)
        selector.register(stream, selectors.EVENT_READ, (child, stream))
    return child


def _streams(child: _Child) -> tuple[IO[bytes] | socket.socket, ...]:
    assert child.process.stdout is not None
    assert child.process.stderr is not None
    return child.process.stdout, child.process.stderr, child.wire


def _threads(jobs: int) -> dict[str, str]:
    """Every conversion takes its share of the cores, unless the user says otherwise."""
    return {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}


def _take(
    key: selectors.SelectorKey,
    selector: selectors.BaseSelector,
    on_event: Callable[[str, Event], None],
    on_text: Callable[[str], None],
) -> bool:
    """Reads what one stream has; False at its end."""
    child, stream = key.data
    try:
        block = os.read(key.fd, 1 << 16)
    except BlockingIOError:
        return False
    except OSError:  # a socket whose other end was killed
        block = b""
    if not block:
        selector.unregister(stream)
        return False
    if stream is child.process.stdout:
        child.answer += block
    elif stream is child.process.stderr:
        lines = _whole_lines(child.text, block)
        if lines:
            text = lines.decode("utf-8", "replace")
            child.tail = [*child.tail, *text.splitlines()][-_TAIL_LINES:]
            on_text(text)
    else:
        for line in _whole_lines(child.events, block).splitlines():
            event = read_event(line)
            child.stage = event.stage
            on_event(child.asked.name, event)
    return True


def _whole_lines(pending: bytearray, block: bytes) -> bytes:
    pending += block
    end = pending.rfind(b"\n") + 1
    lines = bytes(pending[:end])
    del pending[:end]
    return lines


def _drain(
    child: _Child,
    selector: selectors.BaseSelector,
    on_event: Callable[[str, Event], None],
    on_text: Callable[[str], None],
) -> None:
    """What an ended child has left in its pipes; something that it started may hold them open for ever."""
    for stream in _streams(child):
        key = selector.get_map().get(stream)
        while key is not None and _take(key, selector, on_event, on_text):
            pass
        with contextlib.suppress(KeyError):
            selector.unregister(stream)
        stream.close()
    if child.text:
        on_text(child.text.decode("utf-8", "replace") + "\n")


def _outcome(child: _Child) -> Outcome:
    code, name = child.process.returncode, child.asked.name
    try:
        entry: dict[str, Any] = json.loads(child.answer)["models"][name]
    except (ValueError, KeyError):
        seconds = {child.stage or "start": round(time.perf_counter() - child.start, 3)}
        return Outcome(name, "failed", None, seconds, _died(child, code))
    path = Path(entry["artifact"]) if entry["artifact"] else None
    failure = entry.get("error") and Failure(**entry["error"], exit_code=code if 0 < code <= 5 else 1)
    facts: dict[str, Any] = {}
    if failure is None and path is not None:
        try:
            facts = dict(read_manifest(path, check_files=False).facts)
        except ArtifactError as error:  # another batch is at the same folder, or someone removed it
            failure = Failure.of(error)
    return Outcome(name, "failed" if failure else entry["status"], path, entry["seconds"], failure, facts=facts)


def _died(child: _Child, code: int) -> Failure:
    """No answer: the process was killed together with its watcher, or it never got as far as this model."""
    said = "".join(f"\n    {line}" for line in child.tail)
    if 0 < code <= 5:
        return Failure("TrtForgeError", f"the process of {child.asked.name} ended with code {code}:{said}", "", code)
    name = ""
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
    error = explain_end(f"the process that converts {child.asked.name}", name, said=child.tail)
    return Failure("ChildCrashError", str(error), child.stage, 3)


def _stop(running: Sequence[_Child], output: Path) -> None:
    for child in running:
        with contextlib.suppress(ProcessLookupError):
            child.process.terminate()
    end = time.monotonic() + _GRACE_SECONDS
    for child in running:
        try:
            child.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()
        for stream in _streams(child):
            stream.close()
    sweep_stale(output)  # a killed child left its folder
