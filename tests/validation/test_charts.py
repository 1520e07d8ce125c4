"""Charts: what they show of the data, and that the page's other parts are drawn from report.json alone."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.validation import charts
from trtforge.validation.histogram import errors_by_magnitude
from trtforge.validation.index_page import IndexEntry, render_index
from trtforge.validation.pages import render_page
from trtforge.validation.parity import OutputResult, Verdict
from trtforge.validation.proof import Proof
from trtforge.validation.report import ReportData

CANDIDATES: list[dict[str, Any]] = [
    {"name": "fp32", "latency_ms": 2.9, "size_bytes": 100 << 20, "accuracy": 0.78, "passed": True, "kept_back": []},
    {"name": "fp16", "latency_ms": 1.6, "size_bytes": 50 << 20, "accuracy": 0.779, "passed": True, "kept_back": ["a"]},
    {"name": "int8", "latency_ms": 3.2, "size_bytes": 26 << 20, "accuracy": 0.70, "passed": False, "kept_back": []},
    {"name": "fp8", "latency_ms": None, "size_bytes": 26 << 20, "accuracy": None, "passed": False, "kept_back": []},
]


def titles(svg: str) -> list[str]:
    return re.findall(r"<title>(.*?)</title>", svg)


def test_errors_by_magnitude_count_every_finite_value_once() -> None:
    reference = np.array([0, 0.3, 0.6, 0.7, -3, np.nan], np.float32)
    candidate = np.array([0.5, 0.3, 0.6, 0.9, -3.5, 0], np.float32)
    found = errors_by_magnitude([(reference, candidate)])
    assert [(m.exponent, m.count) for m in found] == [(-64, 1), (-1, 1), (0, 2), (2, 1)]
    assert found[2].rms == pytest.approx(np.sqrt(0.2**2 / 2), rel=1e-6)
    assert found[2].greatest == pytest.approx(0.2, rel=1e-6)
    assert errors_by_magnitude([]) == ()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=50))
def test_errors_by_magnitude_add_up(pairs: list[tuple[float, float]]) -> None:
    reference, candidate = np.array([r for r, _ in pairs]), np.array([c for _, c in pairs])
    found = errors_by_magnitude([(reference, candidate)])
    assert sum(m.count for m in found) == len(pairs)
    total = float(np.sum((candidate - reference) ** 2))
    assert sum(m.count * m.rms**2 for m in found) == pytest.approx(total, rel=1e-9, abs=1e-300)


def test_scatter_has_a_line_for_one_rounding() -> None:
    rng = np.random.default_rng(0)
    r = (rng.standard_normal(5000) * 10.0 ** rng.integers(-3, 3, 5000)).astype(np.float32)
    magnitudes = errors_by_magnitude([(r, r.astype(np.float16).astype(np.float32))])
    output = OutputResult("y", "float32", Verdict.PASSED, magnitudes=magnitudes)
    assert "rounding once to fp16" in charts.error_scatter(output, "fp16")
    assert "rounding once" not in charts.error_scatter(output, "int8")
    assert charts.error_scatter(OutputResult("y", "float32", Verdict.PASSED)) == ""


def test_layers_are_named_and_those_below_the_limit_marked() -> None:
    layers = [
        {"node": f"n{i}", "op": "Conv", "tensor": f"t{i}", "sqnr_db": value, "greatest": 1.0}
        for i, value in enumerate([60.0, "inf", 20.0, "-inf"])
    ]
    svg = str(charts.layer_curve(layers, 30))
    assert titles(svg) == ["n0 (Conv): 60.0 dB", "n1 (Conv): equal", "n2 (Conv): 20.0 dB", "n3 (Conv): NaN or Inf"]
    assert svg.count('class="dot beyond"') == 2
    assert "nan" not in svg.lower().replace("nan or inf", "")


def test_pareto_joins_the_front_and_leaves_out_what_was_not_measured() -> None:
    svg = str(charts.pareto(CANDIDATES, "fp16"))
    assert [title.partition(":")[0] for title in titles(svg)] == ["fp32", "fp16", "int8"]
    (front,) = re.findall(r'class="front" points="(.*?)"', svg)
    assert len(front.split()) == 2  # fp16, then fp32; int8 is slower and worse
    assert "latency, ms" in svg
    untimed = [{**candidate, "latency_ms": None} for candidate in CANDIDATES]
    assert "size, MiB" in str(charts.pareto(untimed))
    assert charts.pareto([]) == ""


def test_the_page_shows_what_the_json_holds() -> None:
    facts = {
        "layers": [{"node": f"n{i}", "op": "Conv", "tensor": "t", "sqnr_db": 40.0 + i, "greatest": 1} for i in (0, 1)],
        "ranges": [
            {"name": "act<1>", "format": "int8", "amax": 3.0, "method": "entropy", "sqnr_db": 31.5, "peak": 4.0,
             "clipped_fraction": 0.01, "counts": [9, 3, 1, 1], "width": 1.0},
            {"name": "imported", "format": "int8", "amax": 2.0, "method": "imported"},
        ],
        "search": {"candidates": CANDIDATES, "chosen": "fp16"},
        "engine_layers": [{"name": "conv+relu", "type": "kgen", "nodes": ["a/Conv#0", "a/Relu#0"], "outputs": []}],
    }  # fmt: skip
    data = ReportData("net", "validated", Proof(()), facts)
    page = render_page(replace(data, facts=ReportData.from_json(data.to_json()).facts))
    for expected in ("n0 (Conv): 40.0 dB", "act&lt;1&gt;", "31.5 dB", "imported", "not timed", "chosen", "a/Relu#0",
                     "1 layers from 2 ONNX nodes", 'href="#search"'):  # fmt: skip
        assert expected in page, expected
    bare = render_page(ReportData("net", "portable", Proof(())))
    for absent in ('id="layers"', 'id="search"', 'id="calibration"', 'id="engine"'):
        assert absent not in bare


def test_an_index_lists_failures_first_and_escapes_names() -> None:
    def entry(name: str, verdict: Verdict) -> IndexEntry:
        return IndexEntry(name, "built", verdict, "fp16", "onnxruntime", 48.6, 0.01, 1000, "2026-11-23T00:00:00", "")

    page = render_index("batch", [entry("a", Verdict.PASSED), entry("<b> c", Verdict.FAILED)])
    assert page.index("&lt;b&gt; c") < page.index(">a</a>")
    assert 'href="%3Cb%3E%20c/report.html"' in page
    assert "1 of 2 proved equal" in page
