"""Gives every node of a graph an id that says where in the user's model it comes from.

Requires: a cleaned graph. Ensures: every `node.name` is unique over the model and its subgraphs; nodes that torch
exported are called `<module path>/<OpType>#k`, k counting within that module and operator in graph order, and carry
`META_MODULE` and, where it is known, `META_LINE`; foreign nodes keep the unique names they have, and others become
`/<OpType>#k`. The exporter's own metadata, several times the size of the graph, is gone.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache

import onnx_ir as ir

from trtforge.converter.frames import line_of_trace
from trtforge.runtime.graph import META_LINE, META_MODULE, all_graphs

__all__ = ["WRAPPER", "identify"]

WRAPPER = "trtforge_root"
"""Name of the user's module within the wrapper that is exported; never part of an id."""

_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_TRACE = "pkg.torch.onnx.stack_trace"
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
    line_of = lru_cache(maxsize=None)(line_of_trace)
    owners = {graph: node for node in nodes for graph in _bodies(node)}
    for node in nodes:
        if META_MODULE in node.metadata_props or _SCOPES not in node.metadata_props:
            continue
        owner = owners.get(node.graph) if isinstance(node.graph, ir.Graph) else None
        node.metadata_props[META_MODULE] = _module_of(node, owner.metadata_props[META_MODULE] if owner else "")
        line = line_of(node.metadata_props.get(_TRACE, ""))
        if line is not None:
            node.metadata_props[META_LINE] = str(line)
    # What a rewriter made without metadata belongs where its first located producer does, else its first consumer.
    for node in nodes:
        _inherit(node, (value.producer() for value in node.inputs if value is not None))
    for node in reversed(nodes):
        _inherit(node, (use.node for value in node.outputs for use in value.uses()))
    for node in nodes:
        node.metadata_props.setdefault(META_MODULE, "")


def _inherit(node: ir.Node, neighbours: Iterable[ir.Node | None]) -> None:
    if META_MODULE in node.metadata_props:
        return
    for other in neighbours:
        if other is not None and META_MODULE in other.metadata_props:
            for key in (META_MODULE, META_LINE):
                if key in other.metadata_props:
                    node.metadata_props[key] = other.metadata_props[key]
            return


def _module_of(node: ir.Node, surrounding: str) -> str:
    scopes = _string_list(node.metadata_props[_SCOPES])[:-1]  # the last one is the operator's own name
    classes = _string_list(node.metadata_props.get(_CLASSES, "[]"))[:-1]
    folded = node.op_type in _FUSED and bool(classes) and "BatchNorm" in classes[-1]
    if folded or not scopes:  # within the body of an If or Loop torch knows no modules
        for value in node.inputs:
            # A weight that was itself computed is called val_7, and says nothing.
            if value is not None and value.is_initializer() and "." in (value.name or ""):
                return _plain(str(value.name).rpartition(".")[0])
    return _plain(scopes[-1]) if scopes else surrounding


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()


def _plain(scope: str) -> str:
    if scope.startswith("_empty_nn_module_stack"):  # sizes that the export itself asks for
        return ""
    path = re.sub(r"@\d+", "", scope)  # "@1" marks the second call of a module
    return "" if path == WRAPPER else path.removeprefix(f"{WRAPPER}.")


def _string_list(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in value] if isinstance(value, list) else []


def _name(nodes: list[ir.Node]) -> None:
    seen: set[str] = set()
    waiting: list[ir.Node] = []
    for node in nodes:
        if node.name and node.name not in seen and _may_keep_name(node):
            seen.add(node.name)
        else:
            waiting.append(node)
    counts: Counter[str] = Counter()
    for node in waiting:
        prefix = f"{node.metadata_props.get(META_MODULE, '')}/{node.op_type}#"
        while f"{prefix}{counts[prefix]}" in seen:
            counts[prefix] += 1
        node.name = f"{prefix}{counts[prefix]}"
        seen.add(node.name)


def _may_keep_name(node: ir.Node) -> bool:
    module = node.metadata_props.get(META_MODULE)
    return module is None or re.fullmatch(re.escape(f"{module}/{node.op_type}#") + r"\d+", str(node.name)) is not None


def _strip(model: ir.Model, nodes: list[ir.Node]) -> None:
    holders: list[ir.Model | ir.Graph | ir.Function | ir.Node | ir.Value] = [model, *nodes]
    for graph in all_graphs(model):
        holders += [graph, *graph.inputs]
        if isinstance(graph, ir.Graph):
            holders += graph.initializers.values()
    holders += [value for node in nodes for value in node.outputs]
    for holder in holders:
        for key in [key for key in holder.metadata_props if key.startswith("pkg.") or key == "namespace"]:
            del holder.metadata_props[key]
