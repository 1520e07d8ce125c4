"""Which line of the user's own code something comes from."""

from __future__ import annotations

import linecache
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["Line", "current_line", "line_of_error", "line_of_trace"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')


@dataclass(frozen=True, slots=True)
class Line:
    """A line of Python; `str()` of it is `net.py:42`, relative to where we run or to the installed packages."""

    file: Path
    number: int

    def __str__(self) -> str:
        for folder in (_library(self.file), Path.cwd()):
            if folder is not None and self.file.is_relative_to(folder):
                return f"{self.file.relative_to(folder).as_posix()}:{self.number}"
        return f"{Path(*self.file.parts[-2:]).as_posix()}:{self.number}"

    @property
    def code(self) -> str:
        """Its text, "" where the file is gone."""
        return linecache.getline(str(self.file), self.number).strip()


def line_of_trace(trace: str) -> Line | None:
    """The deepest frame in the user's own code, else the deepest outside torch; None where there is neither.

    Args:
        trace: Frames as Python prints them, outermost first.
    """
    return _deepest((file, int(number)) for file, number in _FRAME.findall(trace))


def line_of_error(error: BaseException) -> Line | None:
    """The same for where an error was raised."""
    return _deepest((frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(error.__traceback__))


def current_line() -> Line | None:
    """The same for what runs now."""
    stack = traceback.walk_stack(sys._getframe())  # what it starts from without a frame differs between Pythons
    return _deepest(reversed([(frame.f_code.co_filename, number) for frame, number in stack]))


def _deepest(frames: Iterable[tuple[str, int]]) -> Line | None:
    # Code that torch generates is in "<eval_with_key>.5"; a notebook's cells are in files named otherwise.
    lines = [Line(Path(file), number) for file, number in frames if not file.startswith("<")]
    lines = [line for line in lines if line.file.parent not in _OURS]
    own = [line for line in lines if _library(line.file) is None]
    near = own or [line for line in lines if "torch" not in line.file.parts and _STDLIB not in line.file.parents]
    return near[-1] if near else None


_OURS = (Path(__file__).parent, Path(__file__).parent.parent / "runtime")
_STDLIB = Path(sysconfig.get_paths()["stdlib"])


@cache
def _library(file: Path) -> Path | None:
    """The folder of installed code that a file is in, None for the user's own."""
    for parent in file.parents:
        if parent.name in ("site-packages", "dist-packages"):
            return parent
    return _STDLIB if _STDLIB in file.parents else None
