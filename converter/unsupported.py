"""Operators that no TensorRT parser has, expressed through operators that it has, in the graph.

Requires: shapes of the values concerned, where sizes are known. Ensures: equal results; new nodes carry what the old
one said of its origin (the user's line and module); a node whose sizes or attributes allow no rewrite stays as it is,
and is then named in the build's list of what the parser lacks. A second call changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import onnx_ir as ir

from trtforge.converter.node_writer import (
    NodeWriter,
    constant_int,
    constant_ints,
    dim_of,
    int_attribute,
    ints_attribute,
    known_sizes,
    node_input,
    string_attribute,
)
from trtforge.runtime.graph import all_graphs
from trtforge.runtime.runner import Array

__all__ = ["REWRITTEN", "rewrite"]

_LARGEST = 16_000_000
"""Elements of a matrix that a rewrite may put in place of an operator: 64 MB of float32."""


def rewrite(model: ir.Model, operators: Collection[str]) -> None:
    """Rewrites in place each node of these operators, all of them keys of `REWRITTEN`, that can be."""
    for graph in all_graphs(model):
        for node in list(graph):
            if node.op_type not in operators or node.domain not in ("", "ai.onnx"):
                continue
            writer = NodeWriter(node, model.graph.opset_imports.get("", 0))
            result = REWRITTEN[node.op_type](writer, node)
            if result is not None:
                writer.replace(result)


def _rewrite_dft(writer: NodeWriter, node: ir.Node) -> ir.Value | None:
    """X[k] = sum over n of x[n] exp(-2πi nk/L): a product with a matrix, real and imaginary parts side by side.

    ONNX, operator DFT: the last axis holds 1 (real) or 2 (complex) parts; a signal longer than L is cut off, a shorter
    one padded with zeros; the inverse has exp(+2πi nk/L)/L, and where it is onesided it takes L/2 + 1 bins.
    """
    value = node.inputs[0]
    assert value is not None
    sizes, axis = known_sizes(value), _axis_of_dft(node, writer.opset)
    if sizes is None or axis is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    rank, axis = len(sizes), axis % len(sizes)
    length, parts = sizes[axis], sizes[-1]
    inverse, onesided = bool(int_attribute(node, "inverse", 0)), bool(int_attribute(node, "onesided", 0))
    real = inverse and onesided
    period = (
        constant_int(node.inputs[1])
        if node_input(node, 1) is not None
        else length and 2 * (length - 1)
        if real
        else length
    )
    if not length or not period or parts not in (1, 2) or axis == rank - 1 or (real and parts == 1):
        return None
    half = period // 2 + 1
    used = min(length, half if real else period)
    if used * period * 4 > _LARGEST:
        return None
    matrix = dft_matrix(used, half if onesided and not real else period, period, parts, inverse=inverse)
    if real:
        # The other bins are the conjugates of these: twice the real part, but for the first and, of an even period, the
        # last one, which are their own.
        twice = np.where((np.arange(used) == 0) | (2 * np.arange(used) == period), 1, 2)
        matrix = matrix[:, ::2] * np.repeat(twice, 2)[:, None]
    if used < length:
        value = writer.add("Slice", value, np.array([0]), np.array([used]), np.array([axis]))
    order = [*(a for a in range(rank - 1) if a != axis), axis, rank - 1]
    value = writer.transpose(value, order)
    # In the shape of a Reshape 0 keeps an axis as it is.
    value = writer.add("Reshape", value, np.array([0] * (rank - 2) + [used * parts]))
    value = writer.add("MatMul", value, matrix.astype(value_dtype(node.inputs[0])))
    value = writer.add("Reshape", value, np.array([0] * (rank - 2) + [-1, 1 if real else 2]))
    return writer.transpose(value, [order.index(a) for a in range(rank)])


def dft_matrix(length: int, bins: int, period: int, parts: int, *, inverse: bool) -> Array:
    """The matrix of a discrete Fourier transform on real and imaginary parts side by side.

    Returns:
        float64, of shape (length * parts, bins * 2): `row(x) @ matrix` is the transform of `x`.
    """
    # nk modulo the period keeps the argument small, and so the values exact to the last digit.
    turns = np.outer(np.arange(length), np.arange(bins)) % period
    angle = (2 if inverse else -2) * np.pi * turns / period
    cos, sin = np.cos(angle), np.sin(angle)
    # (a + ib)(cos + i sin) = (a cos - b sin) + i(a sin + b cos)
    rows = [np.stack([cos, sin], -1), np.stack([-sin, cos], -1)][:parts]
    matrix = np.stack(rows, 1).reshape(length * parts, bins * 2)
    scaled: Array = matrix / (period if inverse else 1)
    return scaled


def value_dtype(value: ir.Value | None) -> Any:
    """The numpy dtype of a float value."""
    return np.float16 if value is not None and value.dtype == ir.DataType.FLOAT16 else np.float32


def _axis_of_dft(node: ir.Node, opset: int) -> int | None:
    if opset < 20:
        return int_attribute(node, "axis", 1)
    return -2 if node_input(node, 2) is None else constant_int(node_input(node, 2))


def _rewrite_col2im(writer: NodeWriter, node: ir.Node) -> ir.Value | None:
    """Overlapping blocks added up: a transposed convolution, a group for each channel, with kernels of one pixel."""
    value = node.inputs[0]
    assert value is not None
    sizes, image, block = known_sizes(value), constant_ints(node_input(node, 1)), constant_ints(node_input(node, 2))
    if sizes is None or image is None or block is None or len(image) != 2 or not isinstance(sizes[1], int):
        return None
    strides, dilations = ints_attribute(node, "strides", [1, 1]), ints_attribute(node, "dilations", [1, 1])
    pads = ints_attribute(node, "pads", [0, 0, 0, 0])
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, block, strict=True)]
    counts = [(image[i] + pads[i] + pads[i + 2] - reach[i]) // strides[i] + 1 for i in (0, 1)]
    rest = [image[i] - ((counts[i] - 1) * strides[i] + reach[i] - pads[i] - pads[i + 2]) for i in (0, 1)]
    area = math.prod(block)
    channels = sizes[1] // area
    if any(size < 0 for size in rest) or channels * area * area > _LARGEST:
        return None
    kernel = np.eye(area, dtype=value_dtype(value)).reshape(area, 1, *block)
    grid = writer.add("Reshape", value, np.array([0, sizes[1], *counts]))
    return writer.add(
        "ConvTranspose", grid, np.tile(kernel, (channels, 1, 1, 1)), group=channels, strides=strides,
        dilations=dilations, pads=pads, output_padding=rest,
    )  # fmt: skip


def _rewrite_scatter_elements(writer: NodeWriter, node: ir.Node) -> ir.Value | None:
    """`data[…, index[…, i, …], …] += update[…, i, …]` by comparing each index with each position.

    With `I` updates and `D` positions on the axis, an array of `I * D` for each other position holds the updates, and
    elsewhere what changes nothing; it is reduced over `I`. Where several updates meet, float sums may be in another
    order.
    """
    reduction = string_attribute(node, "reduction", "none")
    data, index, update = (node_input(node, number) for number in range(3))
    if reduction not in _NEUTRAL or data is None or index is None or update is None:
        return None
    sizes, index_sizes = known_sizes(data), known_sizes(index)
    if sizes is None or index_sizes is None or data.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    rank, axis = len(sizes), int_attribute(node, "axis", 0) % len(sizes)
    positions, updates = sizes[axis], index_sizes[axis]
    others = [a for a in range(rank) if a != axis]
    same = all(dim_of(data, a) is not None and dim_of(data, a) == dim_of(index, a) for a in others)
    if positions is None or not same or positions * (updates or 1) > _LARGEST:
        return None
    order = [*others, axis]
    back = [order.index(a) for a in range(rank)]
    hits = _hits(writer, writer.transpose(index, order), positions)
    spread = writer.add("Unsqueeze", writer.transpose(update, order), np.array([-1]))
    neutral, reduce, combine = _NEUTRAL[reduction]
    chosen = writer.add("Where", hits, spread, np.array(neutral, value_dtype(data)))
    reduced = writer.transpose(writer.reduce(reduce, chosen, -2), back)
    return writer.add(combine, data, reduced)


def _rewrite_scatter_nd(writer: NodeWriter, node: ir.Node) -> ir.Value | None:
    """`data[index[i]] += update[i]` along the first axis: a product with the matrix of what goes where."""
    data, index, update = (node_input(node, number) for number in range(3))
    if string_attribute(node, "reduction", "none") != "add" or data is None or index is None or update is None:
        return None
    sizes, index_sizes = known_sizes(data), known_sizes(index)
    if sizes is None or index_sizes is None or len(index_sizes) != 2 or index_sizes[1] != 1 or sizes[0] is None:
        return None
    if data.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or len(sizes) > len(_LETTERS):
        return None
    flat = writer.add("Reshape", index, np.array([-1]))
    hits = writer.add("Cast", _hits(writer, flat, sizes[0]), to=data.dtype.value)
    rest = _LETTERS[: len(sizes) - 1]
    return writer.add("Add", data, writer.add("Einsum", hits, update, equation=f"ud,u{rest}->d{rest}"))


_LETTERS = "abcefgh"


def _hits(writer: NodeWriter, index: ir.Value, positions: int) -> ir.Value:
    """Shape (…, I, positions), bool: whether index I names the position; negative ones count from the end."""
    index = writer.add("Cast", index, to=ir.DataType.INT64.value)
    negative = writer.add("Less", index, np.array(0))
    index = writer.add("Where", negative, writer.add("Add", index, np.array(positions)), index)
    return writer.add("Equal", writer.add("Unsqueeze", index, np.array([-1])), np.arange(positions))


_NEUTRAL: dict[str, tuple[float, str, str]] = {
    "add": (0.0, "ReduceSum", "Add"),
    "mul": (1.0, "ReduceProd", "Mul"),
    "max": (-np.inf, "ReduceMax", "Max"),
    "min": (np.inf, "ReduceMin", "Min"),
}
"""What changes nothing under a reduction, its operator over an axis, and that of two tensors."""

REWRITTEN: dict[str, Callable[[NodeWriter, ir.Node], ir.Value | None]] = {
    "DFT": _rewrite_dft,
    "Col2Im": _rewrite_col2im,
    "ScatterElements": _rewrite_scatter_elements,
    "ScatterND": _rewrite_scatter_nd,
}
