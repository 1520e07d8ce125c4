"""What quantization does to a piece: whether its weights, the clipping or the steps of its inputs are to blame."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trtforge.runtime.graph import META_ORIGIN
from trtforge.validation.bisect import Piece, Run, noise_of
from trtforge.validation.cuts import source_of
from trtforge.validation.kinds import Kind, Symptom, decibels

__all__ = ["find_quantization"]

_FP8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)


def find_quantization(piece: Piece, run: Run) -> Symptom | None:
    """The part of a piece's Q/DQ that makes most of its noise, told by leaving parts out; None where it has no Q/DQ.

    Two variants are run on the reference's tensors: one without Q/DQ on activations, where only the weights are
    quantized, and one where activations are clipped to their ranges but not rounded.
    """
    pairs = [node for node in piece.model.graph if node.op_type == "QuantizeLinear"]
    weights = any(node.op_type == "DequantizeLinear" for node in piece.model.graph)
    if not pairs and not weights:
        return None
    bare = noise_of(piece.expected, run(_without_steps(piece.model, clip=False), piece.inputs)) if pairs else piece.own
    if bare >= 0.5 * piece.own:
        return Symptom("rounding", f"its weights are to blame: quantized they alone leave {decibels(bare)}")
    clipped = noise_of(piece.expected, run(_without_steps(piece.model, clip=True), piece.inputs))
    clips = clipped - bare >= 0.5 * (piece.own - bare)
    sentences = [text for node in pairs if (text := _describe(node, piece, clips=clips))]
    kind: Kind = "clipping" if clips else "rounding"
    return Symptom(kind, "; ".join(sentences) or f"its quantized inputs leave {decibels(piece.own)}")


def _without_steps(model: ir.Model, *, clip: bool) -> ir.Model:
    """A copy without Q/DQ on activations; with `clip` they are still cut to their ranges."""
    copy = model.clone()
    for node in list(copy.graph):
        if node.op_type != "QuantizeLinear" or node.inputs[0] is None:
            continue
        source, end = node.inputs[0], _end(node)
        if clip and end is not None:
            bounds = []
            for sign in (-1.0, 1.0):
                array = np.array(sign * end, np.float32).astype((source.dtype or ir.DataType.FLOAT).numpy())
                constant = ir.node("Constant", [], {"value": ir.tensor(array)}, metadata_props={META_ORIGIN: "bisect"})
                constant.outputs[0].name = f"{source.name}__{'low' if sign < 0 else 'high'}"
                constant.outputs[0].type = source.type
                bounds.append(constant)
            cut = ir.node("Clip", [source, *(bound.outputs[0] for bound in bounds)], name=f"{source.name}/Clip__cut")
            cut.outputs[0].name = f"{source.name}__clipped"
            cut.outputs[0].type, cut.outputs[0].shape = source.type, source.shape
            copy.graph.insert_before(node, [*bounds, cut])
            source = cut.outputs[0]
        for user, _ in list(node.outputs[0].uses()):
            if user.op_type == "DequantizeLinear":
                user.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
                copy.graph.remove(user, safe=True)
        if not node.outputs[0].uses():
            copy.graph.remove(node, safe=True)
    return copy


def _describe(node: ir.Node, piece: Piece, *, clips: bool) -> str:
    """A clause on one quantized input, with the numbers that tell why; "" where it is not among what was fed."""
    name = source_of(node.inputs[0]).name if node.inputs[0] is not None else None
    end = _end(node)
    arrays = [sample[name] for sample in piece.inputs if name in sample] if name else []
    if end is None or not arrays:
        return ""
    x = np.concatenate([np.abs(array.astype(np.float64)).reshape(-1) for array in arrays])
    if clips:
        share = np.count_nonzero(x > end) / max(x.size, 1)
        return (
            f"its input {name} is clipped at {end:.4g}: values reach {x.max(initial=0.0):.4g}, {share:.2%} lie beyond"
        )
    if _code(node) in _FP8:
        return f"its input {name} keeps 4 significant bits in fp8"
    half = end / 127 / 2
    alive = x[x > 0]
    lost = np.count_nonzero(alive <= half) / max(alive.size, 1)
    return f"its input {name} has steps of {2 * half:.3g} up to {end:.4g}: {lost:.0%} of its non-zero values become 0"


def _end(node: ir.Node) -> float | None:
    """The largest value that a QuantizeLinear with one constant scale holds."""
    tensor = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    if tensor is None or tensor.numpy().size != 1:
        return None
    top = float(ml_dtypes.finfo(_code(node).numpy()).max) if _code(node) in _FP8 else 127.0  # type: ignore[no-untyped-call]
    return float(tensor.numpy().astype(np.float64).reshape(-1)[0]) * top


def _code(node: ir.Node) -> ir.DataType:
    point = node.inputs[2] if len(node.inputs) > 2 else None
    return (point.dtype if point is not None else None) or node.outputs[0].dtype or ir.DataType.INT8
