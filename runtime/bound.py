"""A call of an engine at tensors that stay: without copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.lanes import Lane, Plan, Replay

__all__ = ["Bound"]


class Bound:
    """A call of an engine at fixed tensors; made by `Engine.bind`. Call it to run again, on the current stream.

    Calls from any threads, of this and of the engine, never overlap on the GPU where they share the engine's memory.
    What the caller does with the tensors on other streams is the caller's to order, as with any torch operation.

    Args:
        enter: Prepares the calling thread and gives its current stream; keeps the engine alive.
        lane: Where it runs.
        plan: For the shapes of the tensors.
        replay: The captured run at their addresses, or None.
        inputs: Bound inputs, in order.
        outputs: Bound outputs, in order.
        results: What a call returns: the output, or a dict by name.
    """

    def __init__(
        self,
        enter: Callable[[], int],
        lane: Lane,
        plan: Plan,
        replay: Replay | None,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        results: Any,
    ) -> None:
        self._enter = enter
        self._lane = lane
        self._plan = plan
        self._replay = replay
        self._inputs = tuple(inputs)
        self._results = results
        # The tensors must live as long as their addresses are used.
        self._tensors = (*inputs, *outputs)
        self._addresses = tuple(tensor.data_ptr() for tensor in self._tensors)

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """The bound inputs, in order."""
        return self._inputs

    @property
    def outputs(self) -> Any:
        """The bound output, or a dict by name."""
        return self._results

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph is replayed; if not, every call puts the layers on the stream one by one."""
        return self._replay is not None

    def __call__(self) -> Any:
        """Runs on what the inputs hold now; returns the bound outputs, which the next call overwrites.

        Raises:
            ConfigError: the engine was closed.
            ArtifactError: the GPU failed.
        """
        stream = self._enter()
        lane = self._lane
        with lane.lock:
            if lane.closed:
                raise ConfigError("the engine was closed", fix="load it again")
            lane.run_at(self._plan, self._addresses, self._replay, stream)
        return self._results
