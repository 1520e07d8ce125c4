"""A network that the user's own function defines with TensorRT's API, layer by layer; in the build's child process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from trtforge.runtime.errors import BuildError

__all__ = ["NetworkSource", "define_network"]


@dataclass(frozen=True, slots=True)
class NetworkSource:
    """A function that adds inputs, layers and outputs to a network: `function(network, trt, **kwargs)`.

    Attributes:
        reference: `package.module:function`.
        kwargs: What it is called with besides; JSON-able.
        paths: Folders that its imports are looked for in, first to last.
    """

    reference: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All attributes by name."""
        return {"reference": self.reference, "kwargs": dict(self.kwargs), "paths": [str(path) for path in self.paths]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NetworkSource:
        """The inverse of `to_json`."""
        return cls(data["reference"], data["kwargs"], tuple(Path(path) for path in data["paths"]))


def define_network(trt: ModuleType, network: Any, source: NetworkSource) -> Any:
    """Lets the user's function fill an empty `INetworkDefinition`.

    Returns:
        What the function returned, to be kept until the engine is built: TensorRT reads the memory of `trt.Weights` as
        late as that, and does not keep it alive.

    Raises:
        BuildError: the function cannot be imported or raised, or the network has no input or no output.
    """
    known = [*map(str, source.paths), *sys.path]
    sys.path[:] = list(dict.fromkeys(known))
    module, _, name = source.reference.partition(":")
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        kept = function(network, trt, **source.kwargs)
    except Exception as error:  # the user's code may raise anything
        where = _last_line(error)
        raise BuildError(
            f"network {source.reference} raised {type(error).__name__}: {error}",
            why=where,
            fix="it is called as function(network, trt, **kwargs) and adds inputs, layers and outputs",
        ) from error
    for kind, count in (("input", network.num_inputs), ("output", network.num_outputs)):
        if not count:
            raise BuildError(
                f"network {source.reference} has no {kind}",
                fix=f"call network.{'add_input' if kind == 'input' else 'mark_output'}(…) in it",
            )
    return kept


def _last_line(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f"at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
