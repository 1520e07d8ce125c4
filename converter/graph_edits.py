"""Small edits of ONNX graphs that faults and rewrites are made of: new values, tensors put behind others, constants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trtforge.runtime.graph import all_graphs, fresh_name

__all__ = ["FLOATS", "GraphEditor", "choose", "float_array", "set_array"]

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})

Build = Callable[[ir.Value, ir.Value], list[ir.Node]]
"""From the value read and the value to give: the nodes between them, in order."""


class GraphEditor:
    """A model's main graph, and names that are not taken yet. `model` is changed in place."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph
        self._names = {v.name or "" for g in all_graphs(model) for v in _values(g)}
        self._names |= {node.name or "" for g in all_graphs(model) for node in g}

    def fresh(self, base: str) -> str:
        """A name that nothing has."""
        return fresh_name(base, self._names)

    def constant(self, array: np.ndarray[Any, Any], base: str = "audit_constant") -> ir.Value:
        """A new initializer."""
        name = self.fresh(base)
        tensor = ir.tensor(array, name=name)
        shape = ir.Shape(array.shape)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def value_like(self, value: ir.Value, base: str = "audit_value", dtype: ir.DataType | None = None) -> ir.Value:
        """A new value of the shape of `value`, and of its dtype where none is given."""
        kind = ir.TensorType(dtype) if dtype is not None else value.type
        return ir.Value(name=self.fresh(base), type=kind, shape=value.shape)

    def node(
        self, op: str, inputs: Iterable[ir.Value | None], output: ir.Value | None = None, **attributes: Any
    ) -> ir.Node:
        """A new node with one output."""
        out = output if output is not None else ir.Value(name=self.fresh("audit_value"))
        return ir.node(op, list(inputs), attributes, outputs=[out], name=self.fresh(f"audit/{op}"))

    def splice(self, value: ir.Value, build: Build) -> None:
        """Puts nodes behind `value`: all that read it read their result, which takes its name (but an input's)."""
        producer = value.producer()
        old = value.name or ""
        given = value in self.graph.inputs
        tail = ir.Value(name=self.fresh(f"{old}_audited") if given else old, type=value.type, shape=value.shape)
        if not given:
            value.name = self.fresh(f"{old}_before")
        value.replace_all_uses_with(tail, replace_graph_outputs=True)
        nodes = build(value, tail)
        if producer is None:
            self.graph.insert_before(self.graph[0], nodes)
        else:
            self.graph.insert_after(producer, nodes)

    def insert_before(self, node: ir.Node, nodes: list[ir.Node]) -> None:
        """Puts nodes before one."""
        self.graph.insert_before(node, nodes)

    def bypass(self, node: ir.Node) -> None:
        """Removes a node of one output: what read it reads its first input, by an Identity where it gives an output."""
        source, out = node.inputs[0], node.outputs[0]
        assert source is not None
        if out.is_graph_output():
            identity = self.node("Identity", [source], self.value_like(out, dtype=source.dtype))
            new = identity.outputs[0]
            name, out.name = out.name, self.fresh("audit_old")
            out.replace_all_uses_with(new, replace_graph_outputs=True)
            new.name = name
            self.graph.insert_before(node, [identity])
        else:
            out.replace_all_uses_with(source)
        self.graph.remove(node, safe=True)

    def weights(self, least_rank: int = 0) -> list[ir.Value]:
        """Floating initializers of the main graph that a node reads."""
        return [
            value
            for value in self.graph.initializers.values()
            if value.const_value is not None
            and value.const_value.dtype in FLOATS
            and len(value.const_value.shape) >= least_rank
            and list(value.uses())
        ]

    def activations(self) -> list[ir.Value]:
        """Floating outputs of the main graph's nodes whose rank is known."""
        return [
            value
            for node in self.graph
            for value in node.outputs
            if value.dtype in FLOATS and value.shape is not None and value.name
        ]


def choose(random: np.random.Generator, items: Sequence[Any]) -> Any:
    """One of them, each with the same chance."""
    return items[int(random.integers(len(items)))]


def float_array(value: ir.Value) -> np.ndarray[Any, Any]:
    """A copy of an initializer's values; float64, so that edits don't round."""
    assert value.const_value is not None
    return np.array(value.const_value.numpy(), dtype=np.float64)


def set_array(value: ir.Value, array: np.ndarray[Any, Any]) -> None:
    """Gives an initializer other values, in its own dtype."""
    assert value.const_value is not None
    kind = value.const_value.numpy().dtype
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, as in the field
        value.const_value = ir.tensor(np.asarray(array.astype(kind), order="C"), name=value.name)


def _values(graph: ir.Graph | ir.Function) -> list[ir.Value]:
    initializers = list(graph.initializers.values()) if isinstance(graph, ir.Graph) else []
    return [*graph.inputs, *initializers, *(value for node in graph for value in node.outputs)]
