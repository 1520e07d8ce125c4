"""How far a candidate is from the reference after each layer: the curve that a report shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trtforge.runtime.runner import Array, Tensors
from trtforge.validation.bisect import Side
from trtforge.validation.cuts import constant_nodes, cut_graph, main_values
from trtforge.validation.metrics import measure

__all__ = ["LayerError", "measure_layers"]

_BUDGET = 256 << 20
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
            measures = measure(right, got)
            broken = measures.candidate_nonfinite > measures.reference_nonfinite
            sqnr = float("-inf") if broken else measures.sqnr_db
            finite = np.abs(right[np.isfinite(right)])
            node = layers[name]
            found.append(LayerError(node.name or "", node.op_type, name, sqnr, float(finite.max(initial=0.0))))
    return found


def _chunks(
    names: Sequence[str], reference: Side, candidate: Side, sample: Tensors, budget: int
) -> Iterator[list[tuple[str, Array, Array]]]:
    start, size = 0, _FIRST
    while start < len(names):
        chunk = names[start : start + size]
        (right,) = reference.run(cut_graph(reference.model, chunk), [sample])
        (got,) = candidate.run(cut_graph(candidate.model, chunk), [sample])
        yield [(name, right[name], got[name]) for name in chunk]
        largest = max(array.nbytes for array in right.values())
        start, size = start + size, max(1, budget // max(2 * largest, 1))
