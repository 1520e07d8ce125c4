"""PyTorch to ONNX: capture with torch.export, translate with torch.onnx, check what came out against what was asked."""

from __future__ import annotations

import contextlib
import inspect
import io
import keyword
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import OutputFixPass
from torch.nn.attention import SDPBackend, sdpa_kernel

from trtforge.converter.cleanup import clean
from trtforge.converter.custom_ops import Translations, find_raised
from trtforge.converter.decompositions import decompose
from trtforge.converter.dims import merge_profiles, rename_dims
from trtforge.converter.export_errors import explain_capture, explain_translation, frozen_dimension
from trtforge.converter.guards import find_guards
from trtforge.converter.identity import WRAPPER, identify
from trtforge.converter.patches import multiply_patches
from trtforge.converter.signature import ExampleInputs, name_outputs
from trtforge.converter.unsupported import rewrite
from trtforge.converter.values import name_values
from trtforge.runtime.errors import ConfigError, ExportError, TrtForgeError
from trtforge.runtime.graph import OnnxModel, save_graph
from trtforge.runtime.specs import DimRange, Profile
from trtforge.runtime.torch_runner import evaluation

__all__ = ["FlatCall", "export_module", "quiet", "write_program"]

_log = logging.getLogger("trtforge.export")


class _Seen:
    names: tuple[str, ...] = ()


class FlatCall(torch.nn.Module):
    """A module behind a signature of flat, named tensors, so that torch sees no containers, None or keywords.

    Calling it returns the module's tensors in order; `output_names` are then known.

    Args:
        module: What is called.
        example: The call that tensors are put into.
    """

    def __init__(self, module: torch.nn.Module, example: ExampleInputs) -> None:
        super().__init__()
        self.add_module(WRAPPER, module)
        self._example = example
        # torch.export puts a module's attributes back as they were, lists and dicts included
        self._seen = _Seen()
        self.identifiers = _identifiers([spec.name for spec in example.specs])
        self.forward = _with_parameters(self._call, self.identifiers)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of what the last call returned."""
        return self._seen.names

    def _call(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args, kwargs = self._example.bind(tensors)
        named = name_outputs(self.get_submodule(WRAPPER)(*args, **kwargs))
        self._seen.names = tuple(name for name, _ in named)
        return tuple(tensor for _, tensor in named)


def export_module(
    module: torch.nn.Module,
    example: ExampleInputs,
    *,
    profiles: Sequence[Profile] = (),
    output_names: Sequence[str] | None = None,
    opset: int,
    folder: Path,
    rewritten: Collection[str] = (),
    translations: Translations | None = None,
) -> OnnxModel:
    """Exports a module, in eval mode, to `folder/reference.onnx`, with the user's names and node ids.

    The module is left as it was: mode, parameters, `requires_grad`.

    Args:
        module: On any device.
        example: The call to export; sizes of dynamic dimensions are 2 or more.
        profiles: Ranges of the dimensions that the example's specs name.
        output_names: One for each output tensor; without, they come from dict keys, fields and positions.
        opset: Version of the default operator set.
        folder: An existing folder.
        rewritten: Operators of ONNX that are expressed through others.
        translations: The user's functions for operators that torch.onnx does not know.

    Raises:
        ConfigError: `output_names` of another number than there are outputs.
        ExportError: torch cannot express the model, or a dimension that was asked to be dynamic is not.
    """
    dims = merge_profiles(profiles)
    flat = FlatCall(module, example)
    with evaluation(module), quiet():
        program = _capture(flat, example, dims)
        return write_program(
            program,
            example,
            flat.output_names,
            output_names=output_names,
            opset=opset,
            folder=folder,
            rewritten=rewritten,
            translations=translations,
        )


def write_program(
    program: torch.export.ExportedProgram,
    example: ExampleInputs,
    returned: Sequence[str],
    *,
    output_names: Sequence[str] | None,
    opset: int,
    folder: Path,
    rewritten: Collection[str] = (),
    translations: Translations | None = None,
) -> OnnxModel:
    """Translates a captured program to `folder/reference.onnx`, with the user's names and node ids.

    Args:
        program: Takes the tensors of `example`.
        example: The call, and the specs of its tensors in the user's names.
        returned: A name for each tensor that the program returns, from its structure.
        output_names: What the user calls them instead.
        opset: Version of the default operator set.
        folder: An existing folder.
        rewritten: Operators of ONNX that are expressed through others.
        translations: The user's functions for operators that torch.onnx does not know.

    Raises:
        ConfigError: `output_names` of another number than there are outputs.
        ExportError: torch cannot translate it, or a dimension that was asked to be dynamic is not.
    """
    program = decompose(program)
    names = _output_names(returned, output_names, [spec.name for spec in example.specs])
    model = _translate(program, example, opset, translations or {})
    _name_values(model, example, names)
    _name_dims(model, example)
    rewrite(model, rewritten)
    clean(model)
    if multiply_patches(model):
        clean(model)
    identify(model)
    return save_graph(model, folder / "reference.onnx")


def _capture(flat: FlatCall, example: ExampleInputs, dims: Mapping[str, DimRange]) -> torch.export.ExportedProgram:
    symbols = {
        name: torch.export.Dim(name, min=dim.min, max=dim.max) for name, dim in dims.items() if dim.min < dim.max
    }
    shapes = tuple(
        {axis: symbols[dim] for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in example.specs
    )

    # torch.onnx.export retries a failed capture with the "suggested fix", and so freezes dimensions in silence (RAFT's
    # chunk on the batch): capture here, once, and never refine.
    def capture() -> torch.export.ExportedProgram:
        with _capture_settings():
            return torch.export.export(
                flat,
                example.tensors,
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )

    try:
        return capture()
    except TrtForgeError:
        raise
    except Exception as error:  # the user's model runs in there, and torch raises what it likes; passed on as the cause
        sources = {
            f"L[{identifier!r}].size()[{axis}]": dim
            for identifier, spec in zip(flat.identifiers, example.specs, strict=True)
            for axis, dim in enumerate(spec.shape)
            if isinstance(dim, str)
        }
        raise explain_capture(error, dims, lambda: find_guards(capture, sources), example.specs) from error


def _translate(
    program: torch.export.ExportedProgram, example: ExampleInputs, opset: int, translations: Translations
) -> ir.Model:
    table: dict[Any, Any] = dict(translations)
    try:
        with _capture_settings():
            result = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                optimize=False,
                custom_translation_table=table or None,
            )
    except Exception as error:  # the exporter wraps whatever its translations raise; passed on as the cause
        if raised := find_raised(error, translations):
            raise raised from raised.__cause__
        raise explain_translation(error, program, opset, translations) from error
    assert result is not None
    model = result.model
    # `optimize=True` does this too (BatchNorm into Conv, constants folded), and at opset 23 fuses RotaryEmbedding with
    # a cache of batch 1, which onnxruntime and TensorRT refuse (Llama).
    onnxscript.optimizer.optimize(model)
    if len(model.graph.inputs) != len(example.specs):
        raise ExportError(
            f"the graph has {len(model.graph.inputs)} inputs, the module was called with {len(example.specs)} tensors"
        )
    return model


@contextlib.contextmanager
def _capture_settings() -> Iterator[None]:
    """What `torch.onnx.export` sets around its capture, needed around its translation too."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        # Under no_grad an LSTM is decomposed step by step, which freezes its length.
        stack.enter_context(torch.enable_grad())
        # Sizes of 1 stay dynamic: no branch on `size == 1` is taken into the graph.
        config: Any = torch.fx.experimental._config
        stack.enter_context(config.patch(backed_size_oblivious=True))
        # Which attention kernel a CPU would choose decides on strides, and torch chooses twice: T5's reshape, a view
        # when captured, is impossible when translated.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_recurrent_loops())
        yield


@contextlib.contextmanager
def _recurrent_loops() -> Iterator[None]:
    """Lets a dynamic length survive an LSTM or GRU, by torch's decomposition of them into loops.

    Without it the capture freezes the length; with it around the capture alone, as in `torch.onnx.export`, the
    translation writes the example's length into the shapes behind the operator, which itself becomes ONNX's LSTM.
    """
    try:
        from torch.export import _patches
    except ImportError:  # before torch 2.10
        yield
        return
    # torch keeps the kernel that an operator used last in a cache: a capture before this one, by whomever, would make
    # the loops ineffective, and these would outlive their context.
    operators: tuple[Any, ...] = (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)
    try:
        with _patches.register_lstm_while_loop_decomposition(), _patches.register_gru_while_loop_decomposition():
            for operator in operators:
                getattr(operator, "_dispatch_cache", {}).clear()
            yield
    finally:
        for operator in operators:
            getattr(operator, "_dispatch_cache", {}).clear()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Sends to the debug log what torch and the module print, warn and log."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    before = [(logger.propagate, list(logger.handlers)) for logger in loggers]
    for logger in loggers:
        logger.propagate, logger.handlers = False, [handler]
    try:
        with (
            contextlib.redirect_stdout(text),
            contextlib.redirect_stderr(text),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            yield
    finally:
        for logger, (propagate, handlers) in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers = propagate, handlers
        for warning in caught:
            _log.debug("%s: %s", warning.category.__name__, warning.message)
        if text.getvalue():
            _log.debug("%s", text.getvalue())


def _identifiers(names: Sequence[str]) -> tuple[str, ...]:
    """An identifier for each name, the name itself where it is one: torch's messages use them."""
    found: list[str] = []
    for name in names:
        word = re.sub(r"\W", "_", name)
        usable = word.isidentifier() and not keyword.iskeyword(word) and word not in found
        found.append(word if usable else f"input_{len(found)}")
    return tuple(found)


def _with_parameters(function: Callable[..., Any], identifiers: Sequence[str]) -> Callable[..., Any]:
    def forward(*tensors: torch.Tensor) -> Any:
        return function(*tensors)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in identifiers])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _output_names(derived: Sequence[str], wanted: Sequence[str] | None, inputs: Sequence[str]) -> list[str]:
    if not derived:
        raise ExportError("the module returned no tensor", fix="return a tensor, or tensors in a tuple, list or dict")
    if wanted is None:
        names: list[str] = []
        for name in derived:
            while name in names or name in inputs:  # a dict's key may be a parameter's name
                name += "_output"
            names.append(name)
        return names
    if len(wanted) != len(derived):
        raise ConfigError(
            f"outputs names {len(wanted)} tensors, the model returns {len(derived)}: {', '.join(derived)}",
            fix="name each of them, in this order, or leave `outputs` out",
        )
    for name in wanted:
        if name in inputs:
            raise ConfigError(f"outputs: {name!r} is an input's name", fix="choose another one")
        if list(wanted).count(name) > 1:
            raise ConfigError(f"outputs has the name {name!r} twice")
    return list(wanted)


def _name_values(model: ir.Model, example: ExampleInputs, outputs: Sequence[str]) -> None:
    graph = model.graph
    OutputFixPass()(model)
    if len(graph.outputs) != len(outputs):
        raise ExportError(
            f"the graph has {len(graph.outputs)} outputs, the module returned {len(outputs)}: {', '.join(outputs)}"
        )
    for value in list(graph.initializers.values()):
        if value.name and value.name.startswith(f"{WRAPPER}."):
            value.name = value.name.removeprefix(f"{WRAPPER}.")
    name_values(model, [spec.name for spec in example.specs], outputs)


def _name_dims(model: ir.Model, example: ExampleInputs) -> None:
    names: dict[str, str | int] = {}
    for value, spec in zip(model.graph.inputs, example.specs, strict=True):
        for axis, (wanted, found) in enumerate(zip(spec.shape, value.shape or (), strict=True)):
            if isinstance(wanted, str) and isinstance(found, int):
                raise frozen_dimension(wanted, found, place=f" in input {spec.name!r}, axis {axis}")
            if isinstance(found, ir.SymbolicDim) and found.value is not None:
                names[str(found.value)] = wanted
    rename_dims(model, names)
