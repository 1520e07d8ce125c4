"""The float graph that everything starts from, and what records its truth: PyTorch, or the ONNX as it came."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtforge.converter.config import ConversionConfig
from trtforge.converter.sources import LoadedModel
from trtforge.runtime.specs import InputSpec

if TYPE_CHECKING:
    import torch

    from trtforge.runtime.graph import OnnxModel
    from trtforge.runtime.runner import Runner
    from trtforge.runtime.trt.backend import Backend

__all__ = ["Reference", "make_reference"]

_PORTABLE_OPSET = 20
"""For a backend that is not installed here: what every supported one parses."""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The float graph with ids, its inputs with the values that may be generated, and the runner of the truth.

    `notes` say what the caller should know of the outputs.
    """

    model: OnnxModel
    specs: tuple[InputSpec, ...]
    runner: Runner
    notes: tuple[str, ...] = ()


def make_reference(config: ConversionConfig, loaded: LoadedModel, backend: Backend | None, folder: Path) -> Reference:
    """Exports a module or a program, or reads a foreign ONNX file, to `folder/reference.onnx`.

    Raises:
        ConfigError: inputs, dimensions or names do not fit the model.
        ExportError: it cannot be exported or read, or a dynamic dimension came out static.
    """
    if loaded.program is not None:
        return _translate(loaded.program, config, loaded, backend, folder)
    if loaded.module is None:
        return _import(config, loaded, backend, folder)
    from trtforge.converter.example import example_from_inputs, example_from_specs
    from trtforge.converter.export import FlatCall, export_module
    from trtforge.runtime.torch_runner import TorchRunner

    module, given = loaded.module, loaded.example
    if given is not None:
        example = example_from_inputs(module, given.inputs, profiles=config.profiles, shapes=given.shapes)
    else:
        example = example_from_specs(module, config.inputs, config.profiles)
    model = export_module(
        module,
        example,
        profiles=config.profiles,
        output_names=config.outputs or None,
        opset=_opset(config, backend),
        rewritten=_rewritten(backend),
        folder=folder,
        translations=loaded.translations,
    )
    return Reference(model, example.specs, TorchRunner(module, FlatCall(module, example), model.inputs, model.outputs))


def _opset(config: ConversionConfig, backend: Backend | None) -> int:
    return config.target.opset or (backend.capabilities.max_opset if backend else _PORTABLE_OPSET)


def _rewritten(backend: Backend | None) -> Collection[str]:
    from trtforge.converter.unsupported import REWRITTEN

    return backend.capabilities.rewritten_operators if backend else REWRITTEN


def _translate(
    program: torch.export.ExportedProgram,
    config: ConversionConfig,
    loaded: LoadedModel,
    backend: Backend | None,
    folder: Path,
) -> Reference:
    from trtforge.converter.program import export_program, open_program
    from trtforge.runtime.torch_runner import TorchRunner

    specs = {spec.name: spec for spec in config.inputs}
    given, values = (specs, None) if loaded.example is None else (loaded.example.shapes, loaded.example.inputs)
    opened = open_program(program, given=given, profiles=config.profiles, values=values)
    opset = _opset(config, backend)
    model = export_program(
        opened,
        output_names=config.outputs or None,
        opset=opset,
        folder=folder,
        rewritten=_rewritten(backend),
        translations=loaded.translations,
    )
    runner = TorchRunner(opened.module, opened.call, model.inputs, model.outputs)
    return Reference(model, opened.example.specs, runner)


def _import(config: ConversionConfig, loaded: LoadedModel, backend: Backend | None, folder: Path) -> Reference:
    from trtforge.converter.branches import check_branches
    from trtforge.converter.foreign import import_onnx
    from trtforge.converter.trial import try_in_child
    from trtforge.runtime.onnx_runner import OnnxRuntimeRunner

    assert loaded.onnx is not None
    given = loaded.example
    imported = import_onnx(
        loaded.onnx,
        profiles=config.profiles,
        inputs=config.inputs,
        shapes=None if given is None else given.shapes,
        example=None if given is None else given.inputs,
        opset=config.target.opset,
        folder=folder,
        rewritten=_rewritten(backend),
    )
    try:
        try_in_child(imported.truth, imported.specs, config.profiles, folder)
        runner = OnnxRuntimeRunner(imported.truth, disable_quant_qdq=True)
        check_branches(imported.model)
    finally:
        if imported.truth != loaded.onnx:
            imported.truth.unlink()
    return Reference(imported.model, imported.specs, runner, imported.notes)
