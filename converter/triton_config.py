"""The text of Triton's `config.pbtxt` for one model.

Field names and types are those of `ModelConfig` in Triton's `model_config.proto`; tests parse the text with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.specs import DimRange, Profile, TensorSpec, resolve_shape

__all__ = ["TritonModel", "find_batch_dim", "render_config"]

_TYPES: Mapping[str, str] = {
    "float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "float64": "FP64", "int8": "INT8", "uint8": "UINT8",
    "int32": "INT32", "int64": "INT64", "bool": "BOOL",
}  # fmt: skip
_FLOATS = frozenset({"float32", "float16", "bfloat16", "float64"})


@dataclass(frozen=True, slots=True)
class TritonModel:
    """What a model repository says of a model.

    Attributes:
        name: The model's name, and its folder's.
        backend: Triton's: "tensorrt" or "onnxruntime".
        file: The model's file in a version's folder.
        inputs, outputs: As the engine sees them.
        profiles: Optimization profiles, in the engine's order.
        batch: The dimension along which requests may be joined; None: requests run one by one.
        parameters: Free text by key, for people and tools.
    """

    name: str
    backend: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    batch: str | None
    parameters: Mapping[str, str]


def find_batch_dim(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], profiles: Sequence[Profile]
) -> str | None:
    """The dynamic dimension that is the first of every input and output and stands nowhere else; None without one.

    Triton sends every batch from 1 to `max_batch_size`, so that one whose smallest size is above 1, or which profiles
    leave gaps in, is none. That rows do not depend on each other, shapes alone cannot tell.
    """
    tensors = [*inputs, *outputs]
    firsts = {spec.shape[0] if spec.shape else None for spec in tensors}
    name = next(iter(firsts)) if len(firsts) == 1 else None
    if not isinstance(name, str) or any(name in spec.shape[1:] for spec in tensors):
        return None
    ranges = [profile[name] for profile in profiles if name in profile]
    return name if ranges and _without_gaps(ranges) else None


def render_config(model: TritonModel) -> str:
    """The text of `config.pbtxt`.

    Raises:
        ArtifactError: a tensor's dtype is none of Triton's.
    """
    ranges = [profile[model.batch] for profile in model.profiles] if model.batch is not None else []
    largest = max((sizes.max for sizes in ranges), default=0)
    blocks = [
        f"name: {_quoted(model.name)}",
        f"backend: {_quoted(model.backend)}",
        f"default_model_filename: {_quoted(model.file)}",
        f"max_batch_size: {largest}",
        *(_tensor("input", spec, model.batch) for spec in model.inputs),
        *(_tensor("output", spec, model.batch) for spec in model.outputs),
        _instances(model),
    ]
    if ranges:
        preferred = sorted({sizes.opt for sizes in ranges} | {largest})
        blocks.append(_block("dynamic_batching", [f"preferred_batch_size: {_list(preferred)}"]))
    blocks += _warm_ups(model)
    blocks += [
        _block("parameters", [f"key: {_quoted(key)}", _block("value", [f"string_value: {_quoted(value)}"])])
        for key, value in sorted(model.parameters.items())
    ]
    return "\n".join(blocks) + "\n"


def _without_gaps(ranges: Iterable[DimRange]) -> bool:
    reached = 0
    for sizes in sorted(ranges, key=lambda sizes: sizes.min):
        if sizes.min > reached + 1:
            return False
        reached = max(reached, sizes.max)
    return True


def _tensor(field: str, spec: TensorSpec, batch: str | None) -> str:
    shape = spec.shape if batch is None else spec.shape[1:]
    dims = [size if isinstance(size, int) else -1 for size in shape]
    lines = [f"name: {_quoted(spec.name)}", f"data_type: {_type(spec)}", f"dims: {_list(dims or [1])}"]
    if not dims:  # Triton's dims are never empty: a tensor without any is declared as [1], and reshaped
        lines.append("reshape { shape: [ ] }")
    return _block(field, lines)


def _instances(model: TritonModel) -> str:
    lines = ["count: 1", "kind: KIND_GPU"]
    if model.backend == "tensorrt":  # onnxruntime has no profiles, and Triton refuses them elsewhere
        lines.append("profile: [ " + ", ".join(_quoted(str(number)) for number in range(len(model.profiles))) + " ]")
    return _block("instance_group", lines)


def _warm_ups(model: TritonModel) -> list[str]:
    """One request at each profile's opt, so that no client waits for a first run."""
    blocks = []
    for number, profile in enumerate(model.profiles):
        sizes = {name: dim.opt for name, dim in profile.items()}
        lines = [
            f"name: {_quoted(f'opt of profile {number}')}",
            f"batch_size: {1 if model.batch is None else sizes[model.batch]}",
        ]
        for spec in model.inputs:
            shape = resolve_shape(spec.shape, sizes)
            dims = list(shape if model.batch is None else shape[1:])
            # Zeros for integers: any other might be no valid index.
            data = "random_data: true" if spec.dtype in _FLOATS else "zero_data: true"
            value = _block("value", [f"data_type: {_type(spec)}", f"dims: {_list(dims or [1])}", data])
            lines.append(_block("inputs", [f"key: {_quoted(spec.name)}", value]))
        blocks.append(_block("model_warmup", lines))
    return blocks


def _type(spec: TensorSpec) -> str:
    if spec.dtype not in _TYPES:
        raise ArtifactError(
            f"{spec.name!r} is {spec.dtype}, which Triton has no type for",
            fix="cast it inside the model, and convert again",
        )
    return f"TYPE_{_TYPES[spec.dtype]}"


def _block(field: str, lines: Sequence[str]) -> str:
    inner = "\n".join(f"  {line}" for block in lines for line in block.split("\n"))
    return f"{field} {{\n{inner}\n}}"


def _list(numbers: Sequence[int]) -> str:
    return "[ " + ", ".join(map(str, numbers)) + " ]"


def _quoted(text: str) -> str:
    """A string of protobuf's text format: bytes outside printable ASCII as octal escapes of UTF-8."""
    escaped = "".join(
        f"\\{chr(byte)}" if byte in b'"\\' else chr(byte) if 0x20 <= byte < 0x7F else f"\\{byte:03o}"
        for byte in text.encode()
    )
    return f'"{escaped}"'
