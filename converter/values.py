"""Names of a graph's values: the public ones are the user's, every other one is unique."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from trtforge.runtime.graph import all_graphs

__all__ = ["all_values", "name_values"]


def all_values(model: ir.Model) -> Iterator[ir.Value]:
    """Inputs, initializers and results of the graph, its functions and their subgraphs, each once."""
    for graph in all_graphs(model):
        yield from graph.inputs
        if isinstance(graph, ir.Graph):
            inputs = set(graph.inputs)
            yield from (value for value in graph.initializers.values() if value not in inputs)
        for node in graph:
            yield from node.outputs


def name_values(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Gives the graph's inputs and outputs these names, and every other value one that is unique over all subgraphs.

    Requires: outputs are distinct values, none of them an input. Missing optional results of a node stay "".
    """
    ends = [*model.graph.inputs, *model.graph.outputs]
    public = [*inputs, *outputs]
    values = list(all_values(model))
    taken = {value.name for value in values} | set(public)
    used: set[str | None] = set(public)
    inner = [value for value in values if value not in set(ends)]
    for value in inner:
        if value.name in used or value.name is None:
            value.name = _free_name(value.name or "value", taken)
        if value.name:
            used.add(value.name)
    wrong = [(value, name) for value, name in zip(ends, public, strict=True) if value.name != name]
    for value, _ in wrong:  # two of them may swap names
        value.name = _free_name("end", taken)
    for value, name in wrong:
        value.name = name


def _free_name(wanted: str, taken: set[str | None]) -> str:
    number = 1
    while f"{wanted}_{number}" in taken:
        number += 1
    taken.add(f"{wanted}_{number}")
    return f"{wanted}_{number}"
