"""How a piece of a candidate is another graph than the reference: faults that no precision explains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from trtforge.runtime.graph import META_ORIGIN
from trtforge.runtime.runner import Array
from trtforge.validation.bisect import Piece, noise_of
from trtforge.validation.cuts import cut_graph, source_of
from trtforge.validation.kinds import decibels
from trtforge.validation.metrics import is_float

__all__ = ["find_differences"]

_WEIGHT_DB = {"float": 30.0, "quantized": 10.0}
"""Rounding a weight to bf16 leaves 50 dB, to FP8 28, to INT8 by channel 30 to 45: below these it is another weight."""
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "stash_type", "saturate"})


Evaluate = Callable[[ir.Model], dict[str, Array]]


def find_differences(
    reference: ir.Model,
    piece: Piece,
    nodes: Sequence[str],
    evaluate: Evaluate,
    planned: Callable[[], ir.Model] | None = None,
) -> list[str]:
    """How a piece is another graph than the reference, in sentences; [] where a plan's casts and Q/DQ are all.

    Args:
        reference: The float graph.
        piece: The candidate's nodes.
        nodes: Names of the reference's nodes that it stands for.
        evaluate: Computes a graph without inputs: a weight behind casts and DequantizeLinear.
        planned: Makes the graph that the plan has to give. Calibration may change constants on purpose (smoothed
            weights, corrected biases): those that are this graph's are no difference. Called only where one differs.
    """
    wanted = {node.name: node for node in reference.graph if node.name in nodes}
    present = {node.name: node for node in piece.model.graph}
    known = {node.name for node in reference.graph}
    found = [f"{name} is missing" for name in wanted if name not in present]
    found += [
        f"{node.name or node.op_type} ({node.op_type}) was added"
        for node in piece.model.graph
        if META_ORIGIN not in node.metadata_props and node.name not in known and node.op_type != "Constant"
    ]
    for name, node in wanted.items():
        if name in present:
            found += _compare_nodes(node, present[name], piece.model, evaluate, planned)
    return found


def _compare_nodes(
    node: ir.Node, other: ir.Node, model: ir.Model, evaluate: Evaluate, planned: Callable[[], ir.Model] | None
) -> Iterator[str]:
    if (node.domain, node.op_type) != (other.domain, other.op_type):
        yield f"it is {other.op_type}, the reference has {node.op_type}"
        return
    for key in sorted({*node.attributes, *other.attributes} - _TYPE_ATTRIBUTES):
        here, there = _attribute(node, key), _attribute(other, key)
        if here != there:
            yield f"its {key} is {there}, the reference has {here}"
    for slot, value in enumerate(node.inputs):
        against = other.inputs[slot] if slot < len(other.inputs) else None
        if value is None or against is None:
            if value is not against:
                yield f"its input {slot} is {'missing' if against is None else 'new'}"
            continue
        weight = _constant(value)
        if weight is None:
            root = source_of(against).name
            if root != value.name:
                yield f"its input {slot} is {root}, the reference has {value.name}"
            continue
        differences = list(_compare_weight(value.name or "", weight, against, model, evaluate))
        if differences and planned is not None:
            meant = _planned_constant(planned(), node.name or "", slot, evaluate)
            if meant is not None and not list(_compare_weight(value.name or "", meant, against, model, evaluate)):
                continue
        yield from differences


def _planned_constant(planned: ir.Model, node: str, slot: int, evaluate: Evaluate) -> Array | None:
    """What a node of the plan's own graph reads there; None where that is no constant."""
    found = next((candidate for candidate in planned.graph if candidate.name == node), None)
    value = found.inputs[slot] if found is not None and slot < len(found.inputs) else None
    if value is None:
        return None
    constant = _constant(value)
    if constant is not None:
        return constant
    cut = cut_graph(planned, [value.name or ""])
    return None if cut.graph.inputs else evaluate(cut)[value.name or ""]


def _compare_weight(name: str, weight: Array, against: ir.Value, model: ir.Model, evaluate: Evaluate) -> Iterator[str]:
    other = _constant(against)
    kind = "float"
    if other is None:
        cut = cut_graph(model, [against.name or ""])
        if cut.graph.inputs:
            yield f"its constant {name} is computed from {cut.graph.inputs[0].name}"
            return
        kind = "quantized" if any(node.op_type == "DequantizeLinear" for node in cut.graph) else "float"
        other = evaluate(cut)[against.name or ""]
    if other.shape != weight.shape:
        yield f"its constant {name} has shape {list(other.shape)}, the reference {list(weight.shape)}"
    elif not is_float(weight):
        if not np.array_equal(weight, other):
            yield f"its constant {name} is another one"
    else:
        # What means "masked" or "no limit" is cut to the type's range.
        with np.errstate(over="ignore", invalid="ignore"):
            sane = np.abs(weight.astype(np.float64)) < 6e4
            noise = noise_of([{name: weight[sane]}], [{name: other[sane]}])
        if noise > 10 ** (-_WEIGHT_DB[kind] / 10):
            yield f"its constant {name} is another one: {decibels(noise)} against the reference's"


def _attribute(node: ir.Node, key: str) -> object:
    if key not in node.attributes:
        return None
    attribute = node.attributes[key]
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return "a graph"  # its nodes have names of their own
    if attribute.type == ir.AttributeType.TENSOR:
        return "a tensor"
    return attribute.value


def _constant(value: ir.Value) -> Array | None:
    if value.is_initializer() and value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    producer = value.producer()
    if producer is None or producer.op_type != "Constant" or producer.domain:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())
