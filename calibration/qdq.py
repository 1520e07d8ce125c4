"""Writes a placement into a graph: explicit QuantizeLinear and DequantizeLinear nodes, the form every TensorRT takes.

Activations get a Q/DQ pair before their uses; weights become int8 or FP8 initializers behind a DequantizeLinear, a
quarter of the file, which RTX 1.7 builds like a full pair. It works on the float graph and on one whose floats have
been cast to fp16 or bf16 since: the placement goes by node ids, ranges by the reference graph's names, and scales take
the type of the tensor they stand at. Biases stay float: an int32 bias behind a DequantizeLinear does not parse.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from trtforge.calibration.bias import apply_corrections
from trtforge.calibration.fit import Fit
from trtforge.calibration.placement import Placement, QuantizedTensor, Use
from trtforge.calibration.ranges import QuantFormat, Ranges
from trtforge.calibration.weights import (
    FittedWeight,
    constant_array,
    fit_scale,
    fit_scales,
    is_constant,
    quantize_weight,
)
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.graph import META_LINE, META_MODULE, META_ORIGIN
from trtforge.runtime.suggest import nearest

__all__ = ["ORIGIN", "InsertReport", "insert_qdq"]

ORIGIN = "quantize"
"""`META_ORIGIN` of every node inserted here."""

_CODES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


@dataclass(frozen=True, slots=True)
class InsertReport:
    """What was written.

    Attributes:
        pairs: Q/DQ pairs on activations.
        weights: Weights stored as codes.
        in_float: Ids of placed nodes that stay in float because a tensor of theirs has no range.
        bytes_saved: Size of the float weights that were replaced, less that of codes and scales.
    """

    pairs: int
    weights: int
    in_float: tuple[str, ...]
    bytes_saved: int


def insert_qdq(
    model: ir.Model,
    placement: Placement,
    ranges: Ranges,
    fit: Fit | None = None,
    *,
    missing: Literal["raise", "float"] = "raise",
) -> InsertReport:
    """Inserts what `placement` says, in place. Inputs that read a DequantizeLinear already are left as they are.

    Args:
        model: The graph that the placement was made for, or one with the same ids, cast since.
        placement: What to quantize.
        ranges: A range for each of `placement.measured`.
        fit: Codes and biases fitted to the data; None stores each weight's nearest codes, and changes no bias.
        missing: What to do about a tensor without a range: fail, or leave every node that reads it in float.

    Returns:
        What was written.

    Raises:
        CalibrationError: no range for a tensor, an operator set too old, a node that is not there, or a weight that is
            not finite.
    """
    lacking = [name for name in placement.measured if name not in ranges]
    if lacking and missing == "raise":
        raise CalibrationError(
            f"{len(lacking)} of {len(placement.measured)} tensors have no range: {', '.join(lacking[:5])}",
            why=f"the ranges know {len(ranges)} tensors; {nearest(lacking[0], ranges.tensors)}",
            fix="calibrate this model again, or leave those layers in float",
        )
    unknown = set(lacking)
    in_float = {use.node for t in placement.tensors if t.measured in unknown for use in t.uses}
    placement = placement.without(in_float)
    nodes = {node.name: node for node in model.graph if node.name}
    gone = [name for name in placement.nodes if name not in nodes]
    if gone:
        raise CalibrationError(
            f"{len(gone)} nodes of the placement are not in the graph: {', '.join(gone[:5])}",
            why=nearest(gone[0], [name for name in nodes if name]),
            fix="make the placement again from this graph",
        )
    writer = _Writer(model, nodes)
    for tensor in placement.tensors:
        writer.quantize_tensor(tensor, ranges)
    for weight in placement.weights:
        fitted = fit.weights.get(weight.uses[0].node) if fit is not None and weight.format == "int8" else None
        writer.quantize_weight(weight.uses, weight.format, weight.axis, fitted)
    writer.drop_unused()
    if fit is not None:
        placed = set(placement.nodes)
        apply_corrections(model, {node: delta for node, delta in fit.biases.items() if node in placed})
    return InsertReport(writer.pairs, writer.weights, tuple(sorted(in_float)), writer.bytes_saved)


class _Writer:
    """Inserts nodes and initializers under names that nothing else has."""

    def __init__(self, model: ir.Model, nodes: dict[str, ir.Node]) -> None:
        self.graph = model.graph
        self.opset = model.graph.opset_imports.get("", 0)
        self.nodes = nodes
        self.order = {node: position for position, node in enumerate(self.graph)}
        self.values = {value.name or "" for node in self.graph.all_nodes() for value in node.outputs}
        self.values |= {value.name or "" for value in (*self.graph.inputs, *self.graph.initializers.values())}
        self.names = {node.name or "" for node in self.graph.all_nodes()}
        self.replaced: list[ir.Value] = []
        self.pairs = 0
        self.weights = 0
        self.bytes_saved = 0

    def quantize_tensor(self, tensor: QuantizedTensor, ranges: Ranges) -> None:
        # One reference tensor may have become several since, by casts to different types.
        for value, uses in self._by_value(tensor.uses).items():
            dtype = self._dtype(value, uses)
            self._check_opset(tensor.format, dtype)
            scale = fit_scale(ranges[tensor.measured].scale(tensor.format), tensor.format, dtype)
            base = value.name or tensor.name
            arguments = self._parameters(base, np.array(scale, dtype=np.float32), tensor.format, dtype)
            reader = self.nodes[uses[0].node]
            quantize = self._node("QuantizeLinear", [value, *arguments], base, "quantized", reader)
            quantize.outputs[0].dtype = _CODES[tensor.format]
            dequantize = self._node("DequantizeLinear", [quantize.outputs[0], *arguments], base, "dequantized", reader)
            dequantize.outputs[0].dtype = dtype
            quantize.outputs[0].shape = dequantize.outputs[0].shape = value.shape
            self._connect(uses, dequantize.outputs[0], [quantize, dequantize])
            self.pairs += 1

    def quantize_weight(
        self, uses: tuple[Use, ...], format: QuantFormat, axis: int | None, fitted: FittedWeight | None
    ) -> None:
        for value, same in self._by_value(uses).items():
            dtype = self._dtype(value, same)
            self._check_opset(format, dtype)
            name = value.name or ""
            array = constant_array(value)
            if fitted is None:
                codes, scales = quantize_weight(name, array, axis, format, dtype)
            else:
                codes, scales = fitted.codes, fit_scales(fitted.scales, format, dtype)
            base = name if axis is None else f"{name}_axis{axis}"
            stored = self._initializer(f"{base}_codes", ir.Tensor(codes, dtype=_CODES[format]))
            arguments = self._parameters(base, scales, format, dtype)
            attributes = {} if axis is None else {"axis": axis}
            reader = self.nodes[same[0].node]
            dequantize = self._node("DequantizeLinear", [stored, *arguments], base, "dequantized", reader, attributes)
            dequantize.outputs[0].dtype = dtype
            dequantize.outputs[0].shape = ir.Shape(codes.shape)
            self._connect(same, dequantize.outputs[0], [dequantize])
            self.replaced.append(value)
            self.weights += 1
            self.bytes_saved -= int(codes.nbytes + scales.size * (dtype.itemsize + 1))  # a zero point is one byte

    def drop_unused(self) -> None:
        """Removes the float weights, and the layout changes behind them, that nothing reads any more."""
        while self.replaced:
            value = self.replaced.pop()
            if value.uses() or value.is_graph_output() or value.is_graph_input():
                continue
            node = value.producer()
            if node is not None:
                before = [item for item in node.inputs if item is not None]
                self.graph.remove(node, safe=True)
                self.replaced.extend(before)
            elif value.name and value.name in self.graph.initializers and value.const_value is not None:
                self.bytes_saved += int(value.const_value.nbytes)
                del self.graph.initializers[value.name]

    def _by_value(self, uses: Iterable[Use]) -> dict[ir.Value, list[Use]]:
        found: dict[ir.Value, list[Use]] = {}
        for use in uses:
            value = self.nodes[use.node].inputs[use.index]
            assert value is not None
            before = value.producer()
            if before is None or before.op_type != "DequantizeLinear":
                found.setdefault(value, []).append(use)
        return found

    def _dtype(self, value: ir.Value, uses: list[Use]) -> ir.DataType:
        """The value's float type; where inference left it open, that of a constant beside it, else float32."""
        beside = [item for item in self.nodes[uses[0].node].inputs if item is not None and is_constant(item)]
        for candidate in (value, *beside):
            if candidate.dtype is not None:
                return candidate.dtype
        return ir.DataType.FLOAT

    def _check_opset(self, format: QuantFormat, dtype: ir.DataType) -> None:
        # DequantizeLinear has an axis from 13 on, FP8 and scales of 16 bits from 19 on.
        needed = 13 if format == "int8" and dtype == ir.DataType.FLOAT else 19
        if self.opset < needed:
            raise CalibrationError(
                f"{format} on {dtype.name} tensors needs operator set {needed}, the graph has {self.opset}",
                fix=f"export with opset_version={needed} or later, or convert the model's version first",
            )

    def _parameters(
        self,
        base: str,
        scales: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
        format: QuantFormat,
        dtype: ir.DataType,
    ) -> list[ir.Value]:
        zeros = np.zeros(scales.shape, dtype=_CODES[format].numpy())
        scale = ir.Tensor(scales.astype(dtype.numpy()), dtype=dtype)
        return [
            self._initializer(f"{base}_scale", scale),
            self._initializer(f"{base}_zero_point", ir.Tensor(zeros, dtype=_CODES[format])),
        ]

    def _node(
        self,
        op: str,
        inputs: list[ir.Value],
        base: str,
        suffix: str,
        reader: ir.Node,
        attributes: dict[str, int] | None = None,
    ) -> ir.Node:
        node = ir.node(op, inputs, attributes, name=_unique(f"{base}/{op}", self.names))
        node.metadata_props[META_ORIGIN] = ORIGIN
        for key in (META_MODULE, META_LINE):
            if key in reader.metadata_props:
                node.metadata_props[key] = reader.metadata_props[key]
        node.outputs[0].name = _unique(f"{base}_{suffix}", self.values)
        return node

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=_unique(name, self.values),
            shape=ir.Shape(tensor.numpy().shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        tensor.name = value.name
        self.graph.register_initializer(value)
        return value

    def _connect(self, uses: list[Use], value: ir.Value, new: list[ir.Node]) -> None:
        readers = [self.nodes[use.node] for use in uses]
        first = min(readers, key=self.order.__getitem__)
        self.graph.insert_before(first, new)
        for use in uses:
            self.nodes[use.node].replace_input_with(use.index, value)


def _unique(name: str, taken: set[str]) -> str:
    found, number = name, 1
    while found in taken:
        found = f"{name}_{number}"
        number += 1
    taken.add(found)
    return found
