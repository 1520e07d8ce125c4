"""Models that carry Q/DQ already (QAT, ModelOpt, onnxruntime's quantizer): checked against what TensorRT takes.

They are respected: nothing is calibrated or placed on top. What is wrong is named here, before the parser says "false".
Check again once floats have been cast: a scale may be 0 in float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trtforge.calibration.qdq import ORIGIN
from trtforge.calibration.weights import Floats, channel_axis, constant_array, constant_shape, is_constant
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.graph import META_ORIGIN, all_graphs

__all__ = ["ExistingQdq", "Problem", "check_existing", "fold_bias_codes", "inspect_existing"]

_ALLOWED = {ir.DataType.INT8: "int8", ir.DataType.FLOAT8E4M3FN: "fp8", ir.DataType.INT4: "int4"}
_ROUNDING_OPERATORS = frozenset(
    {"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear"}
)
_READS_WEIGHTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_DOMAINS = ("", "ai.onnx", "com.microsoft")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that TensorRT would refuse: the node, what it has, and what to do."""

    node: str
    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class ExistingQdq:
    """The Q/DQ that a model carries.

    Attributes:
        pairs: QuantizeLinear nodes on activations.
        weights: DequantizeLinear nodes on stored codes, and Q/DQ pairs on constants.
        formats: Formats in use, sorted: "int8", "fp8", "int4".
        ours: Whether all of it was inserted by `insert_qdq`.
        problems: What TensorRT would refuse.
    """

    pairs: int
    weights: int
    formats: tuple[str, ...]
    ours: bool
    problems: tuple[Problem, ...]


def inspect_existing(model: ir.Model) -> ExistingQdq | None:
    """What quantization the model carries; None for a float model. Integer operators count as such."""
    nodes = [node for graph in all_graphs(model) for node in graph if node.domain in _DOMAINS]
    quantize = [node for node in nodes if node.op_type == "QuantizeLinear"]
    dequantize = [node for node in nodes if node.op_type == "DequantizeLinear"]
    integer = [node for node in nodes if node.op_type in _ROUNDING_OPERATORS]
    if not quantize and not dequantize and not integer:
        return None
    problems = [problem for node in (*quantize, *dequantize) for problem in _problems(node)]
    problems += [
        Problem(
            node.name or node.op_type,
            f"{node.op_type} computes on integers, which TensorRT does not take",
            "quantize the float model again with QuantizeLinear/DequantizeLinear pairs (QuantFormat.QDQ)",
        )
        for node in integer
    ]
    on_constants = sum(is_constant(node.inputs[0]) for node in quantize)
    stored = sum(is_constant(node.inputs[0]) for node in dequantize)
    formats = {_ALLOWED[dtype] for node in dequantize if (dtype := _code_type(node)) in _ALLOWED and dtype is not None}
    ours = all(node.metadata_props.get(META_ORIGIN) == ORIGIN for node in (*quantize, *dequantize)) and not integer
    return ExistingQdq(
        len(quantize) - on_constants, stored + on_constants, tuple(sorted(formats)), ours, tuple(problems)
    )


def check_existing(model: ir.Model) -> ExistingQdq | None:
    """`inspect_existing`, and an error where TensorRT would refuse what it finds.

    Raises:
        CalibrationError: with the first problems, and how to mend the first.
    """
    found = inspect_existing(model)
    if found is not None and found.problems:
        shown = "\n    ".join(f"{problem.node}: {problem.what}" for problem in found.problems[:5])
        raise CalibrationError(
            f"the model's own quantization breaks {len(found.problems)} of TensorRT's rules:\n    {shown}",
            why="TensorRT takes symmetric int8 and FP8 E4M3: zero points of 0, finite scales above 0, one scale for an"
            " activation, and one or one for each output channel for a weight",
            fix=found.problems[0].fix,
        )
    return found


def fold_bias_codes(model: ir.Model) -> int:
    """Turns int32 biases behind a DequantizeLinear into float initializers, in place; the number of them.

    onnxruntime's quantizer writes them and TensorRT's parser refuses them. The product of code and scale is the same,
    but that a code above 2^24 is rounded to float32, as DequantizeLinear does.
    """
    folded = 0
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        source, output = node.inputs[0], node.outputs[0]
        if _code_type(node) != ir.DataType.INT32 or not is_constant(source) or output.is_graph_output():
            continue
        scale = node.inputs[1]
        if source is None or scale is None or not is_constant(scale) or not _zero_point_is_zero(node):
            continue
        codes, scales = constant_array(source), constant_array(scale)
        if scales.ndim > 1:  # a scale for each block
            continue
        if scales.size > 1:
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
            lengths = [1] * codes.ndim
            lengths[axis if codes.ndim > 1 else 0] = scales.size
            scales = scales.reshape(lengths)
        array = (codes.astype(np.float32) * scales.astype(np.float32)).astype(scales.dtype)
        value = ir.Value(
            name=output.name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.Tensor(array, name=output.name),
        )
        output.replace_all_uses_with(value)
        before = tuple(node.inputs)
        model.graph.remove(node, safe=True)
        model.graph.register_initializer(value)
        for left in before:
            if left is not None and left.name and left.name in model.graph.initializers and not left.uses():
                del model.graph.initializers[left.name]
        folded += 1
    return folded


def _problems(node: ir.Node) -> Iterator[Problem]:
    name = node.name or node.outputs[0].name or node.op_type
    dtype = _code_type(node)
    if dtype is None or dtype not in _ALLOWED:
        shown = "an unknown type" if dtype is None else dtype.name.lower()
        fix = _FIX_TYPE.get(dtype, _QUANTIZE_AGAIN) if dtype is not None else _QUANTIZE_AGAIN
        yield Problem(name, f"its codes are {shown}, not int8 or float8_e4m3fn", fix)
        return
    if not _zero_point_is_zero(node):
        yield Problem(name, "its zero point is not a constant 0", "quantize symmetrically (ActivationSymmetric: True)")
    scale = node.inputs[1]
    if scale is None or not is_constant(scale):
        yield Problem(name, "its scale is computed at run time", "export it as a constant: freeze the observers first")
        return
    scales = constant_array(scale).astype(np.float64)
    bad = ~(np.isfinite(scales) & (scales > 0))
    if bad.any():
        first = scales.reshape(-1)[int(np.argmax(bad.reshape(-1)))]
        what = f"{int(bad.sum())} of its {scales.size} scales are not finite and above 0, such as {first:g}"
        yield Problem(name, what, "quantize again: a channel or tensor of zeros needs a scale above 0")
    if scales.size > 1 and dtype != ir.DataType.INT4:
        yield from _axis_problems(node, name, scales)


_QUANTIZE_AGAIN = "quantize the float model again: `trtforge calibrate` makes symmetric int8 or FP8"
_FIX_TYPE = {
    ir.DataType.UINT8: "quantize to int8 with a zero point of 0 (activation_type=QuantType.QInt8)",
    ir.DataType.INT32: "keep biases in float, or fold them: fold_bias_codes does so exactly",
    ir.DataType.FLOAT8E5M2: "use float8_e4m3fn: TensorRT has no E5M2",
}


def _axis_problems(node: ir.Node, name: str, scales: Floats) -> Iterator[Problem]:
    source = node.inputs[0]
    weight = _weight_behind(source)
    if weight is None:
        yield Problem(name, f"an activation has {scales.size} scales", "use one scale for each activation")
        return
    rank = len(constant_shape(weight))
    attribute = node.attributes.get("axis")
    axis = (1 if attribute is None else attribute.as_int()) % rank
    for reader, index in node.outputs[0].uses():
        if reader.op_type in _READS_WEIGHTS and index < 2 and (wanted := channel_axis(reader, index, rank)) != axis:
            what = f"its {scales.size} scales lie along axis {axis}, and {reader.op_type} {reader.name} needs {wanted}"
            yield Problem(name, what, "quantize weights along their output channels")


def _weight_behind(value: ir.Value | None) -> ir.Value | None:
    """The constant that a Q or DQ of a weight reads, through the Q that may stand between; None for an activation."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "QuantizeLinear":
        value = node.inputs[0]
    return value if is_constant(value) else None


def _code_type(node: ir.Node) -> ir.DataType | None:
    """The type of the codes that a QuantizeLinear writes or a DequantizeLinear reads."""
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is not None and zero_point.dtype is not None:
        return zero_point.dtype
    if node.op_type == "DequantizeLinear":
        source = node.inputs[0]
        before = source.producer() if source is not None else None
        if before is not None and before.op_type == "QuantizeLinear":
            return _code_type(before)
        return source.dtype if source is not None else None
    wanted = node.attributes.get("output_dtype")
    # ONNX: a QuantizeLinear without zero point or output_dtype makes uint8.
    return ir.DataType(wanted.as_int()) if wanted is not None and wanted.as_int() else ir.DataType.UINT8


def _zero_point_is_zero(node: ir.Node) -> bool:
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is None:
        return True
    return is_constant(zero_point) and not np.any(constant_array(zero_point).astype(np.float32))
