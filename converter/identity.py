"""Gives every node of a graph an id that says where in the user's model it comes from.

Requires: a cleaned graph. Ensures: every `node.name` is unique over the model and its subgraphs; nodes that torch
exported are called `<module path>/<OpType>#k`, k counting within that module and operator in graph order, and carry
`META_MODULE` and `META_LINE`; foreign nodes keep the unique names they have. The exporter's own metadata is gone.
"""

from __future__ import annotations

import ast
import re
import site
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

import onnx_ir as ir

from trtforge.runtime.graph import META_LINE, META_MODULE, all_graphs

__all__ = ["WRAPPER", "identify"]

WRAPPER = "trtforge_root"
"""Name of the user's module within the wrapper that is exported; never part of an id."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_TRACE = "pkg.torch.onnx.stack_trace"
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in ')
_FUSED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators that the exporter folds a BatchNorm into; the result claims the BatchNorm's scope."""


def identify(model: ir.Model) -> None:
    """Names the nodes and records module and line; a second call changes nothing."""
    nodes = [node for graph in all_graphs(model) for node in graph]
    if any(_SCOPES in node.metadata_props for node in nodes):
        _locate(nodes)
    _name(nodes)
    _strip(model, nodes)


def _locate(nodes: list[ir.Node]) -> None:
    for node in nodes:
        if META_MODULE in node.metadata_props or _SCOPES not in node.metadata_props:
            continue
        node.metadata_props[META_MODULE] = _module_of(node)
        line = _user_line(node.metadata_props.get(_TRACE, ""))
        if line:
            node.metadata_props[META_LINE] = line
    # What a rewriter made without metadata belongs where its first located producer does, else its first consumer.
    for node in nodes:
        if META_MODULE not in node.metadata_props:
            _inherit(node, [value.producer() for value in node.inputs if value is not None])
    for node in reversed(nodes):
        if META_MODULE not in node.metadata_props:
            _inherit(node, [use.node for value in node.outputs for use in value.uses()])
    for node in nodes:
        node.metadata_props.setdefault(META_MODULE, "")


def _inherit(node: ir.Node, neighbours: list[ir.Node | None]) -> None:
    for other in neighbours:
        if other is not None and META_MODULE in other.metadata_props:
            for key in (META_MODULE, META_LINE):
                if key in other.metadata_props:
                    node.metadata_props[key] = other.metadata_props[key]
            return


def _module_of(node: ir.Node) -> str:
    scopes = _string_list(node.metadata_props[_SCOPES])[:-1]  # the last one is the operator's own name
    classes = _string_list(node.metadata_props.get(_CLASSES, "[]"))[:-1]
    if node.op_type in _FUSED and classes and "BatchNorm" in classes[-1]:
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if weight is not None and weight.is_initializer() and weight.name and not weight.name.startswith("val_"):
            return weight.name.rpartition(".")[0]
    return _plain(scopes[-1]) if scopes else ""


def _plain(scope: str) -> str:
    # "@1" marks the second call of a module
    path = re.sub(r"@\d+", "", scope)
    return "" if path == WRAPPER else path.removeprefix(f"{WRAPPER}.")


def _string_list(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in value] if isinstance(value, list) else []


def _user_line(trace: str) -> str:
    frames = [(Path(file), line) for file, line in _FRAME.findall(trace)]
    ours = Path(__file__).parent
    frames = [(file, line) for file, line in frames if file.parent != ours]
    for file, line in reversed(frames):
        if not any(file.is_relative_to(folder) for folder in _library_folders()):
            return f"{_relative(file)}:{line}"
    for file, line in reversed(frames):
        if "torch" not in file.parts:
            return f"{_relative(file)}:{line}"
    return ""


@cache
def _library_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    folders = {paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()}
    return tuple(Path(folder).resolve() for folder in folders)


def _relative(file: Path) -> str:
    for folder in (Path.cwd(), *sorted(_library_folders(), key=lambda path: -len(path.parts))):
        if file.is_relative_to(folder):
            return str(file.relative_to(folder))
    return file.name


def _name(nodes: list[ir.Node]) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    seen: set[str] = set()
    waiting: list[ir.Node] = []
    for node in nodes:
        located = _SCOPES in node.metadata_props
        if node.name and not located and META_MODULE not in node.metadata_props and node.name not in seen:
            seen.add(node.name)
        elif node.name and META_MODULE in node.metadata_props and _is_id(node) and node.name not in seen:
            seen.add(node.name)
        else:
            waiting.append(node)
    for node in waiting:
        module = node.metadata_props.get(META_MODULE, "")
        while True:
            name = f"{module}/{node.op_type}#{counts[module, node.op_type]}"
            counts[module, node.op_type] += 1
            if name not in seen:
                break
        seen.add(name)
        node.name = name


def _is_id(node: ir.Node) -> bool:
    prefix = f"{node.metadata_props[META_MODULE]}/{node.op_type}#"
    return node.name is not None and node.name.startswith(prefix) and node.name[len(prefix) :].isdigit()


def _strip(model: ir.Model, nodes: list[ir.Node]) -> None:
    holders = [model, model.graph, *nodes]
    holders += [value for graph in all_graphs(model) for value in graph.inputs]
    holders += [value for node in nodes for value in node.outputs]
    for graph in all_graphs(model):
        if isinstance(graph, ir.Graph):
            holders += graph.initializers.values()
    for holder in holders:
        for key in [key for key in holder.metadata_props if key.startswith("pkg.") or key == "namespace"]:
            del holder.metadata_props[key]
