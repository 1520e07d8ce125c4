"""Makes masks of ONNX's `Attention` as tall as onnxruntime's CPU kernel wants them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

__all__ = ["broadcast_masks", "may_hold_attention"]


def may_hold_attention(model: Path | bytes) -> bool:
    """Whether the bytes of a model name the operator; cheap, and never wrong about a model that has none."""
    data = model if isinstance(model, bytes) else model.read_bytes()
    return b"Attention" in data


def broadcast_masks(model: onnx.ModelProto) -> bool:
    """Expands the mask of every `Attention`, in bodies too, over the rows of its query; tells whether there was any.

    ONNX lets the mask broadcast, and torch exports a padding mask as [batch, 1, 1, keys]; onnxruntime (1.30, 1.32)
    insists on all rows: "inconsistent q_sequence_length (between attn_mask and Q)". Results are the same.
    """
    graphs = list(_graphs(model.graph))
    taken = {name for graph in graphs for node in graph.node for name in node.output}
    changed = False
    for graph in reversed(graphs):  # bodies first: a graph whose nodes are replaced takes copies of its bodies along
        nodes = []
        for node in graph.node:
            if node.op_type == "Attention" and node.domain == "" and len(node.input) > 3 and node.input[3]:
                prefix = f"{node.output[0]}_mask"
                while f"{prefix}_expanded" in taken:
                    prefix += "_"
                nodes.extend(_expansion(node, prefix))
                node.input[3] = f"{prefix}_expanded"
                changed = True
            nodes.append(node)
        if len(nodes) != len(graph.node):
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
            del graph.node[:]
            graph.node.extend(copies)
    return changed


def _expansion(node: onnx.NodeProto, prefix: str) -> list[onnx.NodeProto]:
    query, mask = node.input[0], node.input[3]
    make = onnx.helper.make_node
    return [
        # The rows are the last dimension but one of [batch, heads, rows, size] and of [batch, rows, heads * size].
        make("Shape", [query], [f"{prefix}_rows"], start=-2, end=-1),
        make("Constant", [], [f"{prefix}_one"], value_ints=[1]),
        make("Concat", [f"{prefix}_rows", f"{prefix}_one"], [f"{prefix}_shape"], axis=0),
        make("Expand", [mask, f"{prefix}_shape"], [f"{prefix}_expanded"]),
    ]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
