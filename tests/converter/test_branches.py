"""`If` nodes that sizes decide: gone, with equal results; the others untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx_corpus import CORPUS, Case, run_model

import trtforge
from trtforge.converter.branches import check_branches, take_known_branches
from trtforge.converter.cleanup import clean
from trtforge.runtime.errors import ExportError
from trtforge.runtime.graph import OnnxModel, all_graphs, graph_hash, save_graph

# As torch's old exporter writes `x.squeeze(-1)` and a padding: sizes computed in the graph, an If on the last one. The
# branch that is not taken has a weight of its own.
SQUEEZE = """<ir_version: 8, opset_import: ["" : 16]>
g (float[n,LENGTH] x) => (float[n,r] y) {
  zeros = ConstantOfShape <value = int64[1] {0}> (two)
  ends = Concat <axis = 0> (zeros, after)
  padded = Pad (x, ends)
  rows = Unsqueeze (padded, axis)
  pooled = MaxPool <kernel_shape = [4], strides = [4]> (rows)
  shape = Shape (pooled)
  last = Gather (shape, minus)
  alone = Equal (last, one)
  y = If (alone) <
    then_branch = a () => (float[n,s] t) { t = Squeeze (pooled, minus) },
    else_branch = b () => (float[n,u] e) { f = Flatten (pooled)  e = MatMul (f, weight) }
  >
}"""
WEIGHTS = {
    "two": np.array([2]), "after": np.array([0, 2]), "axis": np.array([1]), "minus": np.array([-1]),
    "one": np.array([1]), "weight": np.arange(4, dtype=np.float32).reshape(2, 2),
}  # fmt: skip


def model_of(text: str, **weights: Any) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def operators(model: ir.Model) -> set[str]:
    return {node.op_type for graph in all_graphs(model) for node in graph}


@pytest.mark.parametrize(("length", "kept"), [(2, "Squeeze"), (6, "MatMul")])
def test_what_sizes_decide(length: int, kept: str, tmp_path: Path) -> None:
    proto = model_of(SQUEEZE.replace("LENGTH", str(length)), **WEIGHTS)
    model = ir.from_proto(proto)
    assert take_known_branches(model)
    clean(model)
    assert not operators(model) & {"If", "Shape", "Gather", "ConstantOfShape"}
    assert kept in operators(model)
    assert ("weight" in model.graph.initializers) == (kept == "MatMul")
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    x = np.random.default_rng(0).standard_normal((3, length)).astype(np.float32)
    np.testing.assert_array_equal(run_model(model, {"x": x})["y"], run_model(proto, {"x": x})["y"])
    assert not take_known_branches(model)


def test_what_they_do_not_decide() -> None:
    model = ir.from_proto(model_of(SQUEEZE.replace("LENGTH", "m"), **WEIGHTS))
    before = graph_hash(model)
    assert not take_known_branches(model)
    assert graph_hash(model) == before


def test_a_branch_that_these_sizes_exclude(tmp_path: Path) -> None:
    """As in silero_vad: an input chooses between networks, and each takes its own length."""
    text = """<ir_version: 8, opset_import: ["" : 16]>
    g (float[n,6] x, bool eight) => (float[n,3] y) {
      y = If (eight) <
        then_branch = a () => (float[n,3] t) { t = MatMul (x, small) },
        else_branch = b () => (float[n,3] e) { e = MatMul (x, large) }
      >
    }"""
    weights = {name: np.ones((rows, 3), np.float32) for name, rows in (("small", 4), ("large", 6))}

    def saved(text: str) -> OnnxModel:
        model = ir.from_proto(model_of(text, **weights))
        model.graph[0].name = "choice"
        return save_graph(model, tmp_path / "model.onnx")

    with pytest.raises(ExportError, match="a branch of the If 'choice' cannot be computed") as caught:
        check_branches(saved(text))
    assert "MatMul" in caught.value.why
    assert "export the network that you need alone" in caught.value.fix
    check_branches(saved(text.replace("n,6", "n,m")))


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_the_corpus_keeps_its_results(case: Case) -> None:
    model = ir.from_proto(case.proto())
    clean(model)
    before = graph_hash(model)
    if not take_known_branches(model):
        assert graph_hash(model) == before
        return
    clean(model)
    after = run_model(model, case.feeds(2))
    for name, array in case.expected(2).items():
        np.testing.assert_allclose(after[name], array, rtol=1e-6, atol=1e-6)


def test_a_conversion_to_fp16(tmp_path: Path) -> None:
    """An LSTM without its first result beside it: probes of the overflow guard pass over what has no name."""
    text = """<ir_version: 8, opset_import: ["" : 16]>
    g (float[n,3] x) => (float[1,n,2] y) {
      one = Unsqueeze (x, zero)
      shape = Shape (one)
      first = Gather (shape, zero)
      single = Equal (first, ones)
      y = If (single) <
        then_branch = a () => (float[1,n,2] t) { , t = LSTM <hidden_size = 2> (one, w, r) },
        else_branch = b () => (float[k,n,3] e) { e = Identity (one) }
      >
    }"""
    random = np.random.default_rng(0)
    weights = {"w": (1, 8, 3), "r": (1, 8, 2)}
    made = {name: random.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    onnx.save(model_of(text, zero=np.array([0]), ones=np.array([1]), **made), tmp_path / "lstm.onnx")
    artifact = trtforge.convert(
        tmp_path / "lstm.onnx", None, tmp_path / "made", precision="fp16", dims={"n": (1, 2, 4)}
    )
    assert artifact.status in ("portable", "built", "validated")
    assert "If" not in operators(ir.load(artifact.model))
