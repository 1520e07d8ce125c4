"""An accuracy budget in a conversion: what passes, what is refused with exit code 4, and what is left to look at."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trtforge
from trtforge.converter import cli
from trtforge.runtime.tensors import load_tensors

CASES = Path(__file__).parents[1] / "cases" / "case_models.py"
DATA = {"loader": "case_models:labelled"}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    shutil.copy(CASES, tmp_path)
    monkeypatch.chdir(tmp_path)

    def call(precision: str = "fp16", **accuracy: Any) -> tuple[int, str, str]:
        model = {
            "source": {"factory": "case_models:healthy"},
            "dims": {"batch": [1, 8, 8]},
            "inputs": {"input": {"shape": ["batch", 3, 16, 16]}},
            "precision": precision,
            "validation": {"accuracy": accuracy},
        }
        Path("model.yaml").write_text(json.dumps({"version": 1, "models": {"m": model}}))
        monkeypatch.setattr(sys, "argv", ["trtforge", "convert", "model.yaml"])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err

    return call


def test_within_the_budget_it_is_published_with_its_numbers(run: Run) -> None:
    code, _, err = run(metric="top1", max_drop=0.02, min=0.9, **DATA)
    assert code == 0, err
    artifact = trtforge.open_artifact("artifacts/m")
    accuracy = artifact.facts["accuracy"]
    assert accuracy["verdict"] == "passed"
    (first, *_) = accuracy["results"]
    assert (first["samples"], first["reference"], first["runner"]) == (400, 1.0, "onnxruntime")
    assert first["upper"] <= 0.02
    assert json.loads((artifact.path / "report.json").read_text())["accuracy"] == accuracy
    assert "within its accuracy budget" in (artifact.path / "report.html").read_text().lower()


def test_too_few_samples_are_inconclusive_and_leave_the_old_artifact_alone(run: Run) -> None:
    assert run(metric="top1", max_drop=0.02, **DATA)[0] == 0
    before = Path("artifacts/m/manifest.sha256").read_bytes()
    code, _, err = run(metric="top1", max_drop=0.001, **DATA)
    assert code == 4
    assert "is not shown to keep its accuracy budget" in err
    assert "about 3,000 samples needed" in err
    assert Path("artifacts/m/manifest.sha256").read_bytes() == before
    failed = trtforge.open_artifact("artifacts/m.failed")
    assert failed.status == "failed"
    assert failed.facts["accuracy"]["verdict"] == "inconclusive"
    assert "Accuracy not shown" in (failed.path / "report.html").read_text()
    rows, _ = load_tensors(failed.path / "accuracy" / "scores.safetensors")
    assert rows["reference"].shape == rows["candidate"].shape == (400, 2)
    with pytest.raises(trtforge.ArtifactError, match="never loaded"):
        failed.load()


@pytest.mark.parametrize("metric", ["case_models:one_answer_each", "case_models:mean_answer", "top2"])
def test_other_metrics(run: Run, metric: str) -> None:
    code, _, err = run(metric=metric, max_drop=0.03, **DATA)
    assert code == 0, err
    assert trtforge.open_artifact("artifacts/m").facts["accuracy"]["metric"] == metric


def test_agreement_needs_no_labels(run: Run) -> None:
    code, _, err = run(metric="top1", labels="model", max_drop=0.02, batches=40, **DATA)
    assert code == 0, err
    assert trtforge.open_artifact("artifacts/m").facts["accuracy"]["results"][0]["samples"] == 320


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        ({"metric": "topp1", "max_drop": 0.1, **DATA}, "no accuracy metric 'topp1'"),
        ({"metric": "top1", **DATA}, "max_drop is missing"),
        ({"metric": "top1", "max_drop": 0.1}, "has no data"),
        ({"metric": "top1", "max_drop": 0.1, "output": "logit", **DATA}, "no output 'logit'"),
        ({"metric": "case_models:broken_metric", "max_drop": 0.1, **DATA}, "the user's own division"),
        ({"metric": "case_models:no_metric", "max_drop": 0.1, **DATA}, "no_metric"),
        ({"metric": "cosine", "max_drop": 0.1, **DATA}, "labels: model"),
        ({"metric": "wer", "max_drop": 0.1, **DATA}, "decode"),
        ({"metric": "top1", "max_drop": 0.1, "loader": "case_models:labelled", "kwargs": {"batch": 9}}, "outside"),
    ],
)
def test_what_is_wrong_is_named(run: Run, accuracy: dict[str, Any], said: str) -> None:
    code, _, err = run(**accuracy)
    assert code in (2, 3)
    assert said in err
    assert not Path("artifacts/m.failed").exists()


def test_from_python_with_functions_and_live_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).eval()
    data = [({"input": np.float32(np.random.default_rng(i).normal(size=(8, 6)))}, np.zeros(8, int)) for i in range(30)]

    def agreement(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return (predictions.argmax(1) == 0) == (labels == 0)

    def convert(**accuracy: Any) -> trtforge.Artifact:
        return trtforge.convert(
            model, torch.randn(4, 6), tmp_path / "m", precision="bf16",
            dims={"batch": (1, 4, 8)}, inputs={"input": ("batch", 6)}, accuracy={"data": data, **accuracy},
        )  # fmt: skip

    assert convert(metric=agreement, max_drop=0.05).facts["accuracy"]["verdict"] == "passed"
    with pytest.raises(trtforge.AccuracyError, match="not shown"):
        convert(metric="top1", labels="model", max_drop=0.001)
    with pytest.raises(trtforge.ConfigError, match="did you mean 'max_drop'"):
        convert(metric="top1", maxdrop=0.001)
    with pytest.raises(trtforge.ConfigError, match="max_drop"):
        convert(metric="top1", max_drop=2)


def test_a_search_with_samples_of_its_own_leaves_the_budgets_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).eval()

    def data(seed: int, count: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [rng.standard_normal((8, 6)).astype(np.float32) for _ in range(count)]

    artifact = trtforge.convert(
        model, torch.randn(4, 6), tmp_path / "m", precision="int8", dims={"batch": (1, 4, 8)},
        inputs={"input": ("batch", 6)}, calibration=data(0, 20), search={"data": data(1, 25)},
        accuracy={"metric": "top1", "labels": "model", "max_drop": 0.1, "data": data(2, 50)},
    )  # fmt: skip
    search = artifact.facts["search"]
    assert search["own_samples"] == 200
    assert search["error_per_look"] == 0.05
    (result,) = artifact.facts["accuracy"]["results"]
    assert (result["samples"], result["error"]) == (400, 0.05)
    (row,) = search["candidates"]
    assert (row["layers"], row["looks"], row["passed"]) == (2, row["evaluations"], True)
