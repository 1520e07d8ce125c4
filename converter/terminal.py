"""What people see: bars on a terminal, plain lines elsewhere, errors; all of that on stderr. Tables on stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trtforge.converter.progress import Event
from trtforge.converter.references import UserCodeError
from trtforge.runtime.errors import TrtForgeError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from typing_extensions import Self

__all__ = [
    "ProgressView",
    "only_results_on_stdout",
    "print_error",
    "print_json",
    "print_table",
    "print_text",
    "reset_terminal",
]

_OURS = Path(__file__).resolve().parents[1]


class ProgressView:
    """Shows events of conversions, one after another or several at once; use as a context manager.

    On a terminal it is a bar a model; elsewhere one plain line when a stage ends.
    """

    def __init__(self) -> None:
        self.name = ""
        """Put before every line where an event comes without a name: the model in work."""
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,
            )
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, event: Event, name: str | None = None) -> None:
        """Takes one event, of the model `name`."""
        name = self.name if name is None else name
        line = f"{name}: {event.stage}" if name else event.stage
        if event.kind == "note":
            self.say(f"{line}: note: {event.text}")
        elif event.kind == "end":
            if self._bars is not None and name in self._tasks:
                self._bars.remove_task(self._tasks.pop(name))
            self.say(f"{line}: {event.text + ', ' if event.text else ''}{event.seconds:.2f} s")
        elif self._bars is not None:
            if event.kind == "start" and name in self._tasks:  # the stage before it failed
                self._bars.remove_task(self._tasks.pop(name))
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(line, total=None, text=event.text)
            else:
                self._bars.update(self._tasks[name], total=event.total or None, completed=event.done, text=event.text)

    def say(self, text: str) -> None:
        """Writes lines above the bars."""
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)  # noqa: T201  # this file is where printing is done


@contextlib.contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """What the user's code and native libraries print goes to stderr: stdout is for results, which programs read."""
    sys.stdout.flush()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        with contextlib.suppress(OSError):  # a closed stdout
            kept = os.dup(1)
            stack.callback(os.close, kept)
            os.dup2(2, 1)
            stack.callback(os.dup2, kept, 1)
        yield


def reset_terminal() -> None:
    """Takes away a bar that another process has left unfinished, and shows the cursor again."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[J\x1b[?25h")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table on stdout: numbers right, text left; as wide as it needs where stdout is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        numeric = all(row[index][:1].isdigit() or row[index] in ("", "-") for row in rows)
        table.add_column(column, justify="right" if rows and numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def print_text(text: str) -> None:
    """Prints text on stdout."""
    sys.stdout.write(text.rstrip() + "\n")


def print_json(data: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))  # noqa: T201  # as above


def print_error(error: TrtForgeError, *, subject: str = "") -> None:
    """What, why and what to do, on stderr; before it the user's own traceback where the user's code raised."""
    if isinstance(error, UserCodeError) and error.__cause__ is not None:
        frames = traceback.extract_tb(error.__cause__.__traceback__)
        theirs = [
            f for f in frames if not Path(f.filename).resolve().is_relative_to(_OURS) and "importlib" not in f.filename
        ]
        if theirs:
            print("Traceback in your code:", file=sys.stderr)  # noqa: T201  # as above
            print("".join(traceback.format_list(theirs)), end="", file=sys.stderr)  # noqa: T201  # as above
    about = " ".join(word for word in (subject, f"[{error.stage}]" if error.stage else "") if word)
    print(f"error{' in ' + about if about else ''}: {error}", file=sys.stderr)  # noqa: T201  # as above
