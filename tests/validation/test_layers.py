"""Errors by layer: each graph runs once, however few tensors may leave it at a time."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from onnx_corpus import CORPUS, Case, run_model

from trtforge.validation import layers
from trtforge.validation.bisect import Side
from trtforge.validation.cuts import constant_nodes
from trtforge.validation.layers import measure_layers


def _side(model: ir.Model, ran: list[str]) -> Side:
    def run(piece, samples):
        fixed = constant_nodes(piece)
        ran.extend(node.name or "" for node in piece.graph if node not in fixed)
        return [
            run_model(piece, {value.name: sample[value.name] for value in piece.graph.inputs}) for sample in samples
        ]

    return Side(model, run)


def _disturbed(model: ir.Model) -> ir.Model:
    """Other weights; vectors may decide sizes, and stay."""
    copy = model.clone()
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) > 1:
            value.const_value = ir.tensor(tensor.numpy() * np.float32(1 - 2**-10))
    return copy


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_every_layer_runs_once_and_gives_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_FIRST", 1)
    model = case.prepared()
    feeds = case.feeds(2)
    found, ran = {}, {}
    for budget in (1, 1 << 30):
        ran[budget] = [], []
        sides = _side(model, ran[budget][0]), _side(_disturbed(model), ran[budget][1])
        found[budget] = measure_layers(*sides, feeds, budget=budget)
        for names in ran[budget]:
            assert len(names) == len(set(names)), "a node ran twice"
    one, whole = found.values()
    assert [(layer.node, layer.tensor) for layer in one] == [(layer.node, layer.tensor) for layer in whole]
    for a, b in zip(one, whole, strict=True):
        assert a.sqnr_db == pytest.approx(b.sqnr_db, abs=0.1) or min(a.sqnr_db, b.sqnr_db) > 120
        assert a.greatest == pytest.approx(b.greatest, rel=1e-5)


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_a_graph_beside_itself_has_no_error(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_FIRST", 1)
    model = case.prepared()
    for layer in measure_layers(_side(model, []), _side(model, []), case.feeds(2), budget=1):
        assert layer.sqnr_db == math.inf
