"""The PyTorch model of an artifact, for the peers that need it: from a configuration, or from what was recorded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from trtforge.converter.artifact import Artifact
from trtforge.converter.batch import select_models
from trtforge.converter.config import ConversionConfig, Source
from trtforge.runtime.errors import ConfigError

if TYPE_CHECKING:
    from trtforge.runtime.peers import PeerModel

__all__ = ["find_model"]

_PEER_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


def find_model(artifact: Artifact, config: Path | None, only: str | None) -> PeerModel:
    """Makes the model again.

    Args:
        artifact: Holds no PyTorch code, but says where its model came from.
        config: The YAML file that it was converted from; None: the factory that the manifest names, looked for in the
            current folder and in what is installed.
        only: The model in `config`, where it has several.

    Raises:
        ConfigError: there is no factory, it cannot be imported, or it makes another model than the artifact's.
        UserCodeError: the factory raised.
    """
    import torch

    from trtforge.converter.example import example_from_specs
    from trtforge.converter.sources import load_source
    from trtforge.runtime.peers import PeerModel

    chosen = _from_file(config, only) if config is not None else _from_manifest(artifact)
    loaded = load_source(chosen)
    recorded = artifact.facts["source"]
    if loaded.module is None:
        raise ConfigError(f"{chosen.name} is a file, not a module of PyTorch", fix="give a source with a factory")
    if (loaded.source_hash, loaded.checkpoint_hash) != (recorded["hash"], recorded["checkpoint_sha256"]):
        raise ConfigError(
            f"{chosen.source.factory} does not make the model of {artifact.path}",
            why="its arguments or its weights are others than those recorded",
            fix="give --config FILE --only NAME of the conversion, with the same checkpoint",
        )
    example = example_from_specs(loaded.module, artifact.inputs, artifact.profiles)
    names = [spec.name for spec in example.specs]
    given = [spec.name for spec in artifact.inputs]
    order = [given.index(name) for name in names]
    return PeerModel(
        loaded.module,
        lambda tensors: example.bind([tensors[index] for index in order]),
        getattr(torch, _PEER_DTYPES.get(artifact.plan.float_default, "float32")),
    )


def _from_file(file: Path, only: str | None) -> ConversionConfig:
    configs = select_models(file, only)
    if len({(c.source.factory, repr(c.source.kwargs), c.source.checkpoint) for c in configs}) > 1:
        names = ", ".join(config.name for config in configs)
        raise ConfigError(f"{file} has {len(configs)} models: {names}", fix="choose one with --only")
    return configs[0]


def _from_manifest(artifact: Artifact) -> ConversionConfig:
    recorded = artifact.facts["source"]
    if "factory" not in recorded:
        raise ConfigError(
            f"{artifact.path} does not say which code makes its model",
            why="it was converted from a file, or from a module in Python",
            fix="give --config FILE --only NAME",
        )
    checkpoint = recorded.get("checkpoint")
    source = Source(recorded["factory"], recorded["kwargs"], Path(checkpoint) if checkpoint else None)
    return ConversionConfig(artifact.name, source=source, folder=Path(os.getcwd()))  # noqa: PTH109  # as typed
