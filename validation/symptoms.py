"""What kind of error a piece of a graph makes: overflow, underflow, clipping, rounding, cancellation, another graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trtforge.runtime.runner import Array, Tensors
from trtforge.validation.bisect import Piece, Run, noise_of
from trtforge.validation.cuts import main_values
from trtforge.validation.kinds import Symptom, decibels
from trtforge.validation.metrics import is_float
from trtforge.validation.quantized import find_quantization

__all__ = ["find_symptom"]

_LOW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_GROWTH = 100.0
"""Noise-to-signal ratios: a node whose result has 20 dB less than its rounded inputs cancels."""


def find_symptom(piece: Piece, run: Run) -> Symptom:
    """Names the kind of a piece's own error from what it was fed, should give and gave; `run` is the candidate's."""
    return (
        _overflow(piece)
        or find_quantization(piece, run)
        or _underflow(piece)
        or _cancellation(piece)
        or Symptom("rounding", f"fed the reference's tensors it gives {decibels(piece.own)}")
    )


def _overflow(piece: Piece) -> Symptom | None:
    values = main_values(piece.model)
    for what, samples in (("input", piece.inputs), ("output", piece.expected)):
        for name, worst in _largest(samples).items():
            dtype = _stored(values[name])
            if dtype in _LOW and worst > (limit := float(ml_dtypes.finfo(dtype.numpy()).max)):  # type: ignore[no-untyped-call]
                return Symptom(
                    "overflow", f"its {what} {name} reaches {worst:.6g}, {_short(dtype)} ends at {limit:.6g}"
                )
    broken = sum(int(np.count_nonzero(~np.isfinite(a.astype(np.float64)))) for s in piece.got for a in _floats(s))
    right = sum(int(np.count_nonzero(~np.isfinite(a.astype(np.float64)))) for s in piece.expected for a in _floats(s))
    if broken > right:
        return Symptom("overflow", f"it gives {broken - right} NaN or Inf where the reference has numbers")
    return None


def _underflow(piece: Piece) -> Symptom | None:
    values = main_values(piece.model)
    for what, samples in (("input", piece.inputs), ("output", piece.expected)):
        for name, worst in _largest(samples).items():
            if _stored(values[name]) == ir.DataType.FLOAT16 and 0 < worst < 2.0**-14:
                text = f"its {what} {name} is at most {worst:.3g}, fp16 loses digits below {2.0**-14:.3g}"
                return Symptom("underflow", text)
    return None


def _cancellation(piece: Piece) -> Symptom | None:
    values = main_values(piece.model)
    rounded = [
        {name: _round_to(array, _stored(values[name])) for name, array in sample.items()} for sample in piece.inputs
    ]
    fed = noise_of(
        [{n: a for n, a in s.items() if is_float(a)} for s in piece.inputs],
        [{n: a for n, a in s.items() if is_float(a)} for s in rounded],
    )
    if not fed or piece.own < _GROWTH * fed:
        return None
    return Symptom(
        "cancellation",
        f"its inputs have {decibels(fed)} after rounding, its result {decibels(piece.own)}: what is large in them "
        "cancels, and their rounding stays",
    )


def _stored(value: ir.Value) -> ir.DataType | None:
    """The half type that a tensor passes through: its own, or that of an inserted cast right before or behind it."""
    if value.dtype in _LOW:
        return value.dtype
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        return producer.inputs[0].dtype
    behind = {user.outputs[0].dtype for user, _ in value.uses() if user.op_type == "Cast"}
    return behind.pop() if len(behind) == len(value.uses()) == 1 else value.dtype


def _round_to(array: Array, dtype: ir.DataType | None) -> Array:
    if dtype not in _LOW or not is_float(array):
        return array
    with np.errstate(over="ignore"):
        return array.astype(dtype.numpy()).astype(array.dtype)


def _largest(samples: Sequence[Tensors]) -> Mapping[str, float]:
    worst: dict[str, float] = {}
    for sample in samples:
        for name, array in sample.items():
            if is_float(array) and array.size:
                finite = array[np.isfinite(array.astype(np.float64))]
                worst[name] = max(worst.get(name, 0.0), float(np.abs(finite).max(initial=0.0)))
    return worst


def _floats(sample: Tensors) -> Iterator[Array]:
    return (array for array in sample.values() if is_float(array))


def _short(dtype: ir.DataType | None) -> str:
    return {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}.get(dtype, "float32") if dtype else "float32"
