"""Two artifacts of one model, old and new: which figures got worse beyond noise, what changed, and the likely cause."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trtforge.converter.record import ArtifactRecord, Figures, StageRecord

__all__ = ["Allowance", "Change", "Comparison", "Row", "compare_records", "format_rows"]


@dataclass(frozen=True, slots=True)
class Allowance:
    """What counts as noise; a figure that is worse by more is a regression.

    Attributes:
        sqnr_drop_db: How far the SQNR may drop, dB; 3 dB are twice the error's power, half a bit.
        ceiling_db: An old SQNR above this counts as this: two float32 results of other libraries or processors, which
            sum in another order, are 90 to 135 dB from PyTorch and move freely in there (docs/results.md).
        growth: By what factor the greatest error, 1 - cosine and the share of mismatches may grow. A greatest error is
            one value, and scatters more than a mean.
    """

    sqnr_drop_db: float = 3.0
    ceiling_db: float = 90.0
    growth: float = 2.0


_LEAST_ERROR = 0.001
"""Standard deviations; a greatest error below it is float32's noise (the export stage's limit)."""
_LEAST_COSINE_LOSS = 1e-6
"""The digits of a cosine that a record keeps."""
_ROUNDING = 0.005
"""A record keeps three digits of an error."""
_LEAST = ("sqnr_db", "cosine")
"""Measures that may not be less; the others may not be more."""
_MEASURES: Mapping[str, tuple[str, str, int]] = {
    "sqnr_db": ("SQNR dB", ".1f", 1),
    "cosine": ("cosine", ".6f", 6),
    "max_abs_over_std": ("max err / std", ".3g", 0),
    "mismatch": ("mismatches", ".2%", 0),
}
"""Title, format, and the digits of those that are rounded to a place."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, old and new, and what is allowed; all as text. `worse` marks a regression."""

    stage: str
    output: str
    measure: str
    old: str
    new: str
    allowed: str
    worse: bool

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Change:
    """Something that was made or run otherwise; `kind` is "graph", "weights", "plan", "calibration", "inputs",
    "tolerance", "tensorrt", "version", "device" or "noise".
    """

    kind: str
    text: str


PINNED = frozenset({"graph", "weights", "plan", "calibration", "inputs", "tolerance"})
"""What makes it another engine, where versions and device only make it run elsewhere."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Old against new.

    Attributes:
        rows: Every figure, and every limit of the proof that got looser.
        changes: What changed.
        causes: Why it probably got worse, likeliest first; empty without a regression.
        sizes: Files whose size changed: name, old and new bytes (None where there is none).
    """

    rows: tuple[Row, ...]
    changes: tuple[Change, ...] = ()
    causes: tuple[Change, ...] = ()
    sizes: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)

    @property
    def regressions(self) -> tuple[Row, ...]:
        """The rows that got worse beyond noise."""
        return tuple(row for row in self.rows if row.worse)

    @property
    def pinned_changes(self) -> tuple[Change, ...]:
        """The changes that make it another engine."""
        return tuple(change for change in self.changes if change.kind in PINNED)

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "verdict": "regression" if self.regressions else "changed" if self.changes else "same",
            "rows": [row.to_json() for row in self.rows],
            "changes": [{"kind": change.kind, "text": change.text} for change in self.changes],
            "causes": [{"kind": cause.kind, "text": cause.text} for cause in self.causes],
            "sizes": {name: {"old": old, "new": new} for name, (old, new) in self.sizes.items()},
        }


def compare_records(old: ArtifactRecord, new: ArtifactRecord, allowance: Allowance | None = None) -> Comparison:
    """Compares stage by stage; a stage that only one of them has is not compared, since the other never ran it.

    A row is a regression where a figure is worse than `allowance` lets it be, a proof that passed no longer does, an
    output is gone, or a limit of the proof got looser: a wider tolerance hides the next regression.
    """
    rows = []
    for stage, before in old.proof.items():
        if stage in new.proof:
            rows += _stage_rows(stage, before, new.proof[stage], allowance or Allowance())
    rows += _tolerance_rows(old.tolerance, new.tolerance)
    changes = _changes(old, new)
    worse = [row.stage for row in rows if row.worse]
    return Comparison(tuple(rows), tuple(changes), tuple(_causes(worse, changes)) if worse else (), _sizes(old, new))


def format_rows(rows: Iterable[Row]) -> list[str]:
    """An aligned table with a header; a regression has an arrow at its end."""
    cells = [("stage", "output", "measure", "old", "new", "allowed", "")]
    cells += [(r.stage, r.output, r.measure, r.old, r.new, r.allowed, "<-- worse" if r.worse else "") for r in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _stage_rows(stage: str, old: StageRecord, new: StageRecord, allowance: Allowance) -> list[Row]:
    rows = []
    if new.verdict != old.verdict or new.verdict != "passed":
        rows.append(Row(stage, "", "verdict", old.verdict, new.verdict, "passed", new.verdict != "passed"))
    for name, before in old.outputs.items():
        after = new.outputs.get(name)
        if after is None:
            rows.append(Row(stage, name, "output", "present", "missing", "present", True))
        else:
            rows += _figure_rows(stage, name, before, after, allowance)
    rows += [
        Row(stage, name, "output", "missing", "present", "", False) for name in new.outputs if name not in old.outputs
    ]
    return rows


def _figure_rows(stage: str, output: str, old: Figures, new: Figures, allowance: Allowance) -> list[Row]:
    rows = []
    for name, (title, form, digits) in _MEASURES.items():
        before, after = getattr(old, name), getattr(new, name)
        if before is None and after is None:
            continue
        if before is None or after is None:  # an output that became floating, or no longer is
            rows.append(Row(stage, output, title, _text(before), _text(after), "", after is None))
            continue
        limit = _limit(name, before, allowance)
        # As it is recorded, so that what a baseline rounded away cannot fail; NaN meets no limit.
        ok = round(after, digits) >= round(limit, digits) if name in _LEAST else after <= limit * (1 + _ROUNDING)
        allowed = f"{'>=' if name in _LEAST else '<='} {limit:{form}}"
        rows.append(Row(stage, output, title, f"{before:{form}}", f"{after:{form}}", allowed, not ok))
    return rows


def _limit(name: str, old: float, allowance: Allowance) -> float:
    if name == "sqnr_db":
        return min(old, allowance.ceiling_db) - allowance.sqnr_drop_db
    if name == "cosine":
        return 1 - allowance.growth * max(1 - old, _LEAST_COSINE_LOSS)
    return allowance.growth * (max(old, _LEAST_ERROR) if name == "max_abs_over_std" else old)


def _tolerance_rows(old: Mapping[str, float | None], new: Mapping[str, float | None]) -> list[Row]:
    if not old or not new:
        return []
    rows = []
    for name in old:
        before, after = old[name], new.get(name)
        if before == after:
            continue
        least = name in _LEAST
        loosest = -math.inf if least else math.inf
        was, is_ = (loosest if before is None else before), (loosest if after is None else after)
        looser = is_ < was if least else is_ > was
        limit = f"{'>=' if least else '<='} {was:g}"
        rows.append(Row("tolerance", "", name, _text(before), _text(after), limit, looser))
    return rows


def _changes(old: ArtifactRecord, new: ArtifactRecord) -> list[Change]:
    found = []
    if _differs(old, new, "structure"):
        found.append(Change("graph", f"graph changed: {_hashes(old, new, 'structure')}{_operators(old, new)}"))
    if _weights_differ(old, new):
        file = f", checkpoint {_hashes(old, new, 'checkpoint')}" if _differs(old, new, "checkpoint") else ""
        found.append(Change("weights", f"weights changed: graph with weights {_hashes(old, new, 'weights')}{file}"))
    if old.precision != new.precision or old.plan != new.plan:
        found.append(Change("plan", f"precision plan changed: {_plan_difference(old, new)}"))
    if _differs(old, new, "calibration"):
        found.append(Change("calibration", f"calibration data changed: {_hashes(old, new, 'calibration')}"))
    if _differs(old, new, "inputs"):
        text = f"the proof's inputs changed (validation data, dims or seeds): {_hashes(old, new, 'inputs')}"
        found.append(Change("inputs", text))
    if old.tolerance and new.tolerance and old.tolerance != new.tolerance:
        names = [name for name in old.tolerance if old.tolerance[name] != new.tolerance.get(name)]
        parts = [f"{name} {_text(old.tolerance[name])} -> {_text(new.tolerance.get(name))}" for name in names]
        found.append(Change("tolerance", f"tolerance changed: {', '.join(parts)}"))
    for name in dict.fromkeys([*old.versions, *new.versions]):
        before, after = old.versions.get(name, "none"), new.versions.get(name, "none")
        if before == after:
            continue
        if name.startswith("tensorrt"):
            found.append(Change("tensorrt", f"TensorRT version changed: {name} {before} -> {after}"))
        else:
            found.append(Change("version", f"version changed: {name} {before} -> {after}"))
    if old.device and new.device and old.device != new.device:
        found.append(Change("device", f"GPU changed: {old.device} -> {new.device}"))
    return found


_ORDER: Mapping[str, tuple[str, ...]] = {
    # Only what can touch a stage: the plan is carried out after the export, and TensorRT runs in the engine alone.
    "export": ("graph", "weights", "inputs", "version", "tolerance"),
    "precision": ("plan", "calibration", "graph", "weights", "inputs", "version", "tolerance"),
    "engine": ("plan", "calibration", "tensorrt", "device", "graph", "weights", "inputs", "version", "tolerance"),
    "tolerance": ("tolerance", "plan"),
}


def _causes(worse: list[str], changes: list[Change]) -> list[Change]:
    """Likeliest first, by the first stage of the chain that got worse."""
    first = next((stage for stage in ("export", "precision", "engine") if stage in worse), "tolerance")
    order = _ORDER[first]
    fitting = sorted((c for c in changes if c.kind in order), key=lambda change: order.index(change.kind))
    return fitting or [
        Change("noise", "noise: nothing that decides the result changed; run it again, on an idle machine")
    ]


def _differs(old: ArtifactRecord, new: ArtifactRecord, name: str) -> bool:
    return old.hashes.get(name, "") != new.hashes.get(name, "")


def _weights_differ(old: ArtifactRecord, new: ArtifactRecord) -> bool:
    # A checkpoint saved again has other bytes and the same weights; with another structure it alone can tell.
    if _differs(old, new, "structure"):
        return bool(old.hashes.get("checkpoint")) and _differs(old, new, "checkpoint")
    return _differs(old, new, "weights")


def _hashes(old: ArtifactRecord, new: ArtifactRecord, name: str) -> str:
    return f"{old.hashes.get(name, 'none')[:12]} -> {new.hashes.get(name, 'none')[:12]}"


def _operators(old: ArtifactRecord, new: ArtifactRecord) -> str:
    names = sorted({*old.operators, *new.operators})
    counts = [(name, old.operators.get(name, 0), new.operators.get(name, 0)) for name in names]
    moved = [f"{name} {before} -> {after}" for name, before, after in counts if before != after]
    return f" ({', '.join(moved[:6])})" if moved else " (the same operators, connected or parametrised otherwise)"


def _plan_difference(old: ArtifactRecord, new: ArtifactRecord) -> str:
    parts = [] if old.precision == new.precision else [f"default {old.precision} -> {new.precision}"]
    parts += [f"without {rule!r}" for rule in old.plan if rule not in new.plan]
    parts += [f"with {rule!r}" for rule in new.plan if rule not in old.plan]
    shown = parts[:6] or ["the rules' order"]
    return ", ".join([*shown, *([f"and {len(parts) - 6} more"] if len(parts) > 6 else [])])


def _sizes(old: ArtifactRecord, new: ArtifactRecord) -> dict[str, tuple[int | None, int | None]]:
    names = sorted({*old.sizes, *new.sizes})
    return {n: (old.sizes.get(n), new.sizes.get(n)) for n in names if old.sizes.get(n) != new.sizes.get(n)}


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
