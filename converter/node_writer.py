"""Nodes written in place of one node of a graph, and what is known of a node that is to be replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trtforge.runtime.runner import Array

__all__ = [
    "NodeWriter",
    "constant_int",
    "constant_ints",
    "dim_of",
    "int_attribute",
    "ints_attribute",
    "known_sizes",
    "node_input",
    "string_attribute",
]


class NodeWriter:
    """Makes nodes that stand in place of one node, each of which carries what that said of its origin."""

    def __init__(self, node: ir.Node, opset: int) -> None:
        self.node = node
        self.opset = opset
        self.made: list[ir.Node] = []

    def add(self, op: str, *inputs: ir.Value | Array | None, **attributes: Any) -> ir.Value:
        """A node of the default domain; arrays become constants. Its one output."""
        values = [self._constant(value) if isinstance(value, np.ndarray) else value for value in inputs]
        metadata = dict(self.node.metadata_props)
        version = self.node.version if self.node.domain in ("", "ai.onnx") else None
        node = ir.node(op, values, attributes or None, metadata_props=metadata, version=version)
        self.made.append(node)
        return node.outputs[0]

    def reduce(self, op: str, value: ir.Value, axis: int, *, keep: bool = False) -> ir.Value:
        """A reduction over one axis, in the form that the opset wants."""
        # Axes became an input of ReduceSum at opset 13, of the others at 18.
        if self.opset >= (13 if op == "ReduceSum" else 18):
            return self.add(op, value, np.array([axis]), keepdims=int(keep))
        return self.add(op, value, axes=[axis], keepdims=int(keep))

    def transpose(self, value: ir.Value, order: Sequence[int]) -> ir.Value:
        """The value itself where the order is its own."""
        return value if list(order) == sorted(order) else self.add("Transpose", value, perm=list(order))

    def replace(self, *results: ir.Value) -> None:
        """Puts what was made in place of the node, `results` in place of its outputs."""
        graph = self.node.graph
        assert graph is not None
        graph.insert_before(self.node, self.made)
        for old, result in zip(self.node.outputs, results, strict=True):
            result.name, result.type, result.shape = old.name, old.type, old.shape
            old.replace_all_uses_with(result, replace_graph_outputs=True)
        graph.remove(self.node, safe=True)

    def _constant(self, array: Array) -> ir.Value:
        node = ir.node("Constant", [], {"value": ir.tensor(array)}, metadata_props=dict(self.node.metadata_props))
        self.made.append(node)
        value = node.outputs[0]
        value.const_value, value.dtype, value.shape = ir.tensor(array), ir.tensor(array).dtype, ir.Shape(array.shape)
        return value


def node_input(node: ir.Node, number: int) -> ir.Value | None:
    """None where it is left out."""
    return node.inputs[number] if number < len(node.inputs) else None


def known_sizes(value: ir.Value) -> list[int | None] | None:
    """The size of each axis, None for a dynamic one; None where the rank is unknown."""
    return None if value.shape is None else [size if isinstance(size, int) else None for size in value.shape]


def dim_of(value: ir.Value, axis: int) -> int | str | None:
    """The size or the name of an axis."""
    assert value.shape is not None
    size = value.shape[axis]
    return size if isinstance(size, int) else size.value


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """The numbers of a constant; None where it is none."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(item) for item in tensor.numpy().reshape(-1)]


def constant_int(value: ir.Value | None) -> int | None:
    """The number of a constant that holds one."""
    found = constant_ints(value)
    return found[0] if found is not None and len(found) == 1 else None


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """An attribute of one integer."""
    return node.attributes[name].as_int() if name in node.attributes else default


def ints_attribute(node: ir.Node, name: str, default: list[int]) -> list[int]:
    """An attribute of integers."""
    return list(node.attributes[name].as_ints()) if name in node.attributes else default


def string_attribute(node: ir.Node, name: str, default: str) -> str:
    """An attribute of text."""
    return node.attributes[name].as_string() if name in node.attributes else default
