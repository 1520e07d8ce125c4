"""Makes a graph plain, and such that TensorRT's parser reads it.

Ensures: no local functions, no constants as nodes, no dead or doubled parts, inputs and outputs that are distinct
values, a unique name for every value, Einsum equations that parse. Names of inputs and outputs, and results, are as
before.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from trtforge.converter.einsum import normal_equation
from trtforge.converter.values import name_values
from trtforge.runtime.graph import all_graphs

__all__ = ["clean"]

_SMALL = 1024
"""Elements up to which equal initializers are merged: constants, not weights, which keep the names that users know."""


def clean(model: ir.Model) -> None:
    """Cleans in place; a second call changes nothing."""
    inputs = [str(value.name) for value in model.graph.inputs if not value.is_initializer()]
    outputs = [str(value.name) for value in model.graph.outputs]
    for step in _BEFORE:
        step(model)
    for graph in all_graphs(model):
        _drop_identities(graph)
    for step in _AFTER:
        step(model)
    _feed_outputs_from_nodes(model.graph)
    name_values(model, inputs, outputs)
    for graph in all_graphs(model):
        for node in graph:
            if node.op_type == "Einsum" and node.domain in ("", "ai.onnx"):
                _rewrite_equation(node)


_BEFORE: tuple[ir.passes.PassBase, ...] = (
    common.InlinePass(),
    common.RemoveInitializersFromInputsPass(),
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.LiftSubgraphInitializersToMainGraphPass(),
    common.DeduplicateInitializersPass(size_limit=_SMALL),
)
_AFTER: tuple[ir.passes.PassBase, ...] = (
    common.CommonSubexpressionEliminationPass(),
    common.RemoveUnusedNodesPass(),
    common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass(),
    common.OutputFixPass(),
)


def _drop_identities(graph: ir.Graph | ir.Function) -> None:
    """Removes each Identity that no rule of ONNX needs.

    onnx-ir's pass renames outputs of the graph where two of them come from one value, and lets the body of an If or
    Loop return a value of the graph outside, which ONNX forbids.
    """
    for node in graph:
        source = node.inputs[0] if node.op_type == "Identity" and node.domain == "" and node.inputs else None
        if source is None:
            continue
        result = node.outputs[0]
        if result.is_graph_output():
            producer = source.producer()
            if producer is None or producer.graph is not graph or source.is_graph_output():
                continue
            source.name, result.name = result.name, source.name
        source.shape = source.shape if source.shape is not None else result.shape
        source.type = source.type or result.type
        result.replace_all_uses_with(source, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _feed_outputs_from_nodes(graph: ir.Graph) -> None:
    """Puts an Identity between an initializer and the output that it is: the parser wants a node to make it."""
    for index, value in enumerate(graph.outputs):
        if value.is_initializer():
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
            graph.initializers.pop(str(value.name))
            value.name = f"{value.name}_value"
            graph.register_initializer(value)


def _rewrite_equation(node: ir.Node) -> None:
    equation = node.attributes["equation"].as_string()
    ranks = [None if value is None or value.shape is None else len(value.shape) for value in node.inputs]
    node.attributes["equation"] = ir.AttrString("equation", normal_equation(equation, ranks))
