"""The inputs of a graph from elsewhere: what its file says of them, what the user says, and the dimensions' names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from trtforge.converter.dims import fix_static, merge_profiles, rename_dims
from trtforge.runtime.errors import ConfigError, ExportError
from trtforge.runtime.graph import dtype_name
from trtforge.runtime.runner import Array
from trtforge.runtime.specs import DTYPES, InputSpec, Profile, ValueRange, is_dim_name
from trtforge.runtime.suggest import nearest

__all__ = ["complete_ranks", "forget_unknown_sizes", "match_inputs", "specs_from_call"]


def forget_unknown_sizes(proto: onnx.ModelProto) -> None:
    """Leaves each dimension open that has a negative size, or a name that is none."""
    for value in _described_values(proto.graph):
        for dim in _dims(value):
            if dim.dim_value < 0 or (dim.HasField("dim_param") and not is_dim_name(dim.dim_param)):
                dim.Clear()


def specs_from_call(
    proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int | str | None]], example: Any
) -> tuple[InputSpec, ...]:
    """Specs of the inputs that a Python caller says something of.

    Args:
        proto: The graph, unknown sizes forgotten.
        shapes: Sizes and dimension names by input name; None leaves an axis as the file has it, and where that is open,
            as the example.
        example: One call's inputs, tensors or arrays: one, a sequence in the graph's order, or a mapping by name; None:
            there is none. Integers are generated in the range that it shows.

    Raises:
        ConfigError: the graph has no such input, a rank or dtype is another, or an axis is open everywhere.
    """
    values = _inputs(proto)
    arrays = _name_arrays(example, list(values))
    for name in (*shapes, *arrays):
        if name not in values:
            raise ConfigError(f"the model has no input {name!r}", fix=nearest(name, values))
    return tuple(
        _spec_from_call(value, shapes.get(name), arrays.get(name))
        for name, value in values.items()
        if name in shapes or name in arrays
    )


def complete_ranks(proto: onnx.ModelProto, inputs: Iterable[InputSpec]) -> bool:
    """Gives inputs without a shape that of their spec (TensorRT would make scalars of them); whether there were any.

    Raises:
        ConfigError: one has no spec.
    """
    shapes = {spec.name: spec.shape for spec in inputs}
    lacking = [value for value in _inputs(proto).values() if value.type.HasField("tensor_type") and not _ranked(value)]
    for value in lacking:
        if value.name not in shapes:
            raise _no_rank(value.name)
        element = value.type.tensor_type.elem_type
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, element, shapes[value.name]))
    return bool(lacking)


def match_inputs(model: ir.Model, wanted: Sequence[InputSpec], profiles: Sequence[Profile]) -> tuple[InputSpec, ...]:
    """Gives the graph's inputs the shapes and dimension names that the user wants; a spec of each, in order.

    Raises:
        ConfigError: a spec that the graph has no input for or that does not fit it, an open axis without a name, a
            dimension without a range.
        ExportError: an axis has one size where a dynamic dimension was asked for, or a dtype that no engine takes.
    """
    values = {str(value.name): value for value in model.graph.inputs if not value.is_initializer()}
    for spec in wanted:
        if spec.name not in values:
            raise ConfigError(f"the model has no input {spec.name!r}", fix=nearest(spec.name, values))
    given = {spec.name: spec for spec in wanted}
    dims = merge_profiles(profiles)
    renamed: dict[str, str | int] = {}
    specs: list[InputSpec] = []
    for name, value in values.items():
        spec = _spec_of(value, given.get(name))
        for axis, (theirs, ours) in enumerate(zip(value.shape or spec.shape, spec.shape, strict=True)):
            _match_axis(name, axis, theirs, ours, renamed)
            if isinstance(ours, str) and ours not in dims:
                raise _no_range(name, axis, ours)
        for dim in sorted(spec.dims - set(dims) - set(spec.shape)):
            raise ConfigError(f"input {name!r}: the value {dim!r} has no range", fix="add it to `dims`")
        specs.append(spec)
    fixed = fix_static(specs, dims)
    rename_dims(model, renamed | {name: dim.max for name, dim in dims.items() if dim.min == dim.max})
    for spec in fixed:
        values[spec.name].shape = ir.Shape(spec.shape)
    return tuple(fixed)


def _described_values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    yield from (*graph.input, *graph.output, *graph.value_info)
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _described_values(body)


def _inputs(proto: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    weights = {tensor.name for tensor in proto.graph.initializer}
    return {value.name: value for value in proto.graph.input if value.name not in weights}


def _ranked(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.HasField("shape"))


def _dims(value: onnx.ValueInfoProto) -> Sequence[onnx.TensorShapeProto.Dimension]:
    return value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") and _ranked(value) else ()


def _name_arrays(example: Any, names: Sequence[str]) -> dict[str, Array]:
    if example is None:
        return {}
    if isinstance(example, Mapping):
        return {str(name): _array(value) for name, value in example.items()}
    values = example if isinstance(example, tuple | list) else (example,)
    if len(values) > len(names):
        raise ConfigError(
            f"example_inputs has {len(values)} values, and the model {len(names)} inputs",
            fix=f"give {', '.join(names)}",
        )
    return {name: _array(value) for name, value in zip(names, values, strict=False)}


def _array(value: Any) -> Array:
    import torch

    from trtforge.runtime.torch_runner import from_torch

    return from_torch(value) if isinstance(value, torch.Tensor) else np.asarray(value)


def _spec_from_call(
    value: onnx.ValueInfoProto, wanted: Sequence[int | str | None] | None, array: Array | None
) -> InputSpec:
    name = value.name
    dtype = dtype_name(ir.DataType(value.type.tensor_type.elem_type))
    if array is not None and array.dtype.name != dtype:
        raise ConfigError(f"input {name!r} is {dtype} in the model and {array.dtype.name} in its example")
    theirs = [_size_of(dim) for dim in _dims(value)] if _ranked(value) else None
    seen = None if array is None else list(array.shape)
    ranks = [len(sizes) for sizes in (theirs, wanted, seen) if sizes is not None]
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"input {name!r} has {ranks[0]} axes, {list(theirs or wanted or [])}, and is given "
            f"{ranks[-1]}: {list(seen or wanted or [])}"
        )
    shape: list[int | str] = []
    for axis in range(ranks[0]):
        asked, own = (wanted or {axis: None})[axis], None if theirs is None else theirs[axis]
        size = asked if asked is not None else own if own is not None else None if seen is None else seen[axis]
        if size is None:
            raise _no_rank(name) if theirs is None else _no_name(name, axis)
        shape.append(size)
    return InputSpec(name, dtype, tuple(shape), None if array is None else _seen_values(array))


def _size_of(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None


def _seen_values(array: Array) -> ValueRange | None:
    if array.size == 0 or array.dtype.kind not in "iub":
        return None
    return ValueRange(int(array.min()), int(array.max()))


def _spec_of(value: ir.Value, given: InputSpec | None) -> InputSpec:
    name, dtype = str(value.name), dtype_name(value.dtype)
    if dtype not in DTYPES:
        raise ExportError(f"input {name!r} is {dtype}", why=f"an engine takes {', '.join(DTYPES)}")
    if given is not None:
        if given.dtype != dtype:
            raise ConfigError(f"input {name!r} is {dtype} in the model and {given.dtype} under `inputs`")
        if value.shape is not None and len(value.shape) != len(given.shape):
            raise ConfigError(
                f"input {name!r} has {len(value.shape)} axes in the model, {list(given.shape)} under `inputs`"
            )
        return given
    shape: list[int | str] = []
    for axis, dim in enumerate(value.shape or ()):
        if isinstance(dim, ir.SymbolicDim) and dim.value is None:
            raise _no_name(name, axis)
        shape.append(dim if isinstance(dim, int) else str(dim.value))
    return InputSpec(name, dtype, tuple(shape))


def _match_axis(name: str, axis: int, theirs: object, ours: int | str, renamed: dict[str, str | int]) -> None:
    if isinstance(theirs, int):
        if isinstance(ours, str):
            raise ExportError(
                f"dimension {ours!r} froze at {theirs}: axis {axis} of input {name!r} has that size in the file",
                fix=f"export the model again with a dynamic axis, or write {theirs} in place of {ours!r}",
            )
        if theirs != ours:
            raise ConfigError(f"input {name!r}: axis {axis} is {theirs} in the model and {ours} under `inputs`")
        return
    symbol = theirs.value if isinstance(theirs, ir.SymbolicDim) else None
    if symbol is None:
        return
    if renamed.setdefault(str(symbol), ours) != ours:
        raise ConfigError(
            f"input {name!r}: axis {axis} is called {ours!r}, and the model's {str(symbol)!r}, which it is, elsewhere "
            f"{renamed[str(symbol)]!r}",
            fix="give the dimension one name wherever it occurs",
        )


def _no_rank(name: str) -> ConfigError:
    return ConfigError(
        f"input {name!r} has no rank in the file", fix=f"give `{name}` a `shape` of sizes and names under `inputs`"
    )


def _no_name(name: str, axis: int) -> ConfigError:
    return ConfigError(
        f"input {name!r}: axis {axis} is dynamic and has no name in the file",
        fix=f"give `{name}` a `shape` under `inputs`, with a name that `dims` has a range for",
    )


def _no_range(name: str, axis: int, dim: str) -> ConfigError:
    usable = dim.isidentifier()  # `DynamicDimension.0`, as paddle2onnx calls it, is none
    return ConfigError(
        f"input {name!r}: dimension {dim!r} (axis {axis}) has no range",
        fix=f"add `{dim}: [min, opt, max]` to `dims`, or give the input a `shape` without it"
        if usable
        else f"give `{name}` a `shape` under `inputs` that names it with letters and digits, and that name a range "
        "under `dims`; or a size",
    )
