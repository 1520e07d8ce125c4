"""What a failed build tells the user: deepest cause first, unsupported operators in one list, the user's own lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trtforge.runtime.child import ChildCrashError
from trtforge.runtime.errors import BuildError
from trtforge.runtime.trt.backend import Backend
from trtforge.runtime.trt.onnx_scan import OnnxScan
from trtforge.runtime.trt.parse import NodeError

__all__ = ["build_failed", "crashed", "inconsistent", "parse_failed"]

_SHOWN = 20


def parse_failed(
    backend: Backend, onnx: Path, errors: Sequence[NodeError], log: Sequence[str], scan: OnnxScan
) -> BuildError:
    """The parser refused the graph.

    Args:
        backend: Whose parser.
        onnx: The file.
        errors: What it holds against which node, deepest first.
        log: Error lines of the log, for a parser that holds none.
        scan: The graph.
    """
    unsupported = {(error.operator, error.node): error for error in errors if error.unsupported}
    # The parser meets these only after the rest of the graph is clean: name them in the same list.
    for operator in sorted(backend.capabilities.doomed_operators):
        for name in scan.operators.get(operator, ()):
            unsupported.setdefault((operator, name), NodeError(operator, name, True, "", ()))
    others = [error for error in errors if not error.unsupported]
    why = [_describe(error, scan.lines) for error in others[:_SHOWN]] or ([] if unsupported else list(log[-_SHOWN:]))
    if not unsupported:
        return BuildError(
            f"{backend} cannot parse {onnx}: {why[0] if why else 'it gives no reason'}",
            why="\n       ".join(why[1:]),
            fix="change the code that makes these nodes, or report the model" if why else "report the model",
        )
    operators = sorted({operator for operator, _ in unsupported})
    where = [_describe(error, scan.lines) for error in list(unsupported.values())[:_SHOWN]]
    if len(unsupported) > _SHOWN:
        where.append(f"and {len(unsupported) - _SHOWN} more nodes")
    plural = "s" if len(operators) > 1 else ""
    return BuildError(
        f"{backend} has no operator{plural} {', '.join(operators)}, which {onnx} uses",
        why="\n       ".join([*where, *why]),
        fix="express them through other operators in the model (masks instead of indices, matmul, topk, one-hot)",
    )


def build_failed(backend: Backend, onnx: Path, log: Sequence[str], scan: OnnxScan) -> BuildError:
    """The builder gave no engine; the last error is the cause, the ones before it led there."""
    said = list(log)
    doomed = [op for op in sorted(backend.capabilities.doomed_operators) if op in scan.operators]
    said += [f"{operator} does not build: {', '.join(scan.operators[operator])}" for operator in doomed]
    lines = [f"{name}: {line}" for name, line in scan.lines.items() if any(_mentions(text, name) for text in said)]
    return BuildError(
        f"{backend} cannot build {onnx}: {said[-1] if said else 'it gives no reason'}",
        why="\n       ".join([*said[-6:-1], *lines[:_SHOWN]]),
        fix=f"express {', '.join(doomed)} through other operators in the model"
        if doomed
        else "change the code that makes the nodes named here, or report the model",
    )


def network_failed(backend: Backend, reference: str, failure: Mapping[str, Any]) -> BuildError:
    """The builder gave no engine, or would give a broken one, for a network of the user's own."""
    said = [f"at the profile's {end}: {text}" for end, text in failure.get("ends", {}).items()] or failure["log"]
    return BuildError(
        f"{backend} cannot build the network of {reference}: {said[-1] if said else 'it gives no reason'}",
        why="\n       ".join(said[-6:-1]),
        fix="name the layers in the function: TensorRT's messages then name them too",
    )


def inconsistent(backend: Backend, onnx: Path, ends: Mapping[str, str], scan: OnnxScan) -> BuildError:
    """The builder only warns of these, and the engine then fails or lies at that end of the profile."""
    said = [f"at the profile's {end}: {text}" for end, text in ends.items()]
    lines = [f"{name}: {line}" for name, line in scan.lines.items() if any(_mentions(text, name) for text in said)]
    return BuildError(
        f"{onnx} does not hold over the whole optimization profile: {said[0]}",
        why="\n       ".join(
            [f"{backend} would build an engine all the same, and it would be broken", *said[1:], *lines]
        ),
        fix="a size was frozen in the export: use x.shape[0] or -1 instead of a number in reshape, view and expand",
    )


def crashed(backend: Backend, onnx: Path, doing: str, error: ChildCrashError, scan: OnnxScan) -> BuildError:
    """The child process died natively while it was `doing` something."""
    if error.signal == "SIGKILL":
        what = f"the build of {onnx} was killed (SIGKILL) while {doing}"
        return BuildError(what, why="most often memory ran out", fix="free memory, or build on a larger machine")
    known = [f"known to crash: {suspect}{_line(suspect.split(' ')[0], scan.lines)}" for suspect in scan.suspects]
    return BuildError(
        f"{backend} crashed natively ({error.signal}) while {doing}, on {onnx}",
        why="\n       ".join([*known, error.why]),
        fix="change the code that makes this node, or install another release of the backend",
    )


def _describe(error: NodeError, lines: Mapping[str, str]) -> str:
    name = f"{error.node or '(unnamed)'} ({error.operator})" if error.operator else error.node
    inside = f" inside {' > '.join(error.inside)}" if error.inside else ""
    text = f": {error.text}" if error.text and name else error.text
    return f"{name}{inside}{_line(error.node, lines)}{text}"


def _line(node: str, lines: Mapping[str, str]) -> str:
    return f" from {lines[node]}" if node in lines else ""


def _mentions(text: str, name: str) -> bool:
    """Whether a node's name stands in `text` as a whole, not as the beginning of a longer one."""
    start = text.find(name) if name else -1
    while start >= 0:
        end = start + len(name)
        if (start == 0 or not _in_name(text[start - 1])) and (end == len(text) or not _in_name(text[end])):
            return True
        start = text.find(name, start + 1)
    return False


def _in_name(character: str) -> bool:
    return character.isalnum() or character in "_#/"
