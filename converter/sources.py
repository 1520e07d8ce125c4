"""From what the configuration names to a model in this process: factories, checkpoints, ONNX and .pt2 files."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtforge.converter.config import ConversionConfig, Source
from trtforge.converter.references import call_reference, find_value
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.publish import hash_bytes, hash_file
from trtforge.runtime.suggest import nearest

if TYPE_CHECKING:
    import torch

__all__ = ["LoadedModel", "PythonExample", "check_weights", "load_source", "module_hash"]

_SHOWN_KEYS = 8


@dataclass(frozen=True, slots=True, eq=False)
class PythonExample:
    """A tensor, tuple or dict of one call's inputs, and the shapes with dimension names by flat input name."""

    inputs: Any
    shapes: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model in this process; it never leaves it.

    Attributes:
        module: The module in eval mode; None for a file.
        onnx: The ONNX file; None for a module or a program.
        source_hash: SHA-256 of the source's description and, for files, of their bytes.
        checkpoint_hash: SHA-256 of the checkpoint's bytes, or of the module's tensors where it came live from Python.
        example: The inputs that Python gave; None where they are generated from their specs.
        program: The exported program, in place of a module.
        translations: By overload of a torch operator, the user's function that expresses it in ONNX.
    """

    module: torch.nn.Module | None
    onnx: Path | None
    source_hash: str
    checkpoint_hash: str | None
    example: PythonExample | None = None
    program: torch.export.ExportedProgram | None = None
    translations: Mapping[torch._ops.OpOverload, Any] = field(default_factory=dict)


def load_source(config: ConversionConfig) -> LoadedModel:
    """Makes the model that `config.source` names.

    Raises:
        ConfigError: a file is missing, a factory does not give a module, a checkpoint does not fit it, weights are of
            half precision or not finite, a .pt2 file would run code when it is read.
        ExportError: a .pt2 file cannot be read.
        UserCodeError: the factory raised.
    """
    if config.custom_ops is None:
        return _load(config)
    from trtforge.converter.custom_ops import read_table

    # Before the source: importing the table's module may be what registers the operators that a .pt2 file names.
    table = find_value(config.custom_ops, folder=config.folder, what="custom_ops")
    loaded = _load(config)
    return replace(loaded, translations=read_table(table, name=f"custom_ops {config.custom_ops}"))


def _load(config: ConversionConfig) -> LoadedModel:
    source = config.source
    if source.onnx is not None:
        _check_file(source.onnx, "the ONNX file")
        return LoadedModel(None, source.onnx, hash_file(source.onnx), None)
    if source.exported_program is not None:
        return _load_program(source.exported_program)
    if source.checkpoint is not None:
        _check_file(source.checkpoint, "the checkpoint")
    module = _call_factory(source, config.folder)
    checkpoint_hash = None
    if source.checkpoint is not None:
        _load_checkpoint(module, source.checkpoint)
        checkpoint_hash = hash_file(source.checkpoint)
    check_weights(module)
    described = hash_bytes(repr((source.factory, sorted(source.kwargs.items()))).encode())
    return LoadedModel(module.eval(), None, described, checkpoint_hash or module_hash(module))


def module_hash(module: torch.nn.Module | torch.export.ExportedProgram) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a module's parameters and buffers."""
    import torch

    digest = hashlib.sha256()
    state = module.state_dict() if isinstance(module, torch.nn.Module) else module.state_dict
    for name, tensor in sorted(state.items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load_program(path: Path) -> LoadedModel:
    from trtforge.converter.program_archive import read_program

    _check_file(path, "the exported program")
    program = read_program(path)
    check_weights(program)
    return LoadedModel(None, None, hash_file(path), module_hash(program), program=program)


def _check_file(path: Path, what: str) -> None:
    if path.is_file():
        if not os.access(path, os.R_OK):
            raise ConfigError(f"{what} {path} cannot be read: permission denied", fix=f"chmod u+r {path}")
        return
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise ConfigError(
        f"{what} {path} does not exist" if not path.exists() else f"{what} {path} is not a file",
        fix=nearest(path.name, siblings) if siblings else f"there is no folder {path.parent}",
    )


def _call_factory(source: Source, folder: Path) -> torch.nn.Module:
    import torch

    assert source.factory is not None
    # A factory with random weights gives the same ones every time, and the caller's generator goes on as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = call_reference(source.factory, source.kwargs, folder=folder, what="factory")
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(
            f"factory {source.factory} gave {type(module).__name__}, not a torch.nn.Module",
            fix="return the module itself",
        )
    return module


def _load_checkpoint(module: torch.nn.Module, path: Path) -> None:
    state = _read_checkpoint(path)
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key}: model {tuple(own[key].shape)}, checkpoint {tuple(state[key].shape)}"
        for key in own
        if key in state and hasattr(own[key], "shape") and own[key].shape != state[key].shape
    ]
    if missing or unexpected or shapes:
        problems = (("missing keys", missing), ("unexpected keys", unexpected), ("other shapes", shapes))
        raise ConfigError(
            f"checkpoint {path} does not fit the model: "
            + "; ".join(f"{len(keys)} {title} ({_some(keys)})" for title, keys in problems if keys),
            fix="check the factory's kwargs, or take the right checkpoint"
            + (f" ({hint})" if (hint := _prefix_hint(missing, unexpected)) else ""),
        )
    module.load_state_dict(state)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    import torch

    if path.suffix == ".safetensors":
        import safetensors
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(f"checkpoint {path} is not a safetensors file: {error}") from error
    try:
        # weights_only: tensors and plain containers; a pickle that would run code is refused by torch.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"checkpoint {path} holds more than tensors, and is not unpickled",
            why=_first_line(error),
            fix="save `module.state_dict()` with torch.save, or write a .safetensors file",
        ) from error
    except Exception as error:  # torch.load raises whatever its readers met in the file
        raise ConfigError(
            f"checkpoint {path} cannot be read: {_first_line(error)}",
            fix="a .pt file of torch.save(module.state_dict()), or .safetensors",
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ConfigError(
            f"checkpoint {path} holds {type(state).__name__}, not a state dict of tensors",
            fix="save `module.state_dict()`",
        )
    return state


def check_weights(module: torch.nn.Module | torch.export.ExportedProgram) -> None:
    """Raises `ConfigError` where a weight is of half precision or holds NaN or infinity; buffers, as masks, may."""
    import torch

    weights = {name: tensor for name, tensor in module.named_parameters() if tensor.is_floating_point()}
    half = [name for name, tensor in weights.items() if tensor.dtype in (torch.float16, torch.bfloat16)]
    if half:
        dtype = str(weights[half[0]].dtype).removeprefix("torch.")
        precision = "fp16" if dtype == "float16" else "bf16"
        raise ConfigError(
            f"{len(half)} of {len(weights)} weights are {dtype}: {_some(half)}",
            why="the module is what every engine is proved against, and it has to be more exact than they are",
            fix=f"give `model.float()`, which changes no value of a weight, and inputs in float32, and ask for "
            f"`precision: {precision}`: the casts are made, and proved, here",
        )
    bad = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor.detach()).all())]
    if bad:
        raise ConfigError(
            f"{len(bad)} weights hold NaN or Inf: {_some(bad)}",
            why="no engine can equal a model whose outputs are undefined",
            fix="take a checkpoint from before training diverged",
        )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN_KEYS]) + (
        f", and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
    )


def _prefix_hint(missing: list[str], unexpected: list[str]) -> str:
    if missing and unexpected:
        for prefix in ("module.", "model.", "_orig_mod."):
            if unexpected[0].startswith(prefix) and unexpected[0].removeprefix(prefix) in missing:
                return f"its keys begin with {prefix!r}: save the inner module's state_dict()"
    return ""
