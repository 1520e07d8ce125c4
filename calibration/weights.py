"""Constant weights: folding what stands between an initializer and its consumer, and their scales and codes.

Weights are quantized symmetrically, per output channel where the operator has one, by the largest |w| of each channel.
A scale of least squared error for each channel gained nothing: with int8 weights and float activations the SQNR of
EfficientNet-Lite0 is 17.0 dB with it and 17.1 without (activations alone give 14.9; MiniLM 30.8 and 14.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from trtforge.calibration.ranges import CODE_MAX, QuantFormat, quant_scale
from trtforge.runtime.errors import CalibrationError

__all__ = [
    "FittedWeight",
    "channel_axis",
    "constant_array",
    "constant_shape",
    "fit_scale",
    "fit_scales",
    "is_constant",
    "quantize_weight",
]

Floats = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class FittedWeight:
    """A weight as it is stored: codes of its shape, and float32 scales of shape `(channels,)` or `()`."""

    codes: Floats
    scales: Floats


_PASS_THROUGH = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""What frameworks put between an initializer and its consumer: layouts (TensorFlow, Paddle) and precision casts."""


def channel_axis(node: ir.Node, index: int, rank: int) -> int | None:
    """The axis of a constant input along which each slice makes output channels of its own; None for one scale.

    ConvTranspose stores (in, out / group, …): with groups, one scale serves the same position of every group.

    Args:
        node: A Conv, ConvTranspose, Gemm or MatMul.
        index: Which of its inputs the weight is.
        rank: The rank of that input.
    """
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        if index == 0:
            return 1 if _int_attribute(node, "transA") else 0
        return 0 if _int_attribute(node, "transB") else 1
    if rank < 2:
        return None
    return rank - 1 if index == 1 else rank - 2


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer or a Constant, directly or behind layout changes and casts."""
    while value is not None:
        if value.const_value is not None:
            return True
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type == "Constant":
            return True
        if node.op_type not in _PASS_THROUGH or not all(is_constant(extra) for extra in node.inputs[1:]):
            return False
        value = node.inputs[0]
    return False


def constant_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of a value for which `is_constant` holds."""
    shape = value.shape
    if shape is not None and all(isinstance(dim, int) for dim in shape):
        return tuple(int(dim) for dim in shape)  # type: ignore[arg-type]  # `all` above has seen only ints
    return tuple(constant_array(value).shape)


def constant_array(value: ir.Value) -> Floats:
    """What a value for which `is_constant` holds, evaluates to."""
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    assert node is not None, value.name
    if node.op_type == "Constant":
        return _constant_node(node)
    source = node.inputs[0]
    assert source is not None
    array = constant_array(source)
    if node.op_type == "Transpose":
        perm = node.attributes.get("perm")
        return np.transpose(array, tuple(perm.as_ints()) if perm is not None else None)
    if node.op_type == "Cast":
        return array.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    if node.op_type == "Identity":
        return array
    return _reshape(node, array)


def _constant_node(node: ir.Node) -> Floats:
    (name, attribute), *_ = node.attributes.items()
    if name == "value":
        return np.asarray(attribute.as_tensor().numpy())
    return np.asarray(attribute.value, dtype=np.int64 if "int" in name else np.float32)


def _reshape(node: ir.Node, array: Floats) -> Floats:
    if node.op_type == "Flatten":
        axis = _int_attribute(node, "axis", 1)
        axis += array.ndim if axis < 0 else 0
        return array.reshape(int(np.prod(array.shape[:axis], dtype=np.int64)), -1)
    if node.op_type == "Reshape":
        wanted = [int(size) for size in _second_input(node, "shape")]
        if not _int_attribute(node, "allowzero"):
            wanted = [array.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
        return array.reshape(wanted)
    axes = [int(axis) for axis in _second_input(node, "axes")]
    if node.op_type == "Squeeze":
        return np.squeeze(array, axis=tuple(axes) if axes else None)
    rank = array.ndim + len(axes)
    return np.expand_dims(array, tuple(axis % rank for axis in axes))


def _second_input(node: ir.Node, attribute: str) -> list[int]:
    """Shape or axes: an input in newer operator sets, an attribute in older ones, [] where neither is given."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return [int(size) for size in constant_array(node.inputs[1]).reshape(-1)]
    found = node.attributes.get(attribute)
    return list(found.as_ints()) if found is not None else []


def _int_attribute(node: ir.Node, name: str, default: int = 0) -> int:
    found = node.attributes.get(name)
    return default if found is None else int(found.as_int())


def fit_scale(scale: float, format: QuantFormat, dtype: ir.DataType) -> float:
    """The scale as a graph of type `dtype` can hold it: rounded, never 0 or infinite.

    The scale has the tensor's type: RTX 1.7 refuses one of float32 for FP8 on a float16 tensor ("type mismatch between
    matmul operand scales"). float16 reaches from 2^-24 to 65504: a smaller scale becomes 2^-24, and a larger one the
    largest whose codes stay finite, which loses nothing, since the tensor itself ends at 65504.
    """
    if dtype == ir.DataType.FLOAT16:
        largest = float(np.nextafter(np.float16(65504 / CODE_MAX[format]), np.float16(0)))
        return min(max(float(np.float16(min(scale, 65504.0))), 2.0**-24), largest)
    if dtype == ir.DataType.BFLOAT16:
        return float(ml_dtypes.bfloat16(scale))
    return float(np.float32(scale))


def fit_scales(scales: Floats, format: QuantFormat, dtype: ir.DataType) -> Floats:
    """`fit_scale` of each; float32 of the same shape."""
    fitted = [fit_scale(float(scale), format, dtype) for scale in np.ravel(scales)]
    return np.array(fitted, dtype=np.float32).reshape(np.shape(scales))


def quantize_weight(
    name: str, weight: Floats, axis: int | None, format: QuantFormat, dtype: ir.DataType
) -> tuple[Floats, Floats]:
    """Codes and scales of a weight.

    Args:
        name: For the error.
        weight: Any float type and rank.
        axis: One scale for each index along it; None for one scale in all.
        format: "int8" or "fp8".
        dtype: The float type of the graph; the weight is divided by the scale as that type holds it.

    Returns:
        Codes (int8 in -127…127, or float8_e4m3fn) of the weight's shape, and float32 scales of shape `(channels,)` or
        `()`, each exact in `dtype`. A channel of zeros has scale 1.

    Raises:
        CalibrationError: a value that is infinite or NaN.
    """
    values = np.asarray(weight, dtype=np.float32)
    if not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        raise CalibrationError(
            f"weight {name!r} has {bad} of {values.size} values that are infinite or NaN",
            why="such a value has no code, and the range of its channel would be infinite",
            fix="repair the checkpoint, or leave its layer in float by a rule of the plan",
        )
    others = tuple(i for i in range(values.ndim) if i != axis) if axis is not None else None
    amax = np.max(np.abs(values), axis=others, initial=0.0)
    exact = np.array([quant_scale(float(peak), format) for peak in np.ravel(amax)]).reshape(np.shape(amax))
    scales = fit_scales(exact, format, dtype)
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    # Both divided and rounded as QuantizeLinear does: in float32, half to even.
    quotient = values / (scales.reshape(shape) if axis is not None else scales)
    limit = CODE_MAX[format]
    clipped = np.clip(quotient, -limit, limit)
    if format == "int8":
        return np.rint(clipped).astype(np.int8), scales
    return clipped.astype(ml_dtypes.float8_e4m3fn), scales
