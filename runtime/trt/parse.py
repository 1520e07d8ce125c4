"""ONNX file to TensorRT network, in the child process: what the parser refused, and what it should have refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from trtforge.runtime.errors import BuildError
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.trt.backend import Backend
from trtforge.runtime.trt.dtypes import dtype_name
from trtforge.runtime.trt.messages import readable

__all__ = ["NodeError", "allow_decomposition", "check_network", "network_specs", "node_errors"]


@dataclass(frozen=True, slots=True)
class NodeError:
    """One complaint of the parser.

    Attributes:
        operator: ONNX operator type; "" where no node is to blame.
        node: The node's name.
        unsupported: The operator as such is not there (rather than this use of it).
        text: Readable; "" where `unsupported` says it all.
        inside: The enclosing `If`, `Loop` and function nodes, outermost first.
    """

    operator: str
    node: str
    unsupported: bool
    text: str
    inside: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All attributes by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> NodeError:
        """The inverse of `to_json`."""
        return cls(**{**data, "inside": tuple(data["inside"])})


def node_errors(parser: Any) -> list[NodeError]:
    """Every error that an `OnnxParser` holds, the deepest nested node first, without repetition."""
    found: dict[NodeError, int] = {}
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        text = readable(error.desc())
        # The first line of a chain says only "Invalid Node - <name>"; the cause stands below it.
        lines = [line for line in text.splitlines() if not line.startswith("Invalid Node - ")]
        missing = "Plugin not found" in text or "plugin creator" in text
        # `desc()` of an operator that the parser lacks is just "false"; other unsupported uses say what they miss.
        unsupported = missing or (error.code().name == "UNSUPPORTED_NODE" and text in ("false", ""))
        unsupported = unsupported and bool(error.node_operator())
        item = NodeError(
            operator=error.node_operator(),
            node=error.node_name(),
            unsupported=unsupported,
            text="" if unsupported or text == "false" else "; ".join(lines),
            inside=tuple(error.local_function_stack()),
        )
        found.setdefault(item, number)
    return sorted(found, key=lambda item: (-len(item.inside), found[item]))


def check_network(trt: ModuleType, network: Any, backend: Backend, *, deciding: Collection[str] = ()) -> None:
    """Refuses networks that parse and then fail to build without a word of the reason.

    Args:
        trt: TensorRT's module.
        network: As it was parsed.
        backend: What parsed it.
        deciding: The inputs whose values have ranges in the profiles.

    Raises:
        BuildError: no outputs; an input whose values decide shapes and have no range, or the reverse; INT8 convolutions
            where there is no kernel.
    """
    if network.num_outputs == 0:
        raise BuildError(
            "the ONNX file holds no graph with outputs",
            why="TensorRT's parser takes nearly any bytes for an empty model",
            fix="export the model again",
        )
    for tensor in _tensors(network, "input"):
        if tensor.is_shape_tensor and tensor.name not in deciding:
            raise BuildError(
                f"the values of input {tensor.name!r} decide shapes inside the network, and have no ranges",
                why="an optimization profile has to hold them",
                fix=f"name the dimension that each value is: `inputs: {{{tensor.name}: {{values: [height, width]}}}}`, "
                "with their ranges under `dims`; or take the sizes from an input's shape",
            )
        if tensor.name in deciding and not tensor.is_shape_tensor:
            raise BuildError(
                f"the values of input {tensor.name!r} are given as dimensions, and decide no shape in the network",
                fix="give `values: [min, max]`, or leave them out",
            )
    if not backend.capabilities.int8_conv and (names := _int8_convolutions(trt, network)):
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise BuildError(
            f"{backend} has no INT8 convolutions; this network has {len(names)}: {shown}",
            why="TensorRT-RTX builds INT8 Conv from 1.7 on",
            fix="pip install --upgrade 'tensorrt-rtx>=1.7', or leave Conv out of the quantization, or use fp8",
        )


def allow_decomposition(trt: ModuleType, network: Any) -> None:
    """Lets the builder take attention apart where it has no fused kernel; where it has one, it is taken all the same.

    Without it RTX 1.7 fails to build: "CHECK(composite_op->is_decomposable()) failed". There are fused kernels for half
    types only, and not for every size of a head: BERT with heads of 8 fails in fp16 too.
    """
    if not hasattr(trt, "IAttentionInputLayer"):
        return
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # The bindings hand out the base class; NVIDIA's own samples reach the derived one in this way.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def network_specs(network: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs as TensorRT sees them; a dynamic dimension that ONNX does not name is called `name[axis]`."""
    return (
        tuple(_spec(tensor) for tensor in _tensors(network, "input")),
        tuple(_spec(tensor) for tensor in _tensors(network, "output")),
    )


def _tensors(network: Any, kind: str) -> Iterator[Any]:
    for number in range(getattr(network, f"num_{kind}s")):
        yield getattr(network, f"get_{kind}")(number)


def _spec(tensor: Any) -> TensorSpec:
    shape = tuple(
        size if size >= 0 else tensor.get_dimension_name(axis) or f"{tensor.name}[{axis}]"
        for axis, size in enumerate(tuple(tensor.shape))
    )
    return TensorSpec(tensor.name, dtype_name(tensor.dtype), shape)


def _int8_convolutions(trt: ModuleType, network: Any) -> list[str]:
    """Names of (de)convolutions, one of whose inputs a DequantizeLinear of INT8 makes."""
    dequantized, convolutions = set(), []
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == trt.LayerType.DEQUANTIZE and layer.get_input(0).dtype == trt.DataType.INT8:
            dequantized.add(layer.get_output(0).name)
        elif layer.type in (trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION):
            convolutions.append(layer)
    found = []
    for layer in convolutions:
        inputs = [layer.get_input(number) for number in range(layer.num_inputs)]
        if any(tensor is not None and tensor.name in dequantized for tensor in inputs):
            found.append(layer.name)
    return found
