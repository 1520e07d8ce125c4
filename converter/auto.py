"""Which plan is fastest within the budget: candidates one after the other, each mended where it fails.

A plan is chosen because it passed, among several that were looked at; so every look's bounds are wrong less often, the
stated error divided by the number of looks (Bonferroni), and the choice as a whole is wrong no more often than one look
would be. Where the search has labelled samples of its own, the budget's see the chosen plan alone: nothing is divided,
and a look asks whether those would pass too.
What layers do harm is measured apart from that, for a quantized plan on calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trtforge.converter.candidates import Workbench
from trtforge.converter.config import Search
from trtforge.converter.quantize import Quantization
from trtforge.converter.search import Group, Mended, Score, Unit, mend
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.precision import QUANTIZED, Precision, PrecisionPlan

__all__ = ["Choice", "Row", "choose_plan"]

_ERROR = 0.05
_SAME_COST = {True: 0.02, False: 0.05}
"""Costs that differ by less count as equal, and the more exact plan wins: timings scatter, nominal costs are rough."""
_CLASSES = 4
_ORDER: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8")


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate of the table.

    Attributes:
        precision: Its default.
        plan: As it was mended.
        score: The last look's.
        plain: The score with nothing put back.
        kept: What was put back.
        high: Into which precision.
        layers: How many could have been.
        evaluations: How many plans were run for it.
        looks: How many of those were whole plans.
        tried: Each of these: how many layers were put back, and its score.
    """

    precision: Precision
    plan: PrecisionPlan
    score: Score
    plain: Score
    kept: tuple[Group, ...]
    high: Precision
    layers: int
    evaluations: int
    looks: int
    tried: tuple[tuple[int, Score], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan that was chosen, with its ranges; every candidate; and the error of each bound."""

    plan: PrecisionPlan
    quantization: Quantization | None
    rows: tuple[Row, ...]
    chosen: Row
    error: float
    evaluations: int

    def to_json(self) -> dict[str, Any]:
        """The Pareto table, JSON-able, in the order in which candidates were tried."""
        return {
            "error_per_look": self.error,
            "evaluations": self.evaluations,
            "timed": any(row.score.facts.get("latency_ms") is not None for row in self.rows),
            "chosen": self.chosen.precision,
            "candidates": [self._row(row) for row in self.rows],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        facts = row.score.facts
        found = facts.get("accuracy")
        sqnr = facts.get("sqnr_db")
        return {
            "name": row.precision,
            "passed": row.score.passed,
            "pareto": row.score.passed and not any(_dominates(other, row) for other in self.rows),
            "reason": row.score.reason,
            "unmended": None if row.plain is row.score else row.plain.reason,
            "latency_ms": facts.get("latency_ms"),
            "cost": row.score.cost if math.isfinite(row.score.cost) else None,
            "size_bytes": facts.get("size"),
            "sqnr_db": sqnr if sqnr is None or math.isfinite(sqnr) else str(sqnr),
            "accuracy": found and found.candidate,
            "drop": found and found.drop,
            "drop_upper": found and found.upper,
            "shares": facts.get("shares"),
            "kept_in": row.high if row.kept else None,
            "kept_back": [unit.id for group in row.kept for unit in group.units],
            "layers": row.layers,
            "groups": [
                {
                    "layers": [unit.id for unit in group.units],
                    "share": group.share,
                    "harm": group.harm if math.isfinite(group.harm) else str(group.harm),
                }
                for group in row.kept
            ],
            "evaluations": row.evaluations,
            "looks": row.looks,
            "tried": [_describe_look(kept, score) for kept, score in row.tried],
        }


def choose_plan(bench: Workbench, plan: PrecisionPlan, search: Search, candidates: Sequence[Precision]) -> Choice:
    """Looks at every candidate, mends those that fail, and takes the cheapest that passes.

    Where none passes, the choice is the last candidate's plan as it is: the proof that follows says what is wrong.

    Args:
        bench: Measures plans.
        plan: The user's: its rules hold in every candidate.
        search: How far to go.
        candidates: Defaults to try, in any order.

    Raises:
        ConfigError: there are no candidates.
        TrtForgeError: as calibration raises.
    """
    order = [kind for kind in _ORDER if kind in candidates]
    if not order:
        raise ConfigError("the search has no candidates", fix=f"give some of {', '.join(_ORDER)}")
    looks = sum(1 if kind == "fp32" else search.looks for kind in order)
    bench.error = _ERROR / looks if bench.others is None else _ERROR
    rows: list[Row] = []
    for kind in order:
        row = _try(bench, _start(plan, kind, rows), kind, search)
        rows.append(row)
        tell = "passes" if row.score.passed else "does not pass"
        kept = sum(len(group.units) for group in row.kept)
        back = f" with {kept} layers in {row.high}" if kept else ""
        bench.bench.stages.note(f"{kind} {tell}{back}: {row.score.reason}")
    chosen = _best(rows) or rows[-1]
    return Choice(chosen.plan, bench.quantization(chosen.plan), tuple(rows), chosen, bench.error, bench.evaluations)


def _start(plan: PrecisionPlan, kind: Precision, rows: Sequence[Row]) -> PrecisionPlan:
    """The candidate before anything is put back; a quantized one stands on the best float plan so far."""
    if kind not in QUANTIZED:
        return replace(plan, default=kind)
    floats = [row for row in rows if row.precision not in QUANTIZED and row.score.passed]
    if not floats:
        return replace(plan, default=kind)
    best = _best(floats)
    assert best is not None
    own = best.plan.rules[len(plan.rules) :]
    return replace(plan, default=kind, base=best.precision, rules=(*plan.rules, *own), graph=best.plan.graph)


def _try(bench: Workbench, plan: PrecisionPlan, kind: Precision, search: Search) -> Row:
    evaluations, looks = bench.evaluations, bench.looks
    plan = bench.guard(plan)
    high: Precision = plan.base if kind in QUANTIZED else "fp32"
    units = bench.units(plan, kind) if kind not in ("fp32", "tf32") else []
    plain = bench.look(plan)
    tried = [(0, plain)]

    def row(plan: PrecisionPlan, score: Score, kept: tuple[Group, ...] = ()) -> Row:
        spent = bench.evaluations - evaluations, bench.looks - looks
        return Row(kind, plan, score, plain, kept, high, len(units), *spent, tuple(tried))

    # What is not built gives no measure to mend by.
    if plain.passed or "unbuilt" in plain.facts or kind in ("fp32", "tf32") or search.looks < 2:
        return row(plan, plain)
    if kind in QUANTIZED:
        units = _sort_by_work(units)
    feeds = bench.calibration_feeds() if kind in QUANTIZED else bench.failing_feeds(plain)
    harm = bench.harm(kind, plan.base, feeds)
    if harm is None:
        return row(plan, plain)

    def mended(kept: Sequence[Group]) -> PrecisionPlan:
        rules = bench.rules(kept, kind, high)
        by_id = any(rule.id is not None for rule in rules)
        return plan.with_rules(rules, graph=bench.reference.hash if by_id else None)

    def look(kept: Sequence[Group]) -> Score:
        score = bench.look(mended(kept))
        number = sum(len(group.units) for group in kept)
        tried.append((number, score))
        bench.bench.stages.note(f"{kind} with {number} of {len(units)} layers in {high}: {score.reason}")
        return score

    # With everything back a quantized plan is another candidate's.
    all_back = kind not in QUANTIZED
    spent = {"evaluations": max(search.evaluations - search.looks, 1), "looks": search.looks - 1}
    found = mend(units, harm, plain, look, all_back=all_back, **spent) if units else Mended((), plain)
    if not found.score.passed:  # as it was: what was put back in vain says nothing
        return row(plan, plain)
    return row(mended(found.kept), found.score, _single(found.kept))


def _sort_by_work(units: Sequence[Unit]) -> list[Unit]:
    """By classes of like work, so that in groups of neighbours what is cheap to put back is not held by what is dear.

    Within a class in order of execution, since the noise of early layers does most harm.
    """
    rank = {unit.id: number for number, unit in enumerate(sorted(units, key=lambda unit: unit.share))}
    return sorted(units, key=lambda unit: rank[unit.id] * _CLASSES // len(units))


def _describe_look(kept: int, score: Score) -> dict[str, Any]:
    found = score.facts.get("accuracy")
    return {
        "kept_back": kept,
        "passed": score.passed,
        "shares": score.facts.get("shares"),
        "accuracy": found and found.candidate,
        "drop": found and found.drop,
        "drop_upper": found and found.upper,
    }


def _single(groups: Sequence[Group]) -> tuple[Group, ...]:
    return tuple(group for group in groups if group.units)


def _best(rows: Sequence[Row]) -> Row | None:
    """The cheapest that passes; of equally cheap ones the most exact."""
    passing = [row for row in rows if row.score.passed]
    if not passing:
        return None
    least = min(row.score.cost for row in passing)
    timed = any(row.score.facts.get("latency_ms") is not None for row in passing)
    near = [row for row in passing if row.score.cost <= least * (1 + _SAME_COST[timed])]
    return max(near, key=lambda row: (_exactness(row), -row.score.cost))


def _exactness(row: Row) -> float:
    found = row.score.facts.get("sqnr_db")
    return math.inf if found is None else float(found)


def _dominates(first: Row, second: Row) -> bool:
    """At least as good in cost, size and drop, and better in one."""
    if not first.score.passed or first is second:
        return False

    def figures(row: Row) -> tuple[float, float, float]:
        found = row.score.facts.get("accuracy")
        worse = found.drop if found is not None else -_exactness(row)
        return row.score.cost, float(row.score.facts.get("size", 0)), worse

    mine, theirs = figures(first), figures(second)
    return all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs
