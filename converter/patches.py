"""Convolutions over patches that do not overlap, written as what they are: one matrix product.

ViT's first layer reads 16 x 16 pixels of 3 channels a patch. As a convolution that took 136 of ViT-B/16's 805 us of
kernels on an H100 (TensorRT-RTX 1.6.1, fp16, batch 1), and the product of the same size behind each attention 3.6 us:
kernels of convolutions fill up so few channels, and walk along the patch alone.

Requires: shapes. Ensures: equal results, but for the order in which sums are formed; nodes that carry the convolution's
origin. Convolutions that overlap, pad, or have more channels stay.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from trtforge.converter.node_writer import (
    NodeWriter,
    int_attribute,
    ints_attribute,
    known_sizes,
    node_input,
    string_attribute,
)

__all__ = ["multiply_patches"]

_CHANNELS = 4
"""Most channels of an image that are worth it: convolutions read eight at a time."""
_LEAST = 192
"""Fewest values of a patch that are worth it: below, moving the pixels costs what the product saves."""


def multiply_patches(model: ir.Model) -> bool:
    """Rewrites in place, and says whether it changed anything; a second call never does."""
    convolutions = [node for node in model.graph if node.op_type == "Conv" and node.domain in ("", "ai.onnx")]
    changed = [_rewrite(model.graph, node) for node in convolutions]
    return any(changed)


def _rewrite(graph: ir.Graph, node: ir.Node) -> bool:
    image, weight, bias = node.inputs[0], node.inputs[1], node_input(node, 2)
    if image is None or weight is None or weight.const_value is None or not weight.is_initializer():
        return False
    sizes, (count, channels, *block) = known_sizes(image), weight.const_value.shape.numpy()
    if sizes is None or len(sizes) != 4 or not _is_partition(node, block):
        return False
    height, width = sizes[2:]
    if height is None or width is None or height % block[0] or width % block[1]:
        return False
    if sizes[1] != channels or channels > _CHANNELS or channels * math.prod(block) < _LEAST:
        return False
    rows, columns = height // block[0], width // block[1]
    matrix = ir.Value(
        name=f"{weight.name}_matrix",
        const_value=ir.tensor(weight.const_value.numpy().reshape(count, -1).T.copy(), name=f"{weight.name}_matrix"),
        type=weight.type,
        shape=ir.Shape((channels * math.prod(block), count)),
    )
    graph.register_initializer(matrix)
    writer = NodeWriter(node, graph.opset_imports.get("", 0))
    # In the shape of a Reshape 0 keeps an axis as it is.
    value = writer.add("Reshape", image, np.array([0, channels, rows, block[0], columns, block[1]]))
    value = writer.transpose(value, (0, 2, 4, 1, 3, 5))
    value = writer.add("Reshape", value, np.array([0, rows * columns, channels * math.prod(block)]))
    value = writer.add("MatMul", value, matrix)
    if bias is not None:
        value = writer.add("Add", value, bias)
    value = writer.transpose(value, (0, 2, 1))
    writer.replace(writer.add("Reshape", value, np.array([0, count, rows, columns])))
    return True


def _is_partition(node: ir.Node, block: list[int]) -> bool:
    """Whether the kernel steps over the image by its own size."""
    return (
        len(block) == 2
        and ints_attribute(node, "strides", [1, 1]) == block
        and not any(ints_attribute(node, "pads", [0, 0, 0, 0]))
        and set(ints_attribute(node, "dilations", [1, 1])) == {1}
        and int_attribute(node, "group", 1) == 1
        and string_attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
    )
