"""What the pipeline tells while it works. The library owns no bar: callers pass a function of `Event`s."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from trtforge.runtime.errors import TrtForgeError
from trtforge.runtime.faults import explain_os_error
from trtforge.runtime.watch import note

__all__ = ["Event", "OnEvent", "Stages", "ignore_events"]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: "start" and "end" of a stage, "progress" within it, "note" for something the user should know.
        stage: "load", "export", "record", "plan", "cast", "calibrate", "build", "prove", "package".
        text: What is being done, or the note.
        done: Units done, of `total`; both 0 where it is unknown.
        total: Units there are.
        seconds: Of the stage, at its end.
    """

    kind: str
    stage: str
    text: str = ""
    done: int = 0
    total: int = 0
    seconds: float = 0.0


OnEvent = Callable[[Event], None]


def ignore_events(_: Event) -> None:
    """The default: nobody listens."""


@dataclass(slots=True)
class Stages:
    """Times stages and reports them; a `TrtForgeError` that leaves a stage knows its name. A full disk is one too."""

    on_event: OnEvent = ignore_events
    seconds: dict[str, float] = field(default_factory=dict)
    current: str = ""

    @contextlib.contextmanager
    def stage(self, name: str, text: str = "") -> Iterator[None]:
        """Runs a block as the stage `name`; repeated stages add up."""
        self.current = name
        note(stage=name)
        self.on_event(Event("start", name, text))
        start = time.perf_counter()
        try:
            yield
        except TrtForgeError as error:
            error.stage = error.stage or name
            raise
        except OSError as error:
            explained = explain_os_error(error)
            if explained is None:
                raise
            explained.stage = name
            raise explained from error
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 3)
        self.on_event(Event("end", name, text, seconds=spent))

    def note(self, text: str) -> None:
        """Tells the user something that is no error."""
        self.on_event(Event("note", self.current, text))

    def forward(self, event: dict[str, Any]) -> None:
        """Passes on a child's progress."""
        if event.get("event") == "progress":
            done, total = int(event.get("done", 0)), int(event.get("total", 0))
            self.on_event(Event("progress", self.current, str(event.get("phase", "")), done, total))
        elif event.get("event") == "note":
            self.note(str(event.get("text", "")))
