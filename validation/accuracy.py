"""An accuracy budget and its verdict: how far a model may fall behind PyTorch on labelled data, and whether it does.

The bounds are one-sided, each wrong with the stated error: the candidate passes where the upper bound of its drop is
within the budget and fails where the lower one is beyond it. In between nothing was shown, and the verdict says how
many samples would show it. Where drop and minimum are both asked, both have to pass; neither bound needs a correction
for that (Berger, Technometrics 24 (1982) 295-300).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from trtforge.runtime.errors import AccuracyError, ArtifactError
from trtforge.validation.accuracy_interval import (
    RESAMPLES,
    Bounds,
    binomial_bounds,
    bootstrap_bounds,
    paired_bounds,
)
from trtforge.validation.accuracy_metrics import Scores
from trtforge.validation.parity import Stage

__all__ = ["AccuracyReport", "AccuracyResult", "AccuracyVerdict", "Budget", "judge"]

SCHEMA = 1

AccuracyVerdict = Literal["passed", "failed", "inconclusive"]
ERROR = 0.05
"""Of each bound: what "95 %" means."""
_POWER = NormalDist().inv_cdf(0.8)


@dataclass(frozen=True, slots=True)
class Budget:
    """What is asked.

    Attributes:
        max_drop: How much less than PyTorch the candidate may score.
        min: How much it has to score; None: no matter.
    """

    max_drop: float
    min: float | None = None


@dataclass(frozen=True, slots=True)
class AccuracyResult:
    """One run over the labelled samples, judged.

    Attributes:
        stage: What ran.
        runner: What ran it.
        version: The version of that.
        graph: Hash of the graph; for an engine of the one that it was built from.
        samples: How many.
        reference: PyTorch's score.
        candidate: The candidate's.
        lower: One-sided lower bound of the drop.
        upper: One-sided upper bound.
        candidate_lower: The same for the candidate's own score; None where no minimum is asked.
        candidate_upper: See there.
        method: What found the bounds of the drop.
        error: Of each bound.
        verdict: "passed", "failed" or "inconclusive".
        reason: One sentence: what was shown.
        needed: How many samples would settle an inconclusive verdict, four times in five; None where no number would.
        lost: Samples that PyTorch has right and the candidate wrong; None where samples are not right or wrong.
        won: The other way round.
        not_finite: Samples in which the candidate gave NaN or Inf.
        sqnr_db: The output's signal to noise ratio against PyTorch's over the same samples; None where it is no float.
        note: How the run differed from the real thing; else "".
    """

    stage: Stage
    runner: str
    version: str
    graph: str
    samples: int
    reference: float
    candidate: float
    lower: float
    upper: float
    candidate_lower: float | None
    candidate_upper: float | None
    method: str
    error: float
    verdict: AccuracyVerdict
    reason: str
    needed: int | None = None
    lost: int | None = None
    won: int | None = None
    not_finite: int = 0
    sqnr_db: float | None = None
    note: str = ""

    @property
    def drop(self) -> float:
        """How much less than PyTorch it scored."""
        return self.reference - self.candidate


@dataclass(frozen=True, slots=True)
class AccuracyReport:
    """A budget, what it was measured on, and the results in the order of the chain.

    Attributes:
        metric: "top1" and so on, or the user's function.
        labels: "loader": the data's own; "model": what PyTorch says, so that the score is agreement with it.
        budget: What is asked.
        results: One a stage.
    """

    metric: str
    labels: str
    budget: Budget
    results: tuple[AccuracyResult, ...] = ()

    @property
    def deciding(self) -> AccuracyResult | None:
        """The engine's result where one ran, else the last."""
        return self.results[-1] if self.results else None

    @property
    def passed(self) -> bool:
        """Whether the budget is kept, and shown to be."""
        return self.deciding is not None and self.deciding.verdict == "passed"

    def stage(self, stage: Stage) -> AccuracyResult | None:
        """The result of one stage."""
        return next((result for result in self.results if result.stage == stage), None)

    def raise_unless_passed(self) -> None:
        """Does nothing if the budget is kept.

        Raises:
            AccuracyError: it is not, or nothing was shown.
        """
        found = self.deciding
        if found is None:
            raise AccuracyError(f"{self.metric} was never measured", fix="convert again")
        if found.verdict == "passed":
            return
        fix = (
            "give the layers that hurt a higher precision (`precision: auto` finds them), or allow a larger `max_drop`"
        )
        if found.verdict == "inconclusive":
            fix = (
                f"give the loader about {found.needed:,} samples"
                if found.needed
                else "allow another `max_drop`: the drop is about as large as the budget itself"
            )
        keeps = "does not keep" if found.verdict == "failed" else "is not shown to keep"
        raise AccuracyError(
            f"{_SUBJECTS[found.stage]} ({found.runner} {found.version}) {keeps} its accuracy budget in {self.metric}",
            why=found.reason,
            fix=fix,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` reads it back equal. The verdict is written for other readers."""
        return {
            "schema": SCHEMA,
            "metric": self.metric,
            "labels": self.labels,
            "budget": asdict(self.budget),
            "verdict": self.deciding.verdict if self.deciding else "inconclusive",
            "results": [
                {name: _plain(value) for name, value in asdict(result).items()} | {"drop": _plain(result.drop)}
                for result in self.results
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AccuracyReport:
        """The inverse of `to_json`.

        Raises:
            ArtifactError: another schema version, or damaged.
        """
        try:
            if data["schema"] != SCHEMA:
                raise ArtifactError(
                    f"the accuracy report has schema {data['schema']!r}; this trtforge reads {SCHEMA}",
                    fix="read it with the trtforge that wrote it, or convert again",
                )
            names = [field.name for field in fields(AccuracyResult)]
            results = tuple(AccuracyResult(**{n: _read(result[n]) for n in names}) for result in data["results"])
            return cls(data["metric"], data["labels"], Budget(**data["budget"]), results)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"the accuracy report is damaged: {error!r}", fix="convert again") from error


_SUBJECTS: Mapping[Stage, str] = {
    "export": "the exported ONNX",
    "precision": "the ONNX with the precision plan carried out",
    "engine": "the engine",
}


def judge(
    reference: Scores,
    candidate: Scores,
    budget: Budget,
    *,
    stage: Stage = "precision",
    runner: str = "",
    version: str = "",
    graph: str = "",
    error: float = ERROR,
    resamples: int = RESAMPLES,
    sqnr_db: float | None = None,
    note: str = "",
) -> AccuracyResult:
    """Whether the candidate keeps the budget, as far as these samples show.

    Args:
        reference: PyTorch's scores.
        candidate: The candidate's, on the same samples in the same order.
        budget: What is asked.
        stage: What ran, like the following three.
        runner: See there.
        version: See there.
        graph: See there.
        error: Of each bound; less where one of several candidates is chosen by this.
        resamples: Of the bootstrap.
        sqnr_db: Passed on into the result.
        note: Passed on into the result.
    """
    drop = _drop_bounds(reference, candidate, error, resamples)
    own = _own_bounds(candidate, error, resamples) if budget.min is not None else None
    lost, won = _discordant(reference, candidate)
    scored, truth = candidate.value, reference.value
    verdicts = [_against(drop, budget.max_drop, truth - scored, reference.count, "drop", error)]
    if own is not None and budget.min is not None:
        negated = Bounds(-own.upper, -own.lower, own.deviation, own.method)
        verdicts.append(_against(negated, -budget.min, -scored, reference.count, "score", error))
    verdict, reason, needed = min(verdicts, key=lambda found: _ORDER.index(found[0]))
    if verdict == "passed" and not truth > budget.max_drop:
        verdict, needed = "inconclusive", None
        reason = f"PyTorch itself scores {truth:.4g}: a drop of {budget.max_drop:g} could not have shown"
    if not math.isfinite(scored):
        verdict, reason = "failed", "the metric is NaN"
    counts = f"; {lost} samples were lost and {won} won" if lost is not None else ""
    bad = f"; NaN or Inf in {candidate.not_finite}" if candidate.not_finite else ""
    shown = f"{scored:.4f} against PyTorch's {truth:.4f} on {reference.count:,} samples{counts}{bad}: {reason}"
    return AccuracyResult(
        stage, runner, version, graph, reference.count, truth, scored, drop.lower, drop.upper,
        own.lower if own else None, own.upper if own else None, drop.method, error,
        verdict, shown, needed, lost, won, candidate.not_finite, sqnr_db, note,
    )  # fmt: skip


_ORDER: tuple[AccuracyVerdict, ...] = ("failed", "inconclusive", "passed")


def _drop_bounds(reference: Scores, candidate: Scores, error: float, resamples: int) -> Bounds:
    count = reference.count
    lost, won = _discordant(reference, candidate)
    if lost is not None and won is not None:
        return paired_bounds(lost, won, count, error)
    before, after = reference.without_each(), candidate.without_each()
    same = None
    if reference.rows.shape[1]:
        same = int((reference.rows != candidate.rows).any(1).sum())
    return bootstrap_bounds(
        reference.value - candidate.value,
        lambda times: reference.resampled(times) - candidate.resampled(times),
        count,
        error,
        without_each=None if before is None or after is None else before - after,
        differing=same,
        resamples=resamples,
    )


def _own_bounds(scores: Scores, error: float, resamples: int) -> Bounds:
    right = scores.binary
    if right is not None:
        return binomial_bounds(int(right.sum()), scores.count, error)
    return bootstrap_bounds(
        scores.value, scores.resampled, scores.count, error, without_each=scores.without_each(), resamples=resamples
    )


def _discordant(reference: Scores, candidate: Scores) -> tuple[int | None, int | None]:
    before, after = reference.binary, candidate.binary
    if before is None or after is None:
        return None, None
    return int((before & ~after).sum()), int((after & ~before).sum())


def _against(
    bounds: Bounds, limit: float, value: float, count: int, what: str, error: float
) -> tuple[AccuracyVerdict, str, int | None]:
    """The verdict on "at most `limit`"; a minimum comes with both signs changed."""
    sure = f"{1 - error:.2%}".replace(".00", "").replace("%", " %")
    if what == "drop":
        lower, upper = f"is at least {bounds.lower:.4g}", f"is at most {bounds.upper:.4g}"
        asked = f"at most {limit:.4g} is allowed"
    else:
        lower, upper = f"is at most {-bounds.lower:.4g}", f"is at least {-bounds.upper:.4g}"
        asked = f"at least {-limit:.4g} is asked"
    if bounds.upper <= limit:
        return "passed", f"the {what} {upper} with {sure} confidence, {asked}", None
    if bounds.lower > limit:
        return "failed", f"the {what} {lower} with {sure} confidence, {asked}", None
    needed = _needed(bounds, limit, value, count, error)
    more = f"about {needed:,} samples needed" if needed else "no number of samples would settle it soon"
    return (
        "inconclusive",
        f"inconclusive: the {what} {lower} and {upper} with {sure} confidence, {asked}; {more}",
        needed,
    )


def _needed(bounds: Bounds, limit: float, value: float, count: int, error: float) -> int | None:
    """How many samples settle it four times in five, where the drop is what it looks like."""
    apart = abs(limit - value)
    if not np.isfinite(bounds.deviation) or apart < 1e-12:
        return None
    both = NormalDist().inv_cdf(1 - error) + _POWER
    needed = max(count * (both * bounds.deviation / apart) ** 2, count + 1.0)
    if 0 < limit < 1:  # what it takes where not one sample differs
        needed = max(needed, math.log(error) / math.log1p(-limit))
    if needed > 1e8:
        return None
    step = int(10 ** max(0, int(math.log10(needed)) - 1))
    return int(math.ceil(needed / step) * step)


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value
