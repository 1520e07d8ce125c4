"""Lines through graphs, and the pieces between them: both halves together are the whole."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_corpus import CORPUS, Case, run_model

from trtforge.validation.cuts import cut_graph, find_cuts, main_values


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_both_sides_of_every_line_are_the_whole(case: Case) -> None:
    model = case.prepared()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    feeds, outputs = case.feeds(2), [value.name or "" for value in model.graph.outputs]
    whole = run_model(model, feeds)
    cuts = find_cuts(model, set(main_values(model)))
    assert cuts[0].position == 0
    assert cuts[-1].position == len(list(model.graph))
    for cut in cuts[:: max(1, len(cuts) // 4)]:
        made = [name for name in cut.tensors if name not in feeds]
        tensors = {**feeds, **(_run(cut_graph(model, made), feeds) if made else {})}
        behind = [name for name in outputs if name not in cut.tensors]
        found = _run(cut_graph(model, behind, cut.tensors), tensors) if behind else {}
        for name in outputs:
            np.testing.assert_array_equal(found.get(name, tensors.get(name)), whole[name])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def _run(model: ir.Model, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return run_model(model, {value.name or "": tensors[value.name or ""] for value in model.graph.inputs})


def test_a_line_that_an_unknown_tensor_crosses_is_none() -> None:
    model = next(case.prepared() for case in CORPUS if case.name == "layer_norm")
    every = set(main_values(model))
    hidden = next(value.name or "" for node in model.graph for value in node.outputs if not value.is_graph_output())
    lines = [cut.position for cut in find_cuts(model, every)]
    fewer = [cut.position for cut in find_cuts(model, every - {hidden})]
    assert set(fewer) < set(lines)
