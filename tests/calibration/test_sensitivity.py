from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from trtforge.calibration.placement import quantizable_tensors
from trtforge.calibration.ranges import Ranges, TensorRange
from trtforge.calibration.sensitivity import (
    LayerGain,
    Sensitivity,
    keep_in_float,
    rank_layers,
    score_plan,
    worst_sqnr,
)
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.graph import META_MODULE, node_refs
from trtforge.runtime.precision import PrecisionPlan, Rule
from trtforge.runtime.runner import Tensors

INT8 = PrecisionPlan(default="int8", base="fp16")
Parse = Callable[..., ir.Model]
Call = Callable[..., Any]
LAYERS = 6
BROKEN = 4


def deep(parse_graph: Parse) -> ir.Model:
    nodes, previous = [], "x"
    for index in range(LAYERS):
        out = "y" if index == LAYERS - 1 else f"r{index}"
        nodes.append(f"m{index} = MatMul({previous}, w{index}) {out} = Tanh(m{index})")
        previous = out
    text = f"(float[N,16] x) => (float[N,16] y) {{ {' '.join(nodes)} }}"
    model = parse_graph(text, {f"w{index}": (16, 16) for index in range(LAYERS)})
    for node in model.graph:
        node.metadata_props[META_MODULE] = f"block.{node.outputs[0].name}"
    return model


@pytest.fixture
def case(
    parse_graph: Parse, max_ranges: Call, random_feeds: Call
) -> tuple[ir.Model, Ranges, list[dict[str, np.ndarray]]]:
    """A chain of six layers; the range of what enters the fifth is 40 times too wide."""
    model = deep(parse_graph)
    feeds = random_feeds(model, 32)
    ranges = max_ranges(model, quantizable_tensors(model, INT8).measured, feeds)
    name = f"r{BROKEN - 1}"
    wide = TensorRange(ranges[name].amax * 40, "max")
    return model, Ranges({**ranges.tensors, name: wide}), [{"x": feeds["x"][:16]}, {"x": feeds["x"][16:]}]


@pytest.mark.parametrize("strategy", ["each", "bisect"])
def test_the_broken_layer_is_found_and_mended(case: Any, strategy: Any) -> None:
    model, ranges, samples = case
    before = ir.to_proto(model).SerializeToString()
    events: list[dict[str, Any]] = []
    found = rank_layers(model, ranges, INT8, samples, strategy=strategy, worst=2, threads=1, on_event=events.append)
    assert ir.to_proto(model).SerializeToString() == before
    worst = found.layers[0]
    assert (worst.node, worst.op, worst.module) == (f"MatMul#{BROKEN}", "MatMul", f"block.m{BROKEN}")
    assert worst.gain == pytest.approx(worst.score - found.quantized)
    assert worst.gain > 10 * abs(found.layers[1].gain)
    assert len(found.layers) == (LAYERS if strategy == "each" else 2)
    assert found.samples == 2
    assert found.runs == len(events) + 1
    assert [event["done"] for event in events] == list(range(1, len(events) + 1))
    assert all(event["done"] <= event["total"] for event in events)
    plan = keep_in_float(INT8, found, 1, node_refs(model), "hash")
    assert score_plan(model, ranges, plan, samples, threads=1) == pytest.approx(worst.score)
    assert Sensitivity.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_rules_go_by_module_where_it_selects_one_layer_and_else_by_id(case: Any) -> None:
    model, _, _ = case
    layers = tuple(
        LayerGain(f"MatMul#{index}", "MatMul", f"block.m{index}", 30.0 - index, 10.0 - index) for index in range(3)
    )
    found = Sensitivity(20.0, layers, "SQNR in dB", 2, 7, 1.0)
    refs = node_refs(model)
    plan = keep_in_float(INT8, found, 2, refs, "hash")
    assert [rule.describe() for rule in plan.rules] == [
        "module: block.m0, op: MatMul, precision: fp16",
        "module: block.m1, op: MatMul, precision: fp16",
    ]
    assert {rule.origin for rule in plan.rules} == {"sensitivity"}
    assert plan.rules[0].reason == "SQNR in dB rises from 20 to 30 with it in float"
    assert plan.graph is None
    flat = [replace(ref, module="block") for ref in refs]
    by_id = keep_in_float(
        INT8, replace(found, layers=tuple(replace(g, module="block") for g in layers)), 1, flat, "hash"
    )
    assert (by_id.rules[0].id, by_id.graph) == ("MatMul#0", "hash")
    assert [name for name, found in plan.resolve(refs).items() if found.precision == "fp16"] == ["MatMul#0", "MatMul#1"]


def test_layers_that_gain_nothing_get_no_rule() -> None:
    layers = (LayerGain("a", "MatMul", "", 21.0, 1.0), LayerGain("b", "MatMul", "", 20.0, 0.0))
    plan = keep_in_float(INT8, Sensitivity(20.0, layers, "SQNR in dB", 1, 3, 0.1), 8, [], "hash")
    assert [rule.id for rule in plan.rules] == ["a"]


def test_a_score_of_the_callers_own(case: Any) -> None:
    model, ranges, samples = case

    def agreement(reference: Sequence[Tensors], candidate: Sequence[Tensors]) -> float:
        pairs = zip(reference, candidate, strict=True)
        return float(np.mean([a["y"].argmax(1) == b["y"].argmax(1) for a, b in pairs]))

    found = rank_layers(model, ranges, INT8, samples, score=agreement, threads=1)
    assert found.measure == "agreement"
    assert 0 <= found.quantized < 1
    assert found.layers[0].node == f"MatMul#{BROKEN}"


def test_nothing_to_measure_is_an_error(case: Any) -> None:
    model, ranges, samples = case
    with pytest.raises(CalibrationError, match="no samples"):
        rank_layers(model, ranges, INT8, [])
    with pytest.raises(CalibrationError, match="quantizes no layer"):
        rank_layers(model, ranges, PrecisionPlan(default="fp16"), samples, threads=1)
    with pytest.raises(CalibrationError, match="have no range"):
        rank_layers(model, Ranges({}), INT8, samples, threads=1)


def test_rules_of_the_plan_are_kept(case: Any) -> None:
    model, ranges, samples = case
    plan = INT8.with_rules([Rule("fp32", id=f"MatMul#{BROKEN}")])
    found = rank_layers(model, ranges, plan, samples, threads=1)
    assert f"MatMul#{BROKEN}" not in [layer.node for layer in found.layers]
    assert found.quantized > rank_layers(model, ranges, INT8, samples, threads=1).quantized + 10


def test_the_lowest_float_output_counts() -> None:
    good = {"a": np.array([1.0, 2.0], np.float32), "b": np.array([10.0], np.float32), "ids": np.array([1, 2])}
    assert worst_sqnr([good], [good]) == 300.0
    worse = {**good, "b": np.array([11.0], np.float32), "ids": np.array([5, 5])}
    assert worst_sqnr([good], [worse]) == pytest.approx(20.0)
    assert worst_sqnr([good], [{**good, "b": np.array([np.nan], np.float32)}]) == -300.0
    assert worst_sqnr([{"a": np.zeros(2, np.float32)}], [{"a": np.ones(2, np.float32)}]) == -300.0
    with pytest.raises(CalibrationError, match=r"no float output.*\n.*ids \(int64\)"):
        worst_sqnr([{"ids": good["ids"]}], [{"ids": good["ids"]}])
