"""What a look at some samples promises of others."""

from __future__ import annotations

import numpy as np
import pytest

from trtforge.validation.accuracy import AccuracyResult, Budget, judge
from trtforge.validation.accuracy_forecast import foresee
from trtforge.validation.accuracy_metrics import Scores, find_metric

TOP1 = find_metric("top1")


def agreement(count: int, lost: int, budget: Budget) -> AccuracyResult:
    before, after = np.ones((count, 2)), np.ones((count, 2))
    after[:lost, 0] = 0
    return judge(Scores(TOP1, before), Scores(TOP1, after), budget)


@pytest.mark.parametrize(("seen", "others"), [(400, 800), (800, 800), (1600, 800), (400, 4000)])
def test_what_just_passes_a_look_passes_on_other_samples_four_times_in_five(seen: int, others: int) -> None:
    budget = Budget(0.05)

    def most(count: int, passes: object) -> int:
        assert callable(passes)
        return max(lost for lost in range(int(count * 0.05) + 1) if passes(agreement(count, lost, budget)))

    edge = most(seen, lambda result: foresee(result, budget, others).verdict == "passed")
    bar = most(others, lambda result: result.verdict == "passed")
    rng = np.random.default_rng(0)
    # The true rate, given what was seen and nothing known before; then what the others show.
    truth = rng.beta(edge + 1, seen - edge + 1, 20_000)
    passed = (rng.binomial(others, truth) <= bar).mean()
    assert 0.75 < passed < 0.9


def test_a_minimum_is_foreseen_too() -> None:
    seen = agreement(400, 8, Budget(0.05, 0.96))
    assert seen.verdict == "passed"
    assert foresee(seen, Budget(0.05, 0.96), 100_000).verdict == "passed"
    few = foresee(seen, Budget(0.1, 0.96), 200)
    assert few.verdict == "inconclusive"
    assert "a score of at least" in few.reason


def test_what_failed_or_shows_nothing_stays_so() -> None:
    failed = agreement(400, 60, Budget(0.05))
    assert foresee(failed, Budget(0.05), 100).verdict == "failed"
    nothing = judge(
        Scores(TOP1, np.array([[0.0, 1.0]] * 400)), Scores(TOP1, np.array([[0.0, 1.0]] * 400)), Budget(0.05)
    )
    assert foresee(nothing, Budget(0.05), 100_000).verdict == "inconclusive"
