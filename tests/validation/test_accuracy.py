from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from trtforge.runtime.errors import AccuracyError, ArtifactError, ParityError
from trtforge.validation.accuracy import AccuracyReport, Budget, judge
from trtforge.validation.accuracy_metrics import Scores, find_metric

TOP1 = find_metric("top1")


def right(flags: Any) -> Scores:
    return Scores(TOP1, np.stack([np.asarray(flags, dtype=float), np.ones(len(flags))], 1))


def pair(count: int, lost: int, won: int = 0, accuracy: float = 0.8) -> tuple[Scores, Scores]:
    before = np.arange(count) < round(count * accuracy)
    after = before.copy()
    after[:lost] = False
    after[count - won :] = True
    return right(before), right(after)


def report(result: Any, budget: Budget) -> AccuracyReport:
    return AccuracyReport("top1", "loader", budget, (result,))


@pytest.mark.parametrize(
    ("count", "lost", "max_drop", "verdict"),
    [
        (200, 0, 0.001, "inconclusive"),
        (3000, 0, 0.001, "inconclusive"),
        (3200, 0, 0.001, "passed"),
        (1000, 3, 0.02, "passed"),
        (1000, 50, 0.02, "failed"),
        (1000, 20, 0.02, "inconclusive"),
    ],
)
def test_verdicts(count: int, lost: int, max_drop: float, verdict: str) -> None:
    budget = Budget(max_drop)
    result = judge(*pair(count, lost), budget)
    assert result.verdict == verdict
    assert (result.lost, result.won) == (lost, 0)
    found = report(result, budget)
    assert AccuracyReport.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.passed == (verdict == "passed")
    if verdict == "passed":
        found.raise_unless_passed()
        return
    with pytest.raises(AccuracyError) as caught:
        found.raise_unless_passed()
    assert isinstance(caught.value, ParityError)
    assert caught.value.exit_code == 4


def test_inconclusive_says_how_many_samples_would_do() -> None:
    result = judge(*pair(200, 0), Budget(0.001))
    assert result.needed == 3000
    assert "inconclusive" in result.reason
    assert "about 3,000 samples needed" in result.reason
    few = judge(*pair(400, 4), Budget(0.02))
    assert few.needed is not None
    many = judge(*pair(few.needed, round(few.needed * 0.01)), Budget(0.02))
    assert many.verdict == "passed"
    exactly = judge(*pair(1000, 20), Budget(0.02))
    assert exactly.needed is None


def test_minimum_is_asked_of_the_candidate_alone() -> None:
    reference, candidate = pair(2000, 0, accuracy=0.8)
    assert judge(reference, candidate, Budget(0.01, min=0.75)).verdict == "passed"
    assert judge(reference, candidate, Budget(0.01, min=0.795)).verdict == "inconclusive"
    failed = judge(reference, candidate, Budget(0.01, min=0.9))
    assert failed.verdict == "failed"
    assert "at least 0.9 is asked" in failed.reason


def test_a_reference_that_is_always_wrong_proves_nothing() -> None:
    result = judge(right(np.zeros(5000)), right(np.zeros(5000)), Budget(0.01))
    assert result.verdict == "inconclusive"
    assert "could not have shown" in result.reason


def test_ratio_metrics_are_resampled_by_sample() -> None:
    rng = np.random.default_rng(0)
    metric = find_metric("miou")
    labels = rng.integers(0, 3, (150, 6, 6))
    logits = np.eye(3)[labels].transpose(0, 3, 1, 2) + rng.normal(0, 0.7, (150, 3, 6, 6))
    worse = logits + rng.normal(0, 0.1, logits.shape)
    wrecked = logits + rng.normal(0, 0.9, logits.shape)
    reference = Scores(metric, metric.rows(logits, labels))
    near = judge(reference, Scores(metric, metric.rows(worse, labels)), Budget(0.05))
    far = judge(reference, Scores(metric, metric.rows(wrecked, labels)), Budget(0.05))
    assert (near.verdict, far.verdict) == ("passed", "failed")
    assert near.method == "bootstrap (BCa and studentised)"
    assert near.lower < near.drop < near.upper < 0.05
    assert near.lost is None
    same = judge(reference, reference, Budget(0.01))
    assert same.verdict == "inconclusive"  # 150 equal images don't show 1 point


def test_damaged_report_is_refused() -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        AccuracyReport.from_json({"schema": 1})
    with pytest.raises(ArtifactError, match="schema"):
        AccuracyReport.from_json({"schema": 2})
