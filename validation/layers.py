"""How far a candidate is from the reference after each layer: the curve that a report shows.

Both graphs run once, a stretch of layers at a time: what crosses the end of a stretch is kept and fed to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trtforge.runtime.runner import Array, Tensors
from trtforge.validation.bisect import Side
from trtforge.validation.cuts import constant_nodes, cut_graph, find_cuts, main_values
from trtforge.validation.metrics import measure_noise

__all__ = ["LayerError", "measure_layers"]

_BUDGET = 512 << 20
"""Bytes of tensors that leave one run of either graph at once, as far as the run before lets them be foreseen."""
_FIRST = 16
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


@dataclass(frozen=True, slots=True)
class LayerError:
    """What one node's first float result has of error, inherited and own together.

    Attributes:
        node: Its id.
        op: Its operator.
        tensor: The result's name.
        sqnr_db: Signal to noise ratio in dB, +inf where both are equal, -inf where NaN or Inf came in.
        greatest: Largest |r| of the reference.
    """

    node: str
    op: str
    tensor: str
    sqnr_db: float
    greatest: float

    def to_json(self) -> dict[str, Any]:
        """All fields; infinities as text, which JSON lacks."""
        data = asdict(self)
        return {k: v if not isinstance(v, float) or np.isfinite(v) else str(v) for k, v in data.items()}


def measure_layers(reference: Side, candidate: Side, sample: Tensors, *, budget: int = _BUDGET) -> list[LayerError]:
    """The error after every node of the main graph whose float result both graphs have, in order of execution.

    Args:
        reference: The float graph.
        candidate: The graph with a plan carried out, which keeps the names of tensors.
        sample: Inputs by name.
        budget: Bytes that the tensors of one run may take; one run of each graph has at least one tensor.
    """
    found = []
    constant = constant_nodes(reference.model)
    others = main_values(candidate.model)
    layers: dict[str, ir.Node] = {}
    for node in reference.model.graph:
        value = next((value for value in node.outputs if value.dtype in _FLOATS and value.name in others), None)
        if node not in constant and value is not None and value.name not in layers:
            layers[value.name or ""] = node
    for names in _chunks(list(layers), reference, candidate, sample, budget):
        for name, right, got in names:
            node = layers[name]
            noise = measure_noise(right, got)
            found.append(LayerError(node.name or "", node.op_type, name, noise.sqnr_db, noise.greatest))
    return found


def _chunks(
    names: Sequence[str], reference: Side, candidate: Side, sample: Tensors, budget: int
) -> Iterator[list[tuple[str, Array, Array]]]:
    walks = _Walk(reference, sample), _Walk(candidate, sample)
    start, size = 0, _FIRST
    while start < len(names):
        chunk = names[start : start + size]
        right, got = (walk.run(chunk) for walk in walks)
        yield [(name, right[name], got[name]) for name in chunk]
        largest = max(right[name].nbytes for name in chunk)
        start, size = start + size, max(1, budget // max(2 * largest, 1))


class _Walk:
    """A graph that is run from its inputs to its outputs in stretches."""

    def __init__(self, side: Side, sample: Tensors) -> None:
        self._side = side
        self._sample = sample
        values = main_values(side.model)
        graph = side.model.graph
        self._position = {value.name or "": place for place, node in enumerate(graph, 1) for value in node.outputs}
        inputs = {value.name for value in graph.inputs}
        self._crossing = [
            # A sequence cannot leave a graph here, nor can what has no known type: then the stretch before goes on.
            names if all(isinstance(values[name].type, ir.TensorType) for name in names) else None
            for names in ([name for name in cut.tensors if name not in inputs] for cut in find_cuts(side.model, values))
        ]
        self._kept: Mapping[str, Array] = {}

    def run(self, names: Sequence[str]) -> Mapping[str, Array]:
        """These tensors, and whatever the next stretch needs of this one."""
        crossing = self._crossing[max(self._position[name] for name in names)]
        wanted = [name for name in dict.fromkeys((*names, *(crossing or ()))) if name not in self._kept]
        found = dict(self._kept)
        if wanted:
            piece = cut_graph(self._side.model, wanted, self._kept)
            found |= self._side.run(piece, [{**self._sample, **self._kept}])[0]
        if crossing is not None:
            self._kept = {name: found[name] for name in crossing}
        return found
