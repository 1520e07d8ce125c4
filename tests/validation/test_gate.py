"""benchmarks/gate.py on fewer perturbations: how often the gate passes what is known to be beyond the budget."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

GATE = Path(__file__).parents[2] / "benchmarks" / "gate.py"


@pytest.fixture(scope="module")
def gate() -> Any:
    spec = importlib.util.spec_from_file_location("gate_benchmark", GATE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gate_keeps_its_word_in_small_samples(gate: Any) -> None:
    found = gate.measure("top1", 40, 50, count=200)
    assert found["runs"] == 2000
    assert found["false_passes"] <= 0.065


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["top1", "miou", "wer", "cosine"])
def test_gate_keeps_its_word(gate: Any, metric: str) -> None:
    found = gate.measure(metric, 200, 50)
    assert found["runs"] == 10_000
    assert found["false_passes"] <= 0.065
    assert found["false_passes_just_beyond"] <= 0.065
    assert found["false_failures"] <= 0.065
