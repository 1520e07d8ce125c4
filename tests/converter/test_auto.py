"""`precision: auto` and mending: what overflows is found by measuring, the overflow guard being switched off."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trtforge
from trtforge.converter import cli
from trtforge.converter.bisect import bisect_folder
from trtforge.converter.progress import Stages
from trtforge.validation.golden import GoldenSet

CASES = Path(__file__).parents[1] / "cases" / "overflow_models.py"

LINES = {"layer_norm": "centred * centred", "l2_norm": "(wide * wide).sum"}
"""The line that overflows."""

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    shutil.copy(CASES, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "overflow_models", raising=False)  # else lines are an earlier test's copy's

    def call(factory: str, precision: Any, *, scale: float, rare: float = 0.0, **more: Any) -> tuple[int, str]:
        loader = {"loader": "overflow_models:inputs", "kwargs": {"rare": rare}}
        model = {
            "source": {"factory": f"overflow_models:{factory}", "kwargs": {"scale": scale}},
            "dims": {"batch": [1, 8, 8]},
            "inputs": {"x": {"shape": ["batch", 16]}},
            "precision": precision,
            "overflow_guard": False,
            "validation": {"accuracy": {"metric": "top1", "labels": "model", "max_drop": 0.02, **loader}},
            **more,
        }
        Path("model.yaml").write_text(json.dumps({"version": 1, "models": {"m": model}}))
        monkeypatch.setattr(sys, "argv", ["trtforge", "convert", "model.yaml"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        _, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), err

    return call


@pytest.mark.parametrize(("factory", "wide", "narrow"), [("layer_norm", 500.0, 10.0), ("l2_norm", 100.0, 2.0)])
@pytest.mark.parametrize("rare", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_overflows_alone_stays_in_fp32(run: Run, factory: str, wide: float, narrow: float, rare: bool) -> None:
    scale, share = (narrow, 0.1) if rare else (wide, 0.0)
    code, err = run(factory, "fp16", scale=scale, rare=share)
    assert code == 4, err
    assert not Path("artifacts/m").exists()
    failed = trtforge.open_artifact("artifacts/m.failed")
    golden = json.loads((failed.path / "report.json").read_text())["reports"][-1]["verdict"]
    assert golden == ("passed" if rare else "failed")
    assert failed.facts["accuracy"]["verdict"] == "failed"
    worst = GoldenSet.load(failed.path / "accuracy" / "worst")
    assert worst.runner == "torch"
    assert all(sample.sizes == {"batch": 1} for sample in worst.samples)
    found = bisect_folder(failed.path, Stages())
    assert found.outcome == "mended", found.to_json()
    blame = found.blames[0]
    assert blame.symptom.kind == "overflow"
    assert LINES[factory] in blame.code
    found.plan.save(Path("mended.yaml"))
    code, err = run(factory, "mended.yaml", scale=scale, rare=share)
    assert code == 0, err
    code, err = run(factory, "auto", scale=scale, rare=share)
    assert code == 0, err
    artifact = trtforge.open_artifact("artifacts/m")
    assert artifact.plan.default == "fp16"
    assert artifact.facts["precision"] == "fp16"
    kept = [rule for rule in artifact.plan.rules if rule.origin == "accuracy"]
    assert 1 <= len(kept) <= 8
    assert all(rule.precision == "fp32" and rule.reason for rule in kept)
    assert not [rule for rule in kept if "Gemm" in f"{rule.id}{rule.op}" or "MatMul" in f"{rule.id}{rule.op}"]
    search = artifact.facts["search"]
    table = {row["name"]: row for row in search["candidates"]}
    assert set(table) == {"fp32", "bf16", "fp16"}
    assert search["chosen"] == "fp16"
    assert len(table["fp16"]["kept_back"]) == len(kept)
    assert table["fp16"]["unmended"]
    assert search["evaluations"] <= 40
