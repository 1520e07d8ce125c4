"""Says why an export failed: deepest cause first, in the user's names and at the user's line."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence

import torch

from trtforge.converter.custom_ops import Translations
from trtforge.converter.frames import Line, line_of_error, line_of_trace
from trtforge.converter.guards import Guard
from trtforge.runtime.errors import ExportError
from trtforge.runtime.specs import DimRange, InputSpec

__all__ = ["explain_capture", "explain_translation", "frozen_dimension"]

_log = logging.getLogger("trtforge.export")
_EMPTY = torch.fx.Graph()
_SHOWN = 12
_BOILERPLATE = re.compile(
    r"\n\s*\n|\n?(The error above|For more information, run|Suggested fixes:|The following call raised|From user)"
)
_VALUE_DEPENDENT = re.compile(r"data.dependent|DataDependent|DynamicOutputShape", re.IGNORECASE)
_SUGGESTION = re.compile(r"^\s+(\w+) = (.+)$", re.MULTILINE)


def explain_capture(
    error: Exception,
    dims: Mapping[str, DimRange],
    guards: Callable[[], Sequence[Guard]],
    specs: Sequence[InputSpec] = (),
) -> ExportError:
    """Why torch.export could not capture a module.

    Args:
        error: What it raised.
        dims: The dimensions that were asked for.
        guards: Finds what was assumed of the sizes; called where the error is about them.
        specs: The inputs.
    """
    deepest = _deepest(error)
    text = str(deepest)
    suggested = {name: fix.strip() for name, fix in _SUGGESTION.findall(text.partition("Suggested fixes:")[2])}
    if "Suggested fixes:" in text and suggested:
        return _dimension_error(suggested, dims, guards(), _brief(text), specs)
    line = line_of_error(deepest)
    at = f" at {line}: `{line.code}`" if line else ""
    if _VALUE_DEPENDENT.search(f"{type(deepest).__name__} {text}"):
        return _value_error(line, at, _brief(text))
    return ExportError(
        f"the model cannot be captured{at}: {type(deepest).__name__}: {_brief(text)}",
        why="torch.export runs `forward` once on tensors that have shapes and no values",
        fix="first make the module run on its example inputs by itself; then replace what needs values "
        "(numpy, .item(), .tolist()) by torch operators",
    )


def explain_translation(
    error: Exception, program: torch.export.ExportedProgram, opset: int, translations: Translations | None = None
) -> ExportError:
    """Why torch.onnx could not translate a captured program; every operator that it lacks is in one list."""
    deepest = _deepest(error)
    text = _brief(str(deepest))
    if "No ONNX function found" in str(deepest):
        missing = _missing_operators(program, opset, translations or {}) or [text]
        more = [f"and {len(missing) - _SHOWN} more"] if len(missing) > _SHOWN else []
        return ExportError(
            f"{len(missing)} operators have no translation to ONNX:\n    " + "\n    ".join(missing[:_SHOWN] + more),
            why=f"neither opset {opset} nor torch's decompositions express them",
            fix="rewrite these lines with other torch operators, or give `custom_ops` a table "
            "{operator: onnxscript function} with an entry for each",
        )
    node = re.search(r"translating node %(\w+)", _chain_text(error))
    line = _line_of_node(program, node.group(1)) if node else None
    at = f" at {line}: `{line.code}`" if line else ""
    return ExportError(
        f"the model cannot be translated to ONNX{at}: {type(deepest).__name__}: {text}",
        why=f"torch.onnx failed on the operator {node.group(1)!r}" if node else "",
        fix="rewrite that line with other torch operators, or try another opset" if line else "try another opset",
    )


def frozen_dimension(
    dim: str, size: int | str, line: Line | None = None, *, place: str = "", specs: Sequence[InputSpec] = ()
) -> ExportError:
    """A dimension that was asked to be dynamic and has one size; `specs` are inputs that may have forced it."""
    same = [f"{spec.name!r}, axis {axis}" for spec in specs for axis, has in enumerate(spec.shape) if has == size]
    hint = (
        f"if {dim!r} is meant there too, name it in the shape of {' and '.join(same[:_SHOWN])}; else " if same else ""
    )
    return ExportError(
        f"dimension {dim!r} froze at {size}{place}" + (f", at {line}: `{line.code}`" if line else ""),
        why="the code that torch.export saw is right for that size only (a loop over the dimension, a split into a "
        "fixed number of parts, a Python `if` on the size)",
        fix=f"{hint}rewrite it without that size (torch.stack, reshape, unflatten), or write {size} in place of "
        f"{dim!r}",
    )


def _dimension_error(
    suggested: Mapping[str, str],
    dims: Mapping[str, DimRange],
    guards: Sequence[Guard],
    text: str,
    specs: Sequence[InputSpec],
) -> ExportError:
    """What torch's suggested fixes mean: `batch = 2`, `b = a`, `h = 2*_h`, `n = Dim('n', min=4)`."""
    lines = {guard.dim: guard.line for guard in reversed(guards) if guard.line is not None}
    errors = [
        _one_dimension(dim, fix, dims, lines.get(dim), text, specs) for dim, fix in suggested.items() if dim in dims
    ]
    if not errors:
        return ExportError(f"the dimensions do not fit the model: {text}")
    return ExportError("\n".join(error.what for error in errors), why=errors[0].why, fix=errors[0].fix)


def _one_dimension(
    dim: str, fix: str, dims: Mapping[str, DimRange], line: Line | None, text: str, specs: Sequence[InputSpec]
) -> ExportError:
    at = f", at {line}: `{line.code}`" if line else ""
    asked = dims[dim]
    if fix.isdigit():
        return frozen_dimension(dim, int(fix), line, specs=specs)
    if fix in dims:
        return ExportError(
            f"dimensions {dim!r} and {fix!r} are always equal{at}",
            why="the model's code combines the two",
            fix=f"use one name for both: write {fix!r} in place of {dim!r}",
        )
    if bounds := dict(re.findall(r"(min|max)=(\d+)", fix)):
        low, high = int(bounds.get("min", asked.min)), int(bounds.get("max", asked.max))
        return ExportError(
            f"dimension {dim!r} was asked to be {asked.min} to {asked.max}, the captured code holds for {low} to "
            f"{high}{at}",
            why="the model's code decides something by that size, or a table in it ends there",
            fix=f"make the code independent of the size, or give {dim!r} a range within [{low}, {high}]",
        )
    return ExportError(
        f"dimension {dim!r} cannot be any size from {asked.min} to {asked.max}: it must be {fix}{at}",
        why=text,
        fix="pad inputs to such a size inside the model, or make the dimension static",
    )


def _value_error(line: Line | None, at: str, text: str) -> ExportError:
    code = line.code if line else ""
    if re.match(r"(if|elif|while|assert)\b", code) or " if " in code:
        return ExportError(
            f"the model branches on a tensor's values{at}",
            why=f"a graph has no Python `if`; which branch runs is known only with data ({text})",
            fix="torch.where(condition, a, b) chooses between values, torch.cond(condition, f, g, (x,)) between "
            "computations",
        )
    return ExportError(
        f"the model makes a size or a Python number from a tensor's values{at}",
        why=f"during an export tensors have no values ({text})",
        fix="keep it a tensor and mask with torch.where, or pass the number to the module's constructor",
    )


def _deepest(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _chain_text(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    return "\n".join(texts)


def _brief(text: str) -> str:
    """The first paragraph, without colours, references to logs, or symbols' ranges."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).strip()
    return re.sub(
        r"\s*\((unhinted|Size-like symbols): [^)]*\)+\.?", "", _BOILERPLATE.split(plain, maxsplit=1)[0]
    ).strip()


def _missing_operators(program: torch.export.ExportedProgram, opset: int, translations: Translations) -> list[str]:
    """`aten.foo.default at net.py:12` for each operator without a translation; empty where torch does not tell."""
    # torch.onnx stops at the first; what it asks its registry, operator by operator, is not public.
    try:
        from torch.onnx._internal.exporter import _core, _dispatching, _registration

        registry = _registration.ONNXRegistry.from_torchlib(opset_version=opset)
        prepared = _core._prepare_exported_program_for_export(program, registry=registry)
        nodes = [node for part in prepared.graph_module.modules() for node in getattr(part, "graph", _EMPTY).nodes]
        missing = [
            node
            for node in nodes
            if isinstance(node.target, torch._ops.OpOverload)
            and node.target not in translations
            and _dispatching.dispatch(node, registry)[0] is None
        ]
    except Exception:  # noqa: BLE001 - private parts of torch: the first operator is known anyway
        _log.debug("cannot list missing operators", exc_info=True)
        return []
    found: dict[str, set[str]] = {}
    for node in missing:
        line = line_of_trace(node.meta.get("stack_trace") or "")
        found.setdefault(str(node.target), set()).update({str(line)} if line else ())
    return [name + (f" at {', '.join(sorted(lines))}" if lines else "") for name, lines in found.items()]


def _line_of_node(program: torch.export.ExportedProgram, name: str) -> Line | None:
    for node in program.graph.nodes:
        if node.name == name:
            return line_of_trace(node.meta.get("stack_trace") or "")
    return None
