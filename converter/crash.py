"""What is said, and swept, when the process that did a command's work has crashed: by the one that watched it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from trtforge.converter.batch import Failure, Outcome
from trtforge.converter.batch_link import VARIABLE
from trtforge.converter.terminal import print_error, reset_terminal
from trtforge.runtime.child import ChildCrashError
from trtforge.runtime.publish import sweep_stale
from trtforge.runtime.watch import Crash

__all__ = ["explain_end", "tell_crash"]

_LIBRARY = re.compile(r"/(?:site|dist)-packages/(\w+)/")


def explain_end(who: str, signal_name: str, *, frames: Sequence[str] = (), said: Sequence[str] = ()) -> ChildCrashError:
    """The error for a process that ended without an answer.

    Args:
        who: The process, in words.
        signal_name: What ended it, as "SIGSEGV"; "" where it ended by itself.
        frames: Where Python was, the innermost first.
        said: Its last lines, where there are no frames.
    """
    what = f"{who} {f'was ended by {signal_name}' if signal_name else 'ended'} without an answer"
    if signal_name == "SIGKILL":
        fix = "free memory (in a batch, fewer --jobs), or use a larger machine"
        return ChildCrashError(what, why="most often memory ran out", fix=fix, signal_name=signal_name)
    title = "native code crashed, called from" if frames else "its last words:"
    why = "\n    ".join([title, *(frames or said or ["none"])])
    library = _LIBRARY.search(frames[0]) if frames else None
    fix = (
        f"try another release of {library[1]}, or other inputs, and report these lines to its makers"
        if library and library[1] != "trtforge"
        else "look there for what crashes, or report it with these lines"
    )
    return ChildCrashError(what, why=why, fix=fix, signal_name=signal_name)


def tell_crash(crash: Crash) -> int:
    """Sweeps what the worker left, says what happened, and gives the exit code."""
    for folder in dict.fromkeys(crash.notes.get("staging", ())):
        sweep_stale(Path(folder))
    for folder in crash.notes.get("scratch", ()):
        shutil.rmtree(folder, ignore_errors=True)
    reset_terminal()
    name, converts = crash.last("name"), "as_json" in crash.notes
    who = f"the process that converts {name}" if converts else f"the process of `trtforge {' '.join(sys.argv[1:2])}`"
    error = explain_end(who, crash.signal, frames=crash.frames)
    error.stage = crash.last("stage")
    if VARIABLE not in os.environ:  # a batch prints what it finds in the answer
        print_error(error, subject=name)
    if converts:
        from trtforge.converter.commands import print_outcomes

        seconds = {error.stage or "start": round(crash.seconds, 3)}
        outcome = Outcome(name, "failed", None, seconds, Failure.of(error), error)
        print_outcomes([outcome], as_json=crash.notes["as_json"][-1])
    return error.exit_code
