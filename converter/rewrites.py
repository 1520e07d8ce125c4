"""Harmless rewrites of ONNX graphs: other nodes, names, order or constants, and the same function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from trtforge.converter.graph_edits import GraphEditor, choose, float_array, set_array

__all__ = ["REWRITES", "Rewrite"]

Random = np.random.Generator
Rewrite = Callable[[GraphEditor, Random], str | None]
"""Edits the graph and says what it did; None where there is no place for it."""


def rename_values(edit: GraphEditor, random: Random) -> str | None:
    """Every tensor inside and every node has another name; inputs and outputs keep theirs."""
    kept = {id(value) for value in [*edit.graph.inputs, *edit.graph.outputs]}
    number = int(random.integers(1000))
    for index, node in enumerate(edit.graph):
        node.name = f"renamed{number}/{index}"
        for place, value in enumerate(node.outputs):
            if id(value) not in kept and value.name:
                value.name = edit.fresh(f"t{number}_{index}_{place}")
    return "names"


def reorder_nodes(edit: GraphEditor, random: Random) -> str | None:
    """The nodes stand in another topological order."""
    nodes = list(edit.graph)
    own = set(map(id, nodes))
    waiting = {id(node): _inner_inputs(node, own) for node in nodes}
    order: list[ir.Node] = []
    placed: set[int] = set()
    while len(order) < len(nodes):
        ready = [n for n in nodes if id(n) not in placed and waiting[id(n)] <= placed]
        node = ready[int(random.integers(len(ready)))]
        order.append(node)
        placed.add(id(node))
    edit.graph.remove(nodes)
    edit.graph.extend(order)
    return "order of nodes"


def insert_identity(edit: GraphEditor, random: Random) -> str | None:
    """An Identity behind a tensor."""
    value = choose(random, [*edit.graph.inputs, *edit.activations()])
    name = value.name
    edit.splice(value, lambda before, after: [edit.node("Identity", [before], after)])
    return f"Identity behind {name}"


def insert_neutral(edit: GraphEditor, random: Random) -> str | None:
    """A tensor plus 0, or times 1."""
    values = edit.activations()
    if not values:
        return None
    value = choose(random, values)
    name, kind, op = value.name, value.dtype.numpy(), choose(random, ["Add", "Mul"])
    constant = edit.constant(np.array(0 if op == "Add" else 1, kind))
    edit.splice(value, lambda before, after: [edit.node(op, [before, constant], after)])
    return f"neutral {op} behind {name}"


def insert_scaling(edit: GraphEditor, random: Random) -> str | None:
    """A tensor times a power of two and divided by it again, which is exact."""
    values = edit.activations()
    if not values:
        return None
    value = choose(random, values)
    name, kind = value.name, value.dtype.numpy()
    factor = edit.constant(np.array(choose(random, [0.5, 2.0, 4.0]), kind))

    def build(before: ir.Value, after: ir.Value) -> list[ir.Node]:
        up = edit.node("Mul", [before, factor], edit.value_like(before))
        return [up, edit.node("Div", [up.outputs[0], factor], after)]

    edit.splice(value, build)
    return f"{name} scaled and back"


def insert_transposes(edit: GraphEditor, random: Random) -> str | None:
    """A Transpose and its inverse."""
    values = [value for value in edit.activations() if len(value.shape or ()) >= 2]
    if not values:
        return None
    value = choose(random, values)
    name, order = value.name, random.permutation(len(value.shape))

    def build(before: ir.Value, after: ir.Value) -> list[ir.Node]:
        there = edit.node("Transpose", [before], ir.Value(name=edit.fresh("t"), type=before.type), perm=order.tolist())
        return [there, edit.node("Transpose", [there.outputs[0]], after, perm=np.argsort(order).tolist())]

    edit.splice(value, build)
    return f"{name} transposed and back"


def insert_reshapes(edit: GraphEditor, random: Random) -> str | None:
    """A tensor flattened, and given its own shape again."""
    values = edit.activations()
    if not values:
        return None
    value = choose(random, values)
    name = value.name

    def build(before: ir.Value, after: ir.Value) -> list[ir.Node]:
        shape = edit.node("Shape", [before])
        flat = edit.node(
            "Reshape",
            [before, edit.constant(np.array([-1], np.int64))],
            ir.Value(name=edit.fresh("t"), type=before.type),
        )
        return [shape, flat, edit.node("Reshape", [flat.outputs[0], shape.outputs[0]], after)]

    edit.splice(value, build)
    return f"{name} flattened and back"


def split_and_concat(edit: GraphEditor, random: Random) -> str | None:
    """A tensor sliced in two along a static axis, and put together again."""
    found = [
        (value, axis, dim)
        for value in edit.activations()
        for axis, dim in enumerate(value.shape or ())
        if isinstance(dim, int) and dim >= 2
    ]
    if not found:
        return None
    value, axis, dim = choose(random, found)
    name, cut = value.name, int(random.integers(1, dim))

    def build(before: ir.Value, after: ir.Value) -> list[ir.Node]:
        ends = [edit.constant(np.array([end], np.int64)) for end in (0, cut, dim)]
        where = edit.constant(np.array([axis], np.int64))
        parts = [
            edit.node("Slice", [before, ends[i], ends[i + 1], where], ir.Value(name=edit.fresh("t"), type=before.type))
            for i in range(2)
        ]
        return [*parts, edit.node("Concat", [part.outputs[0] for part in parts], after, axis=axis)]

    edit.splice(value, build)
    return f"{name} cut at {cut} of axis {axis} and put together"


def commute(edit: GraphEditor, random: Random) -> str | None:
    """The operands of an Add, Mul, Max or Min change places."""
    found = [n for n in edit.graph if n.op_type in ("Add", "Mul", "Max", "Min") and len(n.inputs) == 2 and not n.domain]
    if not found:
        return None
    node = choose(random, found)
    a, b = node.inputs
    node.replace_input_with(0, b)
    node.replace_input_with(1, a)
    return f"operands of {node.name}"


def split_constant(edit: GraphEditor, random: Random) -> str | None:
    """A weight becomes a Concat of two parts."""
    weights = [weight for weight in edit.weights(1) if len(float_array(weight)) >= 2]
    if not weights:
        return None
    weight = choose(random, weights)
    array = weight.const_value.numpy()
    cut = int(random.integers(1, len(array)))
    parts = [edit.constant(np.ascontiguousarray(part)) for part in (array[:cut], array[cut:])]
    whole = edit.value_like(weight)
    weight.replace_all_uses_with(whole)
    edit.graph.insert_before(edit.graph[0], [edit.node("Concat", parts, whole, axis=0)])
    return f"{weight.name} in two parts"


def inline_constant(edit: GraphEditor, random: Random) -> str | None:
    """An initializer becomes a Constant node."""
    weights = [value for value in edit.graph.initializers.values() if list(value.uses()) and value.const_value]
    if not weights:
        return None
    weight = choose(random, weights)
    out = edit.value_like(weight)
    weight.replace_all_uses_with(out)
    node = ir.node("Constant", [], {"value": weight.const_value}, outputs=[out], name=edit.fresh("audit/Constant"))
    edit.graph.insert_before(edit.graph[0], [node])
    return f"{weight.name} as a Constant"


def separate_bias(edit: GraphEditor, random: Random) -> str | None:
    """The bias of a Conv or Gemm is added by a node of its own."""
    found = [
        node
        for node in edit.graph
        if len(node.inputs) == 3 and node.inputs[2] is not None and node.inputs[2].is_initializer() and _plain(node)
    ]
    if not found:
        return None
    node = choose(random, found)
    name, bias, out = node.name, node.inputs[2], node.outputs[0]
    shape = (1, -1) + (1,) * (len(node.inputs[1].shape or ()) - 2) if node.op_type == "Conv" else (-1,)
    moved = edit.constant(np.ascontiguousarray(bias.const_value.numpy().reshape(shape)))
    node.resize_inputs(2)
    edit.splice(out, lambda before, after: [edit.node("Add", [before, moved], after)])
    return f"bias of {name} by an Add"


def replace_relu(edit: GraphEditor, random: Random) -> str | None:
    """A Relu becomes Max(x, 0), or Clip from 0."""
    found = [node for node in edit.graph if node.op_type == "Relu" and node.outputs[0].dtype is not None]
    if not found:
        return None
    node = choose(random, found)
    zero = edit.constant(np.array(0, node.outputs[0].dtype.numpy()))
    op = choose(random, ["Max", "Clip"])
    new = edit.node(op, [node.inputs[0], zero], edit.value_like(node.outputs[0]))
    edit.graph.insert_before(node, [new])
    _replace(edit, node, new)
    return f"{node.name} as {op}"


def permute_channels(edit: GraphEditor, random: Random) -> str | None:
    """The channels between two Convs come in another order, in both."""
    for first in random.permutation(np.array(list(edit.graph), dtype=object)):
        second = _next_conv(first)
        if second is None:
            continue
        one, two = first.inputs[1], second.inputs[1]
        assert one is not None
        assert two is not None
        order = random.permutation(int(one.const_value.shape[0]))
        vectors = [value for value in first.inputs[2:] if value is not None]
        if any(len(list(value.uses())) > 1 for value in (one, two, *vectors)):
            continue
        for value in (one, *vectors):
            set_array(value, float_array(value)[order])
        set_array(two, float_array(two)[:, order])
        return f"channels between {first.name} and {second.name}"
    return None


def _next_conv(node: ir.Node) -> ir.Node | None:
    """The Conv that reads a Conv through element-wise or pooling nodes alone; both without groups."""
    if not _is_plain_conv(node):
        return None
    value = node.outputs[0]
    while True:
        users = [user for user, _ in value.uses()]
        if len(users) != 1 or value.is_graph_output():
            return None
        user = users[0]
        if _is_plain_conv(user):
            return user if user.inputs[0] is value else None
        if user.op_type not in ("Relu", "MaxPool", "AveragePool", "Identity") or len(user.outputs) != 1:
            return None
        value = user.outputs[0]


def _is_plain_conv(node: ir.Node) -> bool:
    group = node.attributes["group"].as_int() if "group" in node.attributes else 1
    weights = node.inputs[1:] if node.op_type == "Conv" else ()
    return bool(weights) and group == 1 and all(w is None or w.is_initializer() for w in weights)


def _plain(node: ir.Node) -> bool:
    if node.op_type == "Conv":
        return node.inputs[1] is not None and node.inputs[1].shape is not None
    beta = node.attributes["beta"].as_float() if "beta" in node.attributes else 1.0
    bias = node.inputs[2]
    assert bias is not None
    return node.op_type == "Gemm" and beta == 1 and bias.shape is not None and len(bias.shape) == 1


def _replace(edit: GraphEditor, old: ir.Node, new: ir.Node) -> None:
    out, fresh = old.outputs[0], new.outputs[0]
    name, out.name = out.name, edit.fresh("audit_old")
    out.replace_all_uses_with(fresh, replace_graph_outputs=True)
    fresh.name = name
    edit.graph.remove(old, safe=True)


def _inner_inputs(node: ir.Node, own: set[int]) -> set[int]:
    """The main graph's nodes that a node reads, from inside its own subgraphs too."""
    found = {id(p) for value in node.inputs if value is not None and (p := value.producer()) is not None}
    for attribute in node.attributes.values():
        graphs: list[Any] = []
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        for graph in graphs:
            for inner in graph:
                found |= _inner_inputs(inner, own)
            found |= {id(p) for value in graph.outputs if (p := value.producer()) is not None}
    return found & own


REWRITES: Mapping[str, Rewrite] = {
    "renamed values": rename_values,
    "reordered nodes": reorder_nodes,
    "inserted Identity": insert_identity,
    "neutral constant": insert_neutral,
    "scaled and back": insert_scaling,
    "transposed and back": insert_transposes,
    "flattened and back": insert_reshapes,
    "cut and put together": split_and_concat,
    "commuted operands": commute,
    "constant in two parts": split_constant,
    "constant as a node": inline_constant,
    "bias of its own": separate_bias,
    "Relu otherwise": replace_relu,
    "permuted channels": permute_channels,
}
"""By the name that a table shows."""
