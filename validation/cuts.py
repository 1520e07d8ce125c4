"""Cutting graphs: the tensors that cross a line through a graph, and the piece between two such lines as a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from trtforge.runtime.graph import META_ORIGIN

__all__ = ["Cut", "constant_nodes", "cut_graph", "find_cuts", "main_values", "outer_values", "source_of"]


@dataclass(frozen=True, slots=True)
class Cut:
    """A line through a graph in its order of execution.

    Attributes:
        position: How many nodes stand before it.
        tensors: Names of what crosses it: made before it (graph inputs included) and needed behind it.
    """

    position: int
    tensors: tuple[str, ...]


def main_values(model: ir.Model) -> dict[str, ir.Value]:
    """Inputs, initializers and node outputs of the main graph by name."""
    graph = model.graph
    found = {value.name: value for value in (*graph.inputs, *graph.initializers.values()) if value.name}
    found |= {value.name: value for node in graph for value in node.outputs if value.name}
    return found


def outer_values(node: ir.Node) -> Iterator[ir.Value]:
    """What the node reads: its inputs, and what its bodies take from the graphs around them."""
    inside: set[ir.Value] = set()
    stack: list[ir.Node | ir.Graph] = [node]
    read: list[ir.Value] = []
    while stack:
        item = stack.pop()
        if isinstance(item, ir.Graph):
            inside.update(item.inputs, item.initializers.values())
            read.extend(item.outputs)
            stack.extend(item)
            continue
        read.extend(value for value in item.inputs if value is not None)
        if item is not node:
            inside.update(item.outputs)
        for attribute in item.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                stack.append(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS:
                stack.extend(attribute.as_graphs())
    return (value for value in dict.fromkeys(read) if value not in inside)


def source_of(value: ir.Value) -> ir.Value:
    """The model's own tensor behind what passes inserted: casts, Q/DQ."""
    while (producer := value.producer()) is not None and META_ORIGIN in producer.metadata_props:
        source = producer.inputs[0] if producer.inputs else None
        if source is None:
            break
        value = source
    return value


def constant_nodes(model: ir.Model) -> set[ir.Node]:
    """Nodes of the main graph that compute from constants alone: weights in another layout, shapes written down."""
    inputs = set(model.graph.inputs)
    changing = set(inputs)
    found = set()
    for node in model.graph:
        random = node.op_type.startswith(("Random", "Multinomial", "Bernoulli"))
        if random or any(value in changing for value in outer_values(node)):
            changing.update(node.outputs)
        else:
            found.add(node)
    return found


def find_cuts(model: ir.Model, known: Collection[str]) -> list[Cut]:
    """Every line between two nodes of the main graph that only tensors of `known` cross, the first and last included.

    Args:
        model: The graph.
        known: Names of tensors that the other graph has too; graph inputs always count.
    """
    graph = model.graph
    nodes = list(graph)
    constant = constant_nodes(model)
    inputs = set(graph.inputs)
    last_use: dict[ir.Value, int] = {}
    for position, node in enumerate(nodes):
        if node not in constant:
            last_use.update(dict.fromkeys(outer_values(node), position))
    last_use.update({value: len(nodes) for value in graph.outputs})
    live: dict[ir.Value, None] = {value: None for value in graph.inputs if value in last_use}
    cuts = []
    for position in range(len(nodes) + 1):
        if position:
            node = nodes[position - 1]
            if node not in constant:
                live.update({value: None for value in node.outputs if value in last_use})
        live = {value: None for value in live if last_use[value] >= position}
        if all(value in inputs or value.name in known for value in live):
            cuts.append(Cut(position, tuple(value.name or "" for value in live)))
    return cuts


def cut_graph(model: ir.Model, outputs: Sequence[str], stops: Collection[str] = ()) -> ir.Model:
    """A copy that computes `outputs` and takes as inputs those of `stops` that it meets on the way back from them.

    Args:
        model: The graph; types of all tensors that become inputs are known.
        outputs: Tensors of the main graph; an output is computed even where it is one of `stops`.
        stops: Tensors that are given rather than computed; initializers never are.

    Raises:
        KeyError: the main graph has no such output.
    """
    copy = model.clone()
    graph = copy.graph
    values = main_values(copy)
    wanted = [values[name] for name in outputs]
    given = {values[name] for name in stops if name in values and not values[name].is_initializer()} - set(wanted)
    needed: set[ir.Node] = set()
    entered: dict[ir.Value, None] = {}
    initializers: set[ir.Value] = set()
    stack = list(wanted)
    while stack:
        value = stack.pop()
        producer = value.producer()
        if value in given or (value.is_graph_input() and not value.is_initializer()):
            entered[value] = None
        elif producer is None:
            initializers.add(value)
        elif producer not in needed:
            needed.add(producer)
            stack.extend(outer_values(producer))
    order = {value: place for place, value in enumerate(values.values())}
    graph.outputs.clear()  # else an output that is given could not be replaced
    inputs = [value if value.is_graph_input() else _replace(value) for value in sorted(entered, key=order.__getitem__)]
    graph.inputs.clear()
    for node in reversed(list(graph)):
        if node not in needed:
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if value not in initializers:
            del graph.initializers[name]
    graph.inputs.extend(inputs)
    graph.outputs.extend(wanted)
    return copy


def _replace(value: ir.Value) -> ir.Value:
    """A new value that stands for `value` wherever that was used, under its name."""
    # Of the shape only the rank is kept: sizes that inference wrote down may hold for one size of the inputs alone.
    shape = None if value.shape is None else ir.Shape([None] * len(value.shape))
    twin = ir.Value(name=value.name, type=value.type, shape=shape)
    value.replace_all_uses_with(twin)
    value.name = f"{value.name}__cut"
    return twin
