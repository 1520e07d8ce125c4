"""What float values of a graph stand for, where that decides how they may be rounded: masks, and positions."""

from __future__ import annotations

import onnx_ir as ir

from trtforge.converter.types import body_graphs
from trtforge.runtime.graph import all_graphs

__all__ = ["find_masks", "find_positions", "is_limit"]

# Operators that hand on elements of these input slots unchanged.
_MOVES: dict[str, frozenset[int] | None] = {
    "Cast": None, "Concat": None, "Expand": frozenset({0}), "Flatten": None, "Gather": frozenset({0}),
    "GatherElements": frozenset({0}), "GatherND": frozenset({0}), "Identity": None, "Pad": frozenset({0, 2}),
    "Reshape": frozenset({0}), "ScatterElements": frozenset({0, 2}), "ScatterND": frozenset({0, 2}),
    "Slice": frozenset({0}), "Split": frozenset({0}), "Squeeze": frozenset({0}), "Tile": frozenset({0}),
    "Transpose": None, "Unsqueeze": frozenset({0}), "Where": frozenset({1, 2}),
}  # fmt: skip
# Operators to which "very negative" and "minus infinity" are the same: what they mask does not count.
_IGNORES_NEGATIVE: dict[str, int] = {"Softmax": 0, "Attention": 3, "MaxPool": 0, "ArgMax": 0}
# Operators and slots where a constant is a limit: it may be cut to the type's range without changing any result.
_LIMITS: dict[str, frozenset[int]] = {"Clip": frozenset({1, 2}), "Min": frozenset({0, 1}), "Max": frozenset({0, 1})}

# Arithmetic that keeps a position a position: elementwise, moves, and outer products.
_POSITIONAL = frozenset(_MOVES) | {
    "Abs", "Add", "Ceil", "Clip", "Cos", "CumSum", "Div", "Einsum", "Exp", "Floor", "Log", "MatMul", "Max", "Min",
    "Mod", "Mul", "Neg", "Pow", "Range", "Reciprocal", "Round", "Sin", "Sqrt", "Sub",
}  # fmt: skip
# uint8, int8 and bool are exact in fp16 (and bool and uint8 in bf16): pictures and flags are no positions.
_WIDE_INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT32, ir.DataType.UINT64})


def is_limit(node: ir.Node, slot: int) -> bool:
    """Whether a constant at this input only limits values, so that a bound beyond the type's range may be cut to it."""
    return node.domain == "" and slot in _LIMITS.get(node.op_type, frozenset())


def find_masks(model: ir.Model) -> set[ir.Value]:
    """Float values whose very negative elements only mean "masked": all they reach is Softmax, attention or a maximum.

    They may be cut to a type's lowest finite value. (Minus infinity would give NaN where a whole row is masked.)
    """
    masks: set[ir.Value] = set()
    for graph in reversed(list(all_graphs(model))):
        if not isinstance(graph, ir.Graph):
            continue
        outputs = set(graph.outputs)
        for node in reversed(graph):
            masks.update(value for value in node.outputs if value not in outputs and _only_masks(value, masks))
        masks.update(
            value for value in graph.initializers.values() if value not in outputs and _only_masks(value, masks)
        )
    return masks


def _only_masks(value: ir.Value, masks: set[ir.Value]) -> bool:
    uses = value.uses()
    return bool(uses) and all(_masks(node, slot, masks) for node, slot in uses)


def _masks(node: ir.Node, slot: int, masks: set[ir.Value]) -> bool:
    if node.domain:
        return False
    if _IGNORES_NEGATIVE.get(node.op_type) == slot:
        return True
    if not all(output in masks for output in node.outputs):
        return False
    if node.op_type in _MOVES:
        slots = _MOVES[node.op_type]
        return slots is None or slot in slots
    # (1 - mask) * lowest: the factor is a mask's too where the product is one.
    return node.op_type in ("Add", "Mul")


def find_positions(model: ir.Model) -> set[ir.Node]:
    """Nodes that compute floats from integers and constants alone: positions, timesteps, indices.

    Half precision holds integers exactly up to 2048 (fp16) or 256 (bf16) only, and the sine of a rounded position is
    noise. They are small, so they stay in float32 up to where they meet the data.
    """
    nodes: set[ir.Node] = set()
    positions: set[ir.Value] = set()
    _walk_positions(model.graph, positions, nodes)
    return nodes


def _walk_positions(graph: ir.Graph, positions: set[ir.Value], nodes: set[ir.Node]) -> None:
    for node in graph:
        for body in body_graphs(node):
            _walk_positions(body, positions, nodes)
        if _is_position(node, positions):
            nodes.add(node)
            positions.update(node.outputs)


def _is_position(node: ir.Node, positions: set[ir.Value]) -> bool:
    if node.domain or node.op_type not in _POSITIONAL:
        return False
    source = node.inputs[0] if node.inputs else None
    if node.op_type == "Cast" and source is not None and source.dtype in _WIDE_INTEGERS:
        return True
    floats = [value for value in node.inputs if value is not None and value.dtype == ir.DataType.FLOAT]
    data = [value for value in floats if not _is_constant(value)]
    if not data:
        return node.op_type == "Range" and bool(floats)
    if not all(value in positions for value in data):
        return False
    return node.op_type not in ("MatMul", "Einsum") or all(_is_outer_factor(value) for value in floats)


def _is_constant(value: ir.Value) -> bool:
    if value.is_initializer():
        return not value.is_graph_input()
    producer = value.producer()
    return producer is not None and producer.op_type in ("Constant", "ConstantOfShape")


def _is_outer_factor(value: ir.Value) -> bool:
    """A column, a row or a vector: its product with another is elementwise, as in frequencies times positions."""
    if value.shape is None:
        return False
    sizes = [dim for dim in value.shape if dim != 1]
    return len(sizes) <= 1 or 1 in list(value.shape)[-2:]
