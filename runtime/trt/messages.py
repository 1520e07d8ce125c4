"""What TensorRT says through its logger: collected, freed of noise, and read for what only the log tells."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

__all__ = ["BuildLog", "make_logger", "readable"]

# ILogger.Severity: INTERNAL_ERROR 0, ERROR 1, WARNING 2, INFO 3, VERBOSE 4.
_ERROR = 1
_WARNING = 2
_KEPT = 400

_PARSING = "Parsing node: "
_INCONSISTENT = re.compile(r"Profile k(MIN|OPT|MAX) values are not self-consistent\.?\s*(.*)", re.DOTALL)
# RTX asks the driver for details after each of its errors; where there is none, this follows and says nothing.
_NO_DRIVER = re.compile(r"cudaError 35\b|CUDA initialization failure with error: (35|100)\b")
_NOISE = re.compile(r"Make sure (input|output) .* has Int64 binding|No importer registered for op: \S+\. Attempting")
_LOCATION = re.compile(r"\s*In \w+ at \S+\.(?:cpp|cu|h|hpp):\d+")
_PREFIX = re.compile(
    r"^(?:\[[\w.]+::\w+::\d+\]\s*)?(?:[\w:]+:\s*)?Error Code \d+: [\w ]+\((?P<text>.*)\)\s*$", re.DOTALL
)
_ASSERTION = re.compile(r"^Assertion failed: (?P<text>.*)$", re.DOTALL)


@dataclass(slots=True)
class BuildLog:
    """The warnings and errors of one build, in order.

    Attributes:
        no_gpu: There is no usable GPU, so complaints about the driver are noise.
        on_node: Called with "name [Operator]" before the parser imports each node, the only trace of a native crash.
        errors: Readable texts.
        warnings: Readable texts without repetition.
        inconsistent: "min", "opt" or "max" to what cannot hold at that end of the profile: the engine is broken.
    """

    no_gpu: bool
    on_node: Callable[[str], None]
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    inconsistent: dict[str, str] = field(default_factory=dict)

    def take(self, severity: int, text: str) -> None:
        """One message as TensorRT's logger got it."""
        if severity > _WARNING:
            if text.startswith(_PARSING):
                self.on_node(text[len(_PARSING) :])
            return
        if found := _INCONSISTENT.search(text):
            self.inconsistent.setdefault(found.group(1).lower(), readable(found.group(2)))
            return
        if (self.no_gpu and _NO_DRIVER.search(text)) or _NOISE.search(text):
            return
        kept = self.errors if severity <= _ERROR else self.warnings
        said = readable(text)
        if said and said not in kept and len(kept) < _KEPT:
            kept.append(said)


def readable(text: str) -> str:
    """A message without TensorRT's own function names, error numbers, source locations and driver noise behind it."""
    lines: list[str] = []
    for line in text.splitlines():
        inner = _PREFIX.match(line.strip())
        said = inner["text"] if inner else line.strip()
        asserted = _ASSERTION.match(said)
        said = _LOCATION.sub("", asserted["text"] if asserted else said).strip()
        if said and not (lines and _NO_DRIVER.search(said)):
            lines.append(said)
    return "\n".join(lines)


def make_logger(trt: ModuleType, log: BuildLog) -> Any:
    """An `ILogger` of the module `trt` that hands every message to `log`; the caller keeps it alive."""

    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            log.take(int(severity), text)

    return Logger()
