"""What other samples will say: a search looks at some, and the budget is judged on others.

A look that just passes on samples of its own fails on the budget's every other time, and worse where those are fewer.
So it has to leave room for both scatters: the one of its own score, and the one that widens the budget's bound.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

from trtforge.validation.accuracy import AccuracyResult, AccuracyVerdict, Budget

__all__ = ["foresee"]

_SURE = 0.8
"""How often the budget's own samples are to say the same."""


def foresee(result: AccuracyResult, budget: Budget, samples: int) -> AccuracyResult:
    """The result with bounds that so many other samples of the same kind will show four times in five.

    With r as the ratio of both counts, the others' score is off by sqrt(1 + r) of this one's deviation, and their
    bound is sqrt(r) times as wide.

    Args:
        result: On the samples at hand.
        budget: What is asked.
        samples: How many others there are.

    Returns:
        The verdict that is expected of them; "failed" and what cannot be shown at all stay as they are.
    """
    ratio = result.samples / samples
    normal = NormalDist()
    widen = math.sqrt(ratio) + normal.inv_cdf(_SURE) / normal.inv_cdf(1 - result.error) * math.sqrt(1 + ratio)
    upper = result.drop + widen * (result.upper - result.drop)
    own = result.candidate_lower
    if own is not None:
        own = result.candidate - widen * (result.candidate - own)
    if result.verdict == "failed" or not result.reference > budget.max_drop:
        return replace(result, upper=upper, candidate_lower=own)
    kept = upper <= budget.max_drop and (budget.min is None or own is None or own >= budget.min)
    verdict: AccuracyVerdict = "passed" if kept else "inconclusive"
    shown = f"{samples:,} other samples would show a drop of at most {upper:.4g} four times in five"
    asked = f"at most {budget.max_drop:g} is allowed"
    if budget.min is not None and own is not None:
        shown += f" and a score of at least {own:.4g}"
        asked += f" and at least {budget.min:g} asked"
    reason = f"{result.reason.partition(': ')[0]}: {shown}, {asked}"
    return replace(result, upper=upper, candidate_lower=own, verdict=verdict, reason=reason, needed=None)
