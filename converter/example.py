"""The example call that an export runs on: made from specs (YAML), or from what the user passed (Python)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trtforge.converter.caches import make_cache
from trtforge.converter.dims import fix_static, merge_profiles
from trtforge.converter.signature import ExampleInputs, bind_call, forward_signature, tensor_leaves
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.inputs import make_inputs
from trtforge.runtime.specs import DTYPES, DimRange, InputSpec, Profile, ValueRange
from trtforge.runtime.suggest import nearest
from trtforge.runtime.torch_runner import to_torch

__all__ = ["example_from_inputs", "example_from_specs"]

ShapeLike = Sequence[int | str | None]
"""Sizes and dimension names; None leaves an axis as the example has it."""

_SEED = 0


def example_from_specs(
    module: torch.nn.Module, specs: Sequence[InputSpec], profiles: Sequence[Profile] = ()
) -> ExampleInputs:
    """A call with generated tensors, each dynamic dimension at a size of 2 or more (torch.export freezes 0 and 1).

    Args:
        module: Its `forward`'s parameters are what the specs' names refer to; below a parameter a dot leads to a key of
            a dict (`batch.ids`) or, where it is a number, to a position of a tuple (`pair.0`).
        specs: The inputs; a dimension whose profiles say `min == max` becomes that size.
        profiles: Ranges of the named dimensions.

    Raises:
        ConfigError: a name that `forward` has no parameter for, a required parameter without a spec, or a dimension
            without a range.
    """
    dims = merge_profiles(profiles)
    fixed = fix_static(specs, dims)
    arrays = make_inputs(fixed, _example_sizes(dims), _SEED)
    device = _device(module)
    tree: dict[str, Any] = {}
    for spec in fixed:
        _place(tree, spec.name.split("."), to_torch(arrays[spec.name]).to(device), spec.name)
    _check_parameters(module, tree)
    arguments = {name: _tuples(value) for name, value in tree.items()}
    if _is_from_transformers(module):  # `past_key_values`, `cache` in later releases
        arguments = {name: make_cache(value) if type(value) is dict else value for name, value in arguments.items()}
    kinds = {name: p.kind for name, p in forward_signature(module).parameters.items()}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, value in arguments.items():
        if kinds.get(name) is inspect.Parameter.VAR_POSITIONAL:
            args.extend(value if isinstance(value, tuple) else (value,))
        elif kinds.get(name) is inspect.Parameter.POSITIONAL_ONLY:
            args.append(value)
        else:
            kwargs[name] = value
    by_name = {spec.name: spec for spec in fixed}
    names = bind_call(module, args, kwargs)
    return ExampleInputs(tuple(args), kwargs, tuple(by_name[name] for name in names))


def example_from_inputs(
    module: torch.nn.Module,
    inputs: Any,
    *,
    profiles: Sequence[Profile] = (),
    shapes: Mapping[str, ShapeLike] | None = None,
) -> ExampleInputs:
    """A call with the user's own tensors; a dynamic dimension of size 1 is doubled (torch.export freezes 0 and 1).

    Args:
        module: What will be called.
        inputs: A tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        profiles: Ranges of the named dimensions.
        shapes: Sizes and dimension names by flat name; inputs left out are static.

    Returns:
        Specs carry the values that may be generated: for integers and bool the range seen in the example.

    Raises:
        ConfigError: `forward` does not take the inputs; a shape that fits no input, or not its example; a dimension
            without a range, or whose range the example is outside of.
    """
    kwargs: dict[str, Any] = dict(inputs) if isinstance(inputs, Mapping) else {}
    args: Sequence[Any] = inputs if type(inputs) in (tuple, list) else (inputs,)
    args = () if isinstance(inputs, Mapping) else args
    names = bind_call(module, args, kwargs)
    device = _device(module)
    tensors = [tensor.detach().to(device) for _, tensor in tensor_leaves((tuple(args), kwargs))]
    shapes = dict(shapes or {})
    dims = merge_profiles(profiles)
    for name in shapes:
        if name not in names:
            raise ConfigError(f"shape given for {name!r}, which is not an input", fix=nearest(name, names))
    specs = tuple(_spec_of(name, tensor, shapes.get(name), dims) for name, tensor in zip(names, tensors, strict=True))
    used = {dim for spec in specs for dim in spec.shape if isinstance(dim, str)}
    for name, dim in dims.items():
        if name not in used and dim.min != dim.max:
            raise ConfigError(
                f"dimension {name!r} is in no input's shape",
                fix=f'name it where it belongs, as in inputs={{"{names[0] if names else "x"}": ("{name}", …)}}',
            )
    _check_shared_sizes(specs, tensors)
    grown = [_grow(tensor, spec) for tensor, spec in zip(tensors, specs, strict=True)]
    call = ExampleInputs(tuple(args), kwargs, specs)
    new_args, new_kwargs = call.bind(grown)
    return ExampleInputs(new_args, new_kwargs, specs)


def _example_sizes(dims: Mapping[str, DimRange]) -> dict[str, int]:
    # Dimensions of one size look related to whoever reads the captured graph: give each its own where ranges allow.
    sizes: dict[str, int] = {}
    for name, dim in dims.items():
        wanted = max(dim.opt, 2)
        free = (size for size in [*range(wanted, dim.max + 1), *range(wanted, max(dim.min, 2) - 1, -1)])
        sizes[name] = next((size for size in free if size not in sizes.values()), min(wanted, dim.max))
    return sizes


def _device(module: torch.nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _place(tree: dict[str, Any], path: list[str], tensor: torch.Tensor, name: str) -> None:
    *parents, last = path
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"input {name!r} is below an input that is itself a tensor")
    if last in tree:
        raise ConfigError(f"input {name!r} is given twice, or has inputs below it")
    tree[last] = tensor


def _tuples(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if all(key.isdigit() for key in value):
        return tuple(_tuples(value[key]) for key in sorted(value, key=int))
    return {key: _tuples(child) for key, child in value.items()}


def _is_from_transformers(module: torch.nn.Module) -> bool:
    return any(kind.__module__.startswith("transformers.") for kind in type(module).__mro__)


def _check_parameters(module: torch.nn.Module, tree: Mapping[str, Any]) -> None:
    parameters = forward_signature(module).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    what = f"{type(module).__name__}.forward"
    known = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for name in tree:
        if name not in known and not open_ended:
            raise ConfigError(f"{what} has no parameter {name!r}", fix=nearest(name, known))
    fixed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and parameter.kind not in fixed and name not in tree:
            raise ConfigError(
                f"{what} requires {name!r}, and no input of that name is given",
                why=f"inputs: {', '.join(tree) or 'none'}",
                fix=f"describe {name!r} under `inputs`",
            )


def _spec_of(name: str, tensor: torch.Tensor, shape: ShapeLike | None, dims: Mapping[str, DimRange]) -> InputSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"input {name!r} is {dtype}", why=f"an engine takes {', '.join(DTYPES)}")
    actual = tuple(tensor.shape)
    wanted = actual if shape is None else tuple(shape)
    if len(wanted) != len(actual):
        raise ConfigError(f"input {name!r}: shape {list(wanted)} does not fit the example's {list(actual)}")
    resolved: list[int | str] = []
    for axis, (dim, size) in enumerate(zip(wanted, actual, strict=True)):
        if dim is None or dim == size:
            resolved.append(size)
        elif isinstance(dim, int):
            raise ConfigError(f"input {name!r}: axis {axis} is {dim} in its shape and {size} in its example")
        elif dim not in dims:
            raise ConfigError(
                f"input {name!r}: dimension {dim!r} has no range",
                fix=f'add it, as in dims={{"{dim}": (1, {size}, {2 * size})}}; known: {", ".join(dims) or "none"}',
            )
        elif not dims[dim].min <= size <= dims[dim].max:
            raise ConfigError(
                f"input {name!r}: the example's axis {axis} has size {size}, outside of {dim!r} = "
                f"[{dims[dim].min}, {dims[dim].max}]"
            )
        else:
            resolved.append(dim if dims[dim].min != dims[dim].max else size)
    return InputSpec(name, dtype, tuple(resolved), _seen_values(tensor))


def _check_shared_sizes(specs: Sequence[InputSpec], tensors: Sequence[torch.Tensor]) -> None:
    sizes: dict[str, tuple[int, str]] = {}
    for spec, tensor in zip(specs, tensors, strict=True):
        for dim, size in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, (size, spec.name))[0] != size:
                raise ConfigError(
                    f"dimension {dim!r} has size {size} in the example of {spec.name!r} and {sizes[dim][0]} in that of "
                    f"{sizes[dim][1]!r}",
                    fix="give them one size, or two names",
                )


def _seen_values(tensor: torch.Tensor) -> ValueRange | None:
    if tensor.dtype.is_floating_point or tensor.numel() == 0:
        return None
    numbers = tensor.to(torch.int64)
    return ValueRange(int(numbers.min()), int(numbers.max()))


def _grow(tensor: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    for axis, dim in enumerate(spec.shape):
        if isinstance(dim, str) and tensor.shape[axis] == 1:
            tensor = torch.cat([tensor, tensor], dim=axis)
    return tensor
