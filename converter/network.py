"""Engines whose network the user's function defines by TensorRT's API: what may be asked of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtforge.converter.config import ConversionConfig, Source
from trtforge.converter.references import find_reference
from trtforge.runtime.errors import BuildError, ConfigError

if TYPE_CHECKING:
    from trtforge.runtime.trt.network import NetworkSource

__all__ = ["check_network", "network_source", "with_network"]


def check_network(config: ConversionConfig, runs_here: bool) -> None:
    """Refuses what cannot be proved.

    Imports the function, without calling it: a wrong name is told before the export, and the file counts for whether
    the model is unchanged.

    Raises:
        ConfigError: there is no such function; or the plan asks for more than one float precision, which is the
            network's own business.
        BuildError: no GPU runs the engine: its run is the only proof, since no ONNX stands for it.
    """
    plan, name = config.plan, config.source.network
    assert name is not None
    find_reference(name, folder=config.folder, what="network")
    if plan.rules or plan.quantizes or config.search.auto:
        raise ConfigError(
            f"the network {name} decides its own precision, and the plan has rules or quantizes",
            fix="give one of fp32, tf32, fp16 and bf16: it says which tolerance the engine is held to",
        )
    if not runs_here:
        raise BuildError(
            f"the engine of {name} can only be proved by running it, and no GPU here runs it",
            why="an ONNX file can be proved on the CPU in its engine's place; a network defined layer by layer cannot",
            fix="convert on a machine with a GPU",
        )


def network_source(config: ConversionConfig) -> NetworkSource | None:
    """What the build's child is told of the network; None where the ONNX is built."""
    from trtforge.runtime.trt.network import NetworkSource

    source = config.source
    if source.network is None:
        return None
    # What this process can import, that one can, in the same order.
    paths = (config.folder.absolute(), Path.cwd(), *(Path(path) for path in sys.path if path))
    return NetworkSource(source.network, source.network_kwargs, paths)


def with_network(source: Source, network: str | Callable[..., Any] | None, kwargs: Mapping[str, Any] | None) -> Source:
    """The source with `convert(network=…, network_kwargs=…)`.

    Raises:
        ConfigError: a function that another process cannot import, or arguments that JSON cannot hold.
    """
    if network is None:
        if kwargs:
            raise ConfigError("network_kwargs are given and no network", fix="give `network`, or leave them out")
        return source
    if source.onnx is not None:
        raise ConfigError("a network is proved against PyTorch, and the model is an ONNX file", fix="give the module")
    named = network if isinstance(network, str) else _name(network)
    try:
        json.dumps(dict(kwargs or {}))
    except TypeError as error:
        raise ConfigError(
            f"network_kwargs hold what JSON does not: {error}",
            why="the function runs in another process",
            fix="give numbers, text and lists; pass weights as the path of a file",
        ) from None
    return replace(source, network=named, network_kwargs=dict(kwargs or {}))


def _name(function: Callable[..., Any]) -> str:
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    if module in ("", "__main__") or "<" in name or not name:
        raise ConfigError(
            f"network is {name or function!r} of {module or 'nowhere'}, which another process cannot import",
            fix="put the function at the top level of a module, and pass it or its name, package.module:function",
        )
    return f"{module}:{name}"
