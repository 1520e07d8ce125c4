"""Optimization profiles, in the child process. TensorRT swallows most mistakes in them: they are checked here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from trtforge.runtime.errors import BuildError
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.suggest import nearest

__all__ = ["Shapes", "add_profiles", "check_profile"]

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""An input's shape at the min, opt and max of one profile."""

_ENDS = ("min", "opt", "max")


def add_profiles(
    builder: Any,
    config: Any,
    inputs: Sequence[TensorSpec],
    profiles: Sequence[Mapping[str, Shapes]],
    values: Sequence[Mapping[str, Shapes]] = (),
) -> None:
    """Adds every profile to `config`; a network of fixed shapes gets none.

    Args:
        builder: The `IBuilder`.
        config: Its `IBuilderConfig`.
        inputs: The network's.
        profiles: Min, opt and max shape of each dynamic input, by name.
        values: For each profile min, opt and max values of the inputs whose values decide shapes.

    Raises:
        BuildError: see `check_profile`; or TensorRT refuses one.
    """
    dynamic = [spec for spec in inputs if _is_dynamic(spec)]
    if dynamic and not profiles:
        raise BuildError(
            "there is no optimization profile, and these inputs are dynamic: "
            + ", ".join(f"{spec.name} {list(spec.shape)}" for spec in dynamic),
            fix="give each dynamic dimension its [min, opt, max] under `dims`",
        )
    for number, profile in enumerate(profiles):
        check_profile(inputs, profile, number)
    if not dynamic and not values:
        return
    nothing: Mapping[str, Shapes] = {}
    for number, (profile, deciding) in enumerate(zip_longest(profiles, values, fillvalue=nothing)):
        made = builder.create_optimization_profile()
        for spec in dynamic:
            made.set_shape(spec.name, *profile[spec.name])
        for name, ends in deciding.items():
            made.set_shape_input(name, *ends)
        if config.add_optimization_profile(made) < 0:
            raise BuildError(
                f"TensorRT refuses optimization profile {number}: "
                + ", ".join(f"{name} {_show(ends)}" for name, ends in {**profile, **deciding}.items()),
                fix="give [min, opt, max] in ascending order for each dynamic dimension",
            )


def check_profile(inputs: Sequence[TensorSpec], profile: Mapping[str, Shapes], number: int) -> None:
    """Compares one profile with the network's inputs.

    Raises:
        BuildError: an unknown or missing input, a wrong rank, a fixed dimension with another size, or sizes that are
            not 1 <= min <= opt <= max.
    """
    specs = {spec.name: spec for spec in inputs}
    for name, shapes in profile.items():
        if name not in specs:
            raise BuildError(
                f"optimization profile {number} names the input {name!r}, which the network lacks",
                fix=nearest(name, specs),
            )
        _check_shapes(specs[name], shapes, number)
    missing = [spec for spec in inputs if _is_dynamic(spec) and spec.name not in profile]
    if missing:
        raise BuildError(
            f"optimization profile {number} lacks the dynamic input "
            + ", ".join(f"{spec.name!r} {list(spec.shape)}" for spec in missing),
            fix="give each of its dynamic dimensions [min, opt, max]",
        )


def _check_shapes(spec: TensorSpec, shapes: Shapes, number: int) -> None:
    where = f"optimization profile {number}, input {spec.name!r}"
    for end, shape in zip(_ENDS, shapes, strict=True):
        if len(shape) != len(spec.shape):
            raise BuildError(
                f"{where}: the {end} shape {list(shape)} has {len(shape)} dimensions, the network's {len(spec.shape)}",
                why=f"the network has {list(spec.shape)}",
                fix="give as many sizes as the input has dimensions",
            )
    for axis, size in enumerate(spec.shape):
        least, usual, most = (shape[axis] for shape in shapes)
        if isinstance(size, int):
            if {least, usual, most} != {size}:
                raise BuildError(
                    f"{where}: axis {axis} is fixed at {size} in the network, and the profile asks for "
                    f"[{least}, {usual}, {most}]",
                    why="the export froze this dimension, or the profile belongs to another model",
                    fix=f"make the dimension dynamic in the export, or ask for {size}",
                )
        # TensorRT accepts 0, and builds an engine that is of no use.
        elif not 1 <= least <= usual <= most:
            raise BuildError(
                f"{where}: axis {axis} ({size}) has [{least}, {usual}, {most}], not 1 <= min <= opt <= max",
                fix="write [min, opt, max] in ascending order, starting at 1 or more",
            )


def _is_dynamic(spec: TensorSpec) -> bool:
    return any(isinstance(size, str) for size in spec.shape)


def _show(shapes: Shapes) -> str:
    return " ".join(f"{end}={'x'.join(map(str, shape)) or 'scalar'}" for end, shape in zip(_ENDS, shapes, strict=True))
