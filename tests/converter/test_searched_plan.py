"""The plan that a search wrote, carried out again, is the same graph."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import trtforge
from trtforge.converter import cli
from trtforge.converter.carry import carry_out
from trtforge.runtime.graph import describe_model, graph_hash, load_graph
from trtforge.runtime.precision import PrecisionPlan
from trtforge.runtime.trt.backend import find_backend

CASES = Path(__file__).parents[1] / "cases" / "searched_models.py"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(CASES, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "searched_models", raising=False)


def convert(monkeypatch: pytest.MonkeyPatch, name: str, precision: str, **calibration: Any) -> trtforge.Artifact:
    def rows(seed: int, count: int) -> dict[str, Any]:
        return {"loader": "searched_models:rows", "kwargs": {"seed": seed, "count": count}}

    model = {
        "source": {"factory": "searched_models:net"},
        "dims": {"batch": [1, 8, 8]},
        "inputs": {"x": {"shape": ["batch", 32]}},
        "precision": precision,
        "calibration": calibration or rows(0, 8),
        "validation": {"accuracy": {"metric": "top1", "labels": "model", "max_drop": 0.03, **rows(1, 120)}},
    }
    Path("model.yaml").write_text(json.dumps({"version": 1, "models": {name: model}}))
    monkeypatch.setattr(sys, "argv", ["trtforge", "convert", "model.yaml"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code in (None, 0)
    return trtforge.open_artifact(f"artifacts/{name}")


def test_with_its_ranges_a_searched_plan_is_the_same_graph_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = convert(monkeypatch, "found", "int8")
    (row,) = found.facts["search"]["candidates"]
    assert row["unmended"]
    assert row["kept_back"]
    assert 0 < row["shares"]["int8"] < 1
    assert len(row["tried"]) == row["looks"] >= 2
    assert not row["tried"][0]["passed"]
    assert min(look["kept_back"] for look in row["tried"] if look["passed"]) == len(row["kept_back"])
    made = found.facts["graphs"]["model"]
    place = found.path / "precision.yaml"

    again = convert(monkeypatch, "again", str(place), ranges=str(found.path / "calibration.json"))
    (row,) = again.facts["search"]["candidates"]
    assert (row["unmended"], row["looks"]) == (None, 1)
    assert again.facts["graphs"]["model"] == made
    assert PrecisionPlan.load(again.path / "precision.yaml").rules == PrecisionPlan.load(place).rules

    reference = describe_model(load_graph(found.reference), found.reference)
    backend = find_backend("auto")
    assert backend is not None
    half = backend.capabilities.half_quantized_products
    assert graph_hash(carry_out(reference, PrecisionPlan.load(place), found.path, half_products=half).model) == made
