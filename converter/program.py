"""An `ExportedProgram`: its inputs in the user's names, its dimensions against what it was exported for, its ONNX."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.utils import _pytree

from trtforge.converter.custom_ops import Translations
from trtforge.converter.dims import fix_static, merge_profiles
from trtforge.converter.export import FlatCall, quiet, write_program
from trtforge.converter.signature import ExampleInputs, bind_call, name_outputs, tensor_leaves
from trtforge.runtime.errors import ConfigError, ExportError
from trtforge.runtime.graph import OnnxModel
from trtforge.runtime.specs import DTYPES, DimRange, InputSpec, Profile, ValueRange
from trtforge.runtime.suggest import nearest

__all__ = ["ProgramCall", "export_program", "open_program"]

Given = Mapping[str, InputSpec | Sequence[int | str | None]]
"""Specs (YAML), or sizes and dimension names (Python), by flat input name."""


@dataclass(frozen=True, slots=True, eq=False)
class ProgramCall:
    """A program that can be called on flat tensors.

    Attributes:
        program: As it was given.
        module: Its operators as a module, which no call puts into another mode.
        example: One call with the program's own example sizes, and the specs of its tensors in the user's names.
        call: Runs the module on tensors in the order of the specs.
        outputs: The names of what it returns.
    """

    program: torch.export.ExportedProgram
    module: torch.nn.Module
    example: ExampleInputs
    call: FlatCall
    outputs: tuple[str, ...]


def open_program(
    program: torch.export.ExportedProgram, *, given: Given, profiles: Sequence[Profile], values: Any = None
) -> ProgramCall:
    """Gives the inputs of a program the user's names, dimensions and ranges.

    Args:
        program: From `torch.export.export` or `.load`.
        given: What is known of inputs, by name: the parameters of the exported `forward`, with dots below them. Inputs
            left out must be static.
        profiles: Ranges of the dimensions.
        values: One call's inputs, from which ranges of integers are taken; by default the program's own example.

    Raises:
        ConfigError: the program was exported in training mode; a name, rank, size or dtype that is not the program's; a
            dynamic dimension without a name, or with a range that the program was not exported for.
        ExportError: a dimension that was asked to be dynamic has one size in the program.
    """
    _check_mode(program)
    module = program.module()
    # The mode is in the operators, and torch's own `train` raises: let `eval()` be what it is, nothing.
    module.train = lambda mode=True: module  # type: ignore[method-assign]
    module.eval = lambda: module  # type: ignore[method-assign]
    args, kwargs, fakes = _call_of(program)
    names = bind_call(module, args, kwargs)
    seen = _seen_values(program, values, len(names))
    specs = _specs(program, names, fakes, given, seen, profiles)
    example = ExampleInputs(args, kwargs, specs)
    outputs = tuple(name for name, _ in name_outputs(_result_of(program)))
    return ProgramCall(program, module, example, FlatCall(module, example), outputs)


def export_program(
    opened: ProgramCall,
    *,
    output_names: Sequence[str] | None,
    opset: int,
    folder: Path,
    rewritten: Collection[str] = (),
    translations: Translations | None = None,
) -> OnnxModel:
    """Translates a program to `folder/reference.onnx`; see `export_module`."""
    with quiet():
        return write_program(
            opened.program,
            opened.example,
            opened.outputs,
            output_names=output_names,
            opset=opset,
            folder=folder,
            rewritten=rewritten,
            translations=translations,
        )


def _check_mode(program: torch.export.ExportedProgram) -> None:
    flags = {
        torch.ops.aten.dropout.default: 2,
        torch.ops.aten.native_dropout.default: 2,
        torch.ops.aten.batch_norm.default: 5,
        torch.ops.aten.alpha_dropout.default: 2,
        torch.ops.aten.feature_dropout.default: 2,
    }
    found = [
        f"{node.name} ({node.target})"
        for node in program.graph.nodes
        if node.target in flags and len(node.args) > flags[node.target] and node.args[flags[node.target]] is True
    ]
    if found:
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise ConfigError(
            f"the program was exported in training mode: {', '.join(found[:4])}{more}",
            why="its results are random or depend on the other samples of a batch",
            fix="export `model.eval()` again",
        )


def _call_of(program: torch.export.ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any], list[torch.Tensor]]:
    """Arguments of one call, with zeros in the example's sizes, and the symbolic tensors they stand for."""
    metas = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    leaves: list[Any] = []
    fakes: list[torch.Tensor] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is not torch.export.graph_signature.InputKind.USER_INPUT:
            continue
        if isinstance(spec.arg, torch.export.graph_signature.ConstantArgument):
            leaves.append(spec.arg.value)
            continue
        fake = metas.get(spec.arg.name)
        if not isinstance(fake, torch.Tensor):
            raise ExportError(
                f"input {spec.arg.name!r} of the program is {type(fake).__name__}, not a tensor",
                why="an engine takes tensors",
                fix="export with a tensor or a constant in its place",
            )
        fakes.append(fake)
        leaves.append(torch.zeros([_hint(size) for size in fake.shape], dtype=fake.dtype))
    args, kwargs = _pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return args, kwargs, fakes


def _result_of(program: torch.export.ExportedProgram) -> Any:
    metas = {node.name: node.meta.get("val") for node in program.graph.nodes}
    leaves = []
    for spec in program.graph_signature.output_specs:
        if spec.kind is torch.export.graph_signature.OutputKind.USER_OUTPUT:
            leaves.append(metas.get(getattr(spec.arg, "name", ""), getattr(spec.arg, "value", None)))
        else:
            raise ExportError(
                f"the program changes its state: {spec.target or getattr(spec.arg, 'name', '')}",
                why="an engine has no buffers that live on between calls",
                fix="return the new value as an output and pass it in again as an input",
            )
    # Sizes that a program returns are no tensors; naming leaves them out, as it does with numbers.
    leaves = [None if isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) else leaf for leaf in leaves]
    return _pytree.tree_unflatten(leaves, program.call_spec.out_spec)


def _specs(
    program: torch.export.ExportedProgram,
    names: Sequence[str],
    fakes: Sequence[torch.Tensor],
    given: Given,
    seen: Sequence[ValueRange | None],
    profiles: Sequence[Profile],
) -> tuple[InputSpec, ...]:
    dims = merge_profiles(profiles)
    for name in given:
        if name not in names:
            raise ConfigError(f"the program has no input {name!r}", fix=nearest(name, names))
    dimensions = _Dimensions(program, dims)
    specs = []
    decided: set[str] = set()
    for name, fake, values in zip(names, fakes, seen, strict=True):
        elements: tuple[int | str, ...] = ()
        wanted = given.get(name)
        dtype = str(fake.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ExportError(f"input {name!r} is {dtype}", why=f"an engine takes {', '.join(DTYPES)}")
        if isinstance(wanted, InputSpec):
            if wanted.dtype != dtype:
                raise ConfigError(f"input {name!r} is {dtype} in the program and {wanted.dtype} under `inputs`")
            values, elements = wanted.values or values, wanted.elements
            decided |= wanted.dims
        shape = wanted.shape if isinstance(wanted, InputSpec) else wanted
        specs.append(InputSpec(name, dtype, dimensions.shape(name, fake, shape), values, elements))
    for dim in dims:
        if dim not in dimensions.used | decided:
            known = ", ".join(f"{n} {list(f.shape)}" for n, f in zip(names, fakes, strict=True))
            raise ConfigError(
                f"dimension {dim!r} is in no input's shape",
                fix=f"name it under `inputs`; the program's inputs are {known}",
            )
    return tuple(fix_static(specs, dims))


class _Dimensions:
    """The user's names of a program's symbols, and whether the ranges fit."""

    def __init__(self, program: torch.export.ExportedProgram, dims: Mapping[str, DimRange]) -> None:
        self.ranges = program.range_constraints
        self.dims = dims
        self.names: dict[sympy.Expr, str | int] = {}
        self.used: set[str] = set()

    def shape(self, name: str, fake: torch.Tensor, wanted: Sequence[int | str | None] | None) -> tuple[int | str, ...]:
        wanted = [None] * len(fake.shape) if wanted is None else wanted
        if len(wanted) != len(fake.shape):
            raise ConfigError(
                f"input {name!r} has {len(fake.shape)} axes in the program, {list(wanted)} under `inputs`"
            )
        return tuple(
            self._axis(f"axis {axis} of input {name!r}", size, dim)
            for axis, (size, dim) in enumerate(zip(fake.shape, wanted, strict=True))
        )

    def _axis(self, place: str, size: int | torch.SymInt, wanted: int | str | None) -> int | str:
        if isinstance(wanted, str):
            if wanted not in self.dims:
                raise ConfigError(
                    f"dimension {wanted!r} ({place}) has no range", fix=f"add `{wanted}: [min, opt, max]` to `dims`"
                )
            self.used.add(wanted)
        asked = self.dims[wanted] if isinstance(wanted, str) else None
        if isinstance(size, int):
            return self._static(place, size, wanted, asked)
        expression = size.node.expr
        if not isinstance(expression, sympy.Symbol):
            return self._derived(place, size, expression, wanted, asked)
        limits = self.ranges.get(expression)
        low, high = (0, sympy.oo) if limits is None else (limits.lower, limits.upper)
        if wanted is None:
            raise ConfigError(
                f"{place} is dynamic in the program ({low} to {high}) and has no name",
                why="exported programs do not keep the names of dimensions",
                fix="give the input a shape with a name there under `inputs`, and that name a range in `dims`",
            )
        asked = DimRange(wanted, wanted, wanted) if isinstance(wanted, int) else self.dims[wanted]
        if not (low <= asked.min and asked.max <= high):
            raise ConfigError(
                f"{place} is {_text(wanted, asked)}, and the program was exported for {low} to {high}",
                fix="narrow the range, or export again with dynamic_shapes that cover it: "
                f"torch.export.Dim('{wanted}', min={asked.min}, max={asked.max})",
            )
        if self.names.setdefault(expression, wanted) != wanted:
            raise ConfigError(
                f"{place} is called {wanted!r}, and another axis that always equals it {self.names[expression]!r}",
                why="the program was exported with one dimension for both",
                fix="give them one name",
            )
        return wanted

    def _static(self, place: str, size: int, wanted: int | str | None, asked: DimRange | None) -> int:
        if asked is not None and not asked.min == asked.max == size:
            raise ExportError(
                f"dimension {wanted!r} froze at {size}: {place} has that size in the program",
                fix=f"export again with dynamic_shapes that name this axis, or write {size} in place of {wanted!r}",
            )
        if isinstance(wanted, int) and wanted != size:
            raise ConfigError(f"{place} is {size} in the program and {wanted} under `inputs`")
        return size

    def _derived(
        self, place: str, size: torch.SymInt, expression: sympy.Expr, wanted: int | str | None, asked: DimRange | None
    ) -> int:
        fixed = asked.min if asked is not None and asked.min == asked.max else wanted
        if isinstance(fixed, int) and fixed == _hint(size):
            return fixed
        raise ExportError(
            f"{place} is {expression} in the program: not a dimension of its own, but computed from another one",
            why="min, opt and max of a name of its own would break that relation",
            fix=f"write its size {_hint(size)} to make it static, or export with a plain torch.export.Dim",
        )


def _text(wanted: int | str, asked: DimRange | None) -> str:
    return f"{wanted!r} = [{asked.min}, {asked.max}]" if asked is not None else str(wanted)


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 2)


def _seen_values(program: torch.export.ExportedProgram, values: Any, count: int) -> list[ValueRange | None]:
    """Ranges of the integers in one call; unknown where a call's structure is not the program's."""
    example = values if values is not None else program.example_inputs
    tensors = [tensor for _, tensor in tensor_leaves(example)] if example else []
    if len(tensors) != count:
        return [None] * count
    return list(_ranges(tensors))


def _ranges(tensors: Sequence[torch.Tensor]) -> Iterator[ValueRange | None]:
    for tensor in tensors:
        if tensor.dtype.is_floating_point or tensor.numel() == 0:
            yield None
        else:
            numbers = tensor.to(torch.int64)
            yield ValueRange(int(numbers.min()), int(numbers.max()))
