"""The arguments of an engine's call: put in order, checked, and brought to the GPU where that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.lanes import Shape
from trtforge.runtime.specs import DTYPES, TensorSpec
from trtforge.runtime.suggest import nearest
from trtforge.runtime.torch_runner import to_torch

__all__ = [
    "aligned_addresses",
    "arrange",
    "check_output",
    "check_tensor",
    "choose_profile",
    "fetch_tensor",
    "torch_dtype",
]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a `TensorSpec`'s.

    Raises:
        ConfigError: torch has none of that name (a packed 4-bit type).
    """
    # torch's own int4 is a name without operations.
    if name not in DTYPES and name != "float8_e4m3fn":
        raise ConfigError(
            f"an input or output of the engine is {name}, which torch lacks",
            fix="keep inputs and outputs in float; quantize inside the model",
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def arrange(
    specs: Sequence[TensorSpec], given: Sequence[Any], named: Mapping[str, Any], kind: str = "input"
) -> list[Any]:
    """One value for each input, in the engine's order.

    Args:
        specs: The engine's inputs, or its outputs.
        given: Values by position.
        named: Values by name.
        kind: "input" or "output", for messages.

    Raises:
        ConfigError: one is missing, unknown, or given twice.
    """
    names = [spec.name for spec in specs]
    if len(given) > len(specs):
        raise ConfigError(
            f"the engine has {len(specs)} {kind}{'s' * (len(specs) != 1)}, and {len(given)} were given by position",
            fix=f"give {', '.join(names)}",
        )
    values = list(given)
    for name in named:
        if name not in names:
            raise ConfigError(f"the engine has no {kind} {name!r}", fix=nearest(name, names))
        if name in names[: len(given)]:
            raise ConfigError(f"{kind} {name!r} is given by position and by name", fix="give it once")
    for name in names[len(given) :]:
        if name not in named:
            raise ConfigError(
                f"{kind} {name!r} is missing", fix=f"give all of {', '.join(names)}, in this order or by name"
            )
        values.append(named[name])
    return values


def fetch_tensor(value: Any, device: torch.device) -> tuple[torch.Tensor, bool]:
    """A tensor with the values of something that is none: a numpy array is copied to `device`, DLPack is shared.

    Returns:
        The tensor, and whether it is a copy.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(value, torch.Tensor):
        return value, False
    if isinstance(value, np.ndarray):
        try:
            return to_torch(value).to(device), True
        except TypeError as error:  # numpy's strings, objects, dates
            raise ConfigError(
                f"torch has no dtype for numpy's {value.dtype}", fix="give an array of numbers"
            ) from error
    if hasattr(value, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(value), False
    raise ConfigError(
        f"an input is {type(value).__name__}, not a tensor",
        fix="give a torch tensor on the GPU, a numpy array, or anything with DLPack",
    )


def check_tensor(
    tensor: torch.Tensor, spec: TensorSpec, dtype: torch.dtype, device: torch.device, *, copy: bool
) -> bool:
    """Compares a tensor with the input that it is given for; its shape is the profiles' business.

    Args:
        tensor: What was given.
        spec: The input.
        dtype: The input's dtype, in torch's terms.
        device: The engine's.
        copy: Whether the caller allows a copy.

    Returns:
        Whether a copy is needed.

    Raises:
        ConfigError: of another dtype; or, unless a copy is allowed, on another device or not contiguous.
    """
    if tensor.dtype is not dtype:
        raise ConfigError(
            f"input {spec.name!r} is {_name(tensor.dtype)}, and the engine takes {spec.dtype}",
            fix=f"convert it with .to({dtype})",
        )
    if tensor.device != device:
        if copy:
            return True
        raise ConfigError(
            f"input {spec.name!r} is on {tensor.device}, and the engine on {device}",
            fix=f"move it with .to({str(device)!r}), or call engine.run(..., copy=True)",
        )
    if not tensor.is_contiguous():
        if copy:
            return True
        raise ConfigError(
            f"input {spec.name!r} is not contiguous: shape {list(tensor.shape)}, strides {list(tensor.stride())}",
            why="an engine reads its inputs' memory in order",
            fix="give .contiguous(), or call engine.run(..., copy=True)",
        )
    return False


def check_output(tensor: Any, spec: TensorSpec, dtype: torch.dtype, shape: Shape, device: torch.device) -> None:
    """Compares a tensor that shall be written with the output that it is given for.

    Raises:
        ConfigError: no tensor, or one of another dtype, shape or device, or not contiguous.
    """
    wanted = f"{spec.dtype} {list(shape)} on {device}, contiguous"
    if not isinstance(tensor, torch.Tensor):
        raise ConfigError(f"out for {spec.name!r} is {type(tensor).__name__}, not a tensor", fix=f"give {wanted}")
    fits = tensor.dtype is dtype and tuple(tensor.shape) == shape and tensor.device == device
    if not fits or not tensor.is_contiguous():
        layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise ConfigError(
            f"out for {spec.name!r} is {_name(tensor.dtype)} {list(tensor.shape)} on {tensor.device}, {layout}",
            why=f"for these inputs the engine writes {wanted}",
            fix=f"torch.empty({shape}, dtype={dtype}, device={str(device)!r})",
        )


def aligned_addresses(specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor], alignment: int) -> list[int]:
    """The addresses of tensors that an engine shall read and write in place.

    Raises:
        ConfigError: one is not a multiple of `alignment`, in bytes.
    """
    for spec, tensor in zip(specs, tensors, strict=True):
        if tensor.data_ptr() % alignment:
            raise ConfigError(
                f"{spec.name!r} starts at an address that is not a multiple of {alignment}",
                why="it is a view into the middle of another tensor",
                fix="bind a .clone() of it, or a tensor of its own",
            )
    return [tensor.data_ptr() for tensor in tensors]


def choose_profile(
    profiles: Sequence[Mapping[str, tuple[Shape, ...]]], specs: Sequence[TensorSpec], shapes: Sequence[Shape]
) -> int:
    """The optimization profile for these shapes: the one tuned for just these, else the tightest that holds them.

    Raises:
        ConfigError: none holds them.
    """
    named = {spec.name: shape for spec, shape in zip(specs, shapes, strict=True)}
    fitting = [number for number, profile in enumerate(profiles) if _holds(profile, named)]
    if not fitting:
        given = ", ".join(f"{name} {list(shape)}" for name, shape in named.items())
        ranges = "; ".join(f"profile {number}: {_show(profile)}" for number, profile in enumerate(profiles))
        raise ConfigError(
            f"no profile of the engine holds {given}",
            why=ranges,
            fix="choose sizes inside a profile, or build the engine with wider `dims`",
        )
    tuned = [number for number in fitting if all(profiles[number][name][1] == shape for name, shape in named.items())]
    return tuned[0] if tuned else min(fitting, key=lambda number: _volume(profiles[number]))


def _holds(profile: Mapping[str, tuple[Shape, ...]], shapes: Mapping[str, Shape]) -> bool:
    for name, shape in shapes.items():
        least, _, most = profile[name]
        if len(least) != len(shape):
            return False
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            return False
    return True


def _volume(profile: Mapping[str, tuple[Shape, ...]]) -> int:
    total = 0
    for _, _, most in profile.values():
        count = 1
        for size in most:
            count *= size
        total += count
    return total


def _show(profile: Mapping[str, tuple[Shape, ...]]) -> str:
    return ", ".join(
        f"{name} {list(least)}" if least == most else f"{name} {list(least)} to {list(most)}"
        for name, (least, _, most) in profile.items()
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
