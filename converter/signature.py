"""How one call of a module is made of flat, named tensors, and what its result is called.

A flat name is the user's: the parameter of `forward`, and below it the path of keys, indices and fields, joined by dots
(`batch.ids`, `pair.0`, `xs.1` for `*xs`). Results are named likewise; a bare tensor is `output`, and a tuple's elements
are `output_0`, `output_1`, ….
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

from trtforge.converter.caches import register_cache
from trtforge.runtime.errors import ConfigError, ExportError, TrtForgeError
from trtforge.runtime.specs import InputSpec

__all__ = ["ExampleInputs", "bind_call", "forward_signature", "name_outputs", "tensor_leaves"]

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True, eq=False)
class ExampleInputs:
    """One call of a module, and the spec of every tensor in it.

    Attributes:
        args: Positional arguments; tensors may sit in dicts, lists, tuples and dataclasses, among constants and None.
        kwargs: Keyword arguments, likewise.
        specs: One for each tensor, in the order in which `bind` takes them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    specs: tuple[InputSpec, ...]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The example tensors, in the order of `specs`."""
        return tuple(tensor for _, tensor in tensor_leaves((self.args, dict(self.kwargs))))

    def bind(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with other tensors, given in the order of `specs`."""
        rest = iter(tensors)
        args, kwargs = _replace_tensors((self.args, dict(self.kwargs)), rest)
        return args, kwargs


def tensor_leaves(value: Any, error: type[TrtForgeError] = ConfigError) -> Iterator[tuple[str, torch.Tensor]]:
    """Path and tensor of every tensor in `value`, in order; the path of a bare tensor is "".

    Raises:
        TrtForgeError: of the class `error`: `value` holds an object that is neither a tensor, a constant (number, text,
            None, …), a container, nor a pytree node.
    """
    yield from _leaves(value, "", error)


def name_outputs(result: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors in what a module returned, by name; None and Python numbers are left out.

    Raises:
        ExportError: an object that holds no known tensors.
    """
    if isinstance(result, torch.Tensor):
        return [("output", result)]
    named = isinstance(result, Mapping) or dataclasses.is_dataclass(result) or hasattr(result, "_fields")
    return [(path if named else f"output_{path}", tensor) for path, tensor in tensor_leaves(result, ExportError)]


def forward_signature(module: torch.nn.Module) -> inspect.Signature:
    """The parameters of `forward`.

    Raises:
        ConfigError: TorchScript, which torch.export does not take.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ConfigError(
            "the model is TorchScript", why="torch.export captures Python", fix="give the nn.Module it was made from"
        )
    return inspect.signature(module.forward)


def bind_call(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Flat names of the tensors in `module(*args, **kwargs)`, in the order of `ExampleInputs.tensors`.

    Raises:
        ConfigError: `forward` does not take these arguments.
    """
    signature = forward_signature(module)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(
            f"{type(module).__name__}.forward{signature} does not take these example inputs: {error}",
            fix="give one tensor, a tuple of the positional arguments, or a dict by parameter name; a dict that is "
            "itself the argument stands in a tuple: (batch,)",
        ) from None
    names: list[str] = []
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD or name in kwargs:
            continue
        for path, _ in tensor_leaves(value):
            names.append(_join(name, path))
    for name, value in kwargs.items():
        names.extend(_join(name, path) for path, _ in tensor_leaves(value))
    return names


def _leaves(value: Any, path: str, error: type[TrtForgeError]) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    for key, child in _children(value, path, error):
        yield from _leaves(child, _join(path, key), error)


def _children(value: Any, path: str = "", error: type[TrtForgeError] = ConfigError) -> list[tuple[str, Any]]:
    if isinstance(value, _CONSTANTS):
        return []
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return [(str(key), child) for key, child in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return [(str(index), child) for index, child in enumerate(value)]
    node = _pytree.SUPPORTED_NODES.get(type(value))
    if node is None and register_cache(type(value)):
        node = _pytree.SUPPORTED_NODES[type(value)]
    if node is None:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        cache = "set `use_cache=False` in its config, or " if kind.endswith("Cache") else ""
        raise error(
            f"{path or 'the value'} is a {kind}, which holds no known tensors",
            fix=f"{cache}pass and return tensors in dicts, lists, tuples or dataclasses, or register the type with "
            "torch's pytree (torch.export.register_dataclass)",
        )
    if node.flatten_with_keys_fn is not None:
        return [(_key_text(key), child) for key, child in node.flatten_with_keys_fn(value)[0]]
    return [(str(index), child) for index, child in enumerate(node.flatten_fn(value)[0])]


def _key_text(key: Any) -> str:
    if isinstance(key, _pytree.MappingKey):
        return str(key.key)
    return str(key.name if isinstance(key, _pytree.GetAttrKey) else getattr(key, "idx", key))


def _replace_tensors(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, _CONSTANTS):
        return value
    changed = [(key, _replace_tensors(child, tensors)) for key, child in _children(value)]
    return _rebuild(value, [child for _, child in changed])


def _rebuild(value: Any, children: list[Any]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for field, child in zip(dataclasses.fields(value), children, strict=True):
            object.__setattr__(new, field.name, child)
        return new
    if isinstance(value, Mapping):
        if type(value) is dict:
            return dict(zip(value, children, strict=True))
        copied: Any = copy.copy(value)
        for key, child in zip(value, children, strict=True):
            copied[key] = child
        return copied
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*children)
    if isinstance(value, (tuple, list)):
        return type(value)(children)
    node = _pytree.SUPPORTED_NODES[type(value)]
    return node.unflatten_fn(children, node.flatten_fn(value)[1])


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key
