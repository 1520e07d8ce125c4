"""What people see: bars on a terminal, plain lines elsewhere, errors; all of that on stderr. Tables on stdout."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trtforge.converter.progress import Event
from trtforge.converter.references import UserCodeError
from trtforge.runtime.errors import TrtForgeError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from typing_extensions import Self

__all__ = ["ProgressView", "print_error", "print_json", "print_table", "print_text"]

_OURS = Path(__file__).resolve().parents[1]


class ProgressView:
    """Shows events of one conversion after another; use as a context manager, and pass `show` as `on_event`.

    On a terminal it is a bar a stage; elsewhere one plain line when a stage ends.
    """

    def __init__(self) -> None:
        self.name = ""
        """Put before every line: the model in work."""
        self._bars: Progress | None = None
        self._task: TaskID | None = None

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
            )
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, event: Event) -> None:
        """Takes one event."""
        line = f"{self.name}: {event.stage}" if self.name else event.stage
        if event.kind == "note":
            self._print(f"{line}: note: {event.text}")
        elif event.kind == "end":
            if self._bars is not None and self._task is not None:
                self._bars.remove_task(self._task)
                self._task = None
            self._print(f"{line}: {event.text + ', ' if event.text else ''}{event.seconds:.2f} s")
        elif self._bars is not None:
            if event.kind == "start" or self._task is None:
                self._task = self._bars.add_task(line, total=None, text=event.text)
            else:
                self._bars.update(self._task, total=event.total or None, completed=event.done, text=event.text)

    def _print(self, line: str) -> None:
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)  # noqa: T201  # this file is where printing is done


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
