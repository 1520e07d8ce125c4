"""What torch.export assumes of sizes while it captures a module, and at which line of the user's code."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from trtforge.converter.frames import Line, current_line

__all__ = ["Guard", "find_guards"]

# torch's errors about dimensions name no line, but it logs each assumption in the moment that the user's code makes it
# necessary: whoever listens is called with that code on the stack.
_LOGGER = "torch.fx.experimental.symbolic_shapes"
_CREATED = re.compile(r"create_symbol (\w+) = \d+ for (\S+)")
_ASSUMED = re.compile(r"\[guard added\]|^set_replacement ")
_FIXES = ("set_replacement", "eval Eq", "runtime_assert Eq")


@dataclass(frozen=True, slots=True)
class Guard:
    """An assumption (`eval Eq(s77, 2)`), the dimension that it is about, and the line that made it."""

    dim: str
    text: str
    line: Line | None


def find_guards(capture: Callable[[], object], sources: Mapping[str, str]) -> list[Guard]:
    """Captures once more, listening; guards that fix a size come first.

    Args:
        capture: May raise; that is ignored.
        sources: The user's dimension for what torch calls it, as in `{"L['x'].size()[0]": "batch"}`.
    """
    heard: list[tuple[str, Line | None]] = []
    with _listen(lambda text: heard.append((text, current_line()))):
        try:
            capture()
        except Exception:  # it failed before, which is why it is asked again
            logging.getLogger("trtforge.export").debug("captured again to find lines", exc_info=True)
    dims = {}
    for text, _ in heard:
        created = _CREATED.match(text)
        if created and created.group(2) in sources:
            dims[created.group(1)] = sources[created.group(2)]
    guards = [
        Guard(dim, text, line)
        for text, line in heard
        for symbol, dim in dims.items()
        if _ASSUMED.search(text) and re.search(rf"\b{symbol}\b", text)
    ]
    return sorted(guards, key=lambda guard: not guard.text.startswith(_FIXES))


@contextmanager
def _listen(hear: Callable[[str], object]) -> Iterator[None]:
    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            hear(record.getMessage())

    logger = logging.getLogger(_LOGGER)
    level, propagate, handlers = logger.level, logger.propagate, logger.handlers
    logger.handlers, logger.propagate = [Listener()], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
