"""What a bisection came to, as data: the layers to blame, the measurements, and the plan that mends them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trtforge.runtime.precision import PrecisionPlan, Rule
from trtforge.validation.kinds import Symptom
from trtforge.validation.parity import ParityReport

__all__ = ["Blame", "Finding", "Outcome"]

Outcome = Literal["agrees", "export", "graph", "mended", "not mended"]


@dataclass(frozen=True, slots=True)
class Blame:
    """One layer to blame.

    Attributes:
        nodes: Ids; one but where nothing tells neighbours apart.
        op: Operator of the first of them.
        module: Its module path.
        line: The user's Python line, "net.py:42"; "" where it is not known.
        code: That line's text where the file is at hand.
        symptom: What is wrong.
        share: Part of the outputs' noise that it adds.
        before: Noise-to-signal ratio of the outputs with everything up to the layer from the candidate.
        after: The same with the layer.
        own: Noise of its own result, fed the reference's tensors.
        rules: The exception that mends it; () where there is none.
    """

    nodes: tuple[str, ...]
    op: str
    module: str
    line: str
    code: str
    symptom: Symptom
    share: float
    before: float
    after: float
    own: float
    rules: tuple[Rule, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-able; noise as SQNR in dB, None where it is infinite or there is none."""
        return {
            "nodes": list(self.nodes),
            "op": self.op,
            "module": self.module,
            "line": self.line,
            "code": self.code,
            "kind": self.symptom.kind,
            "reason": self.symptom.reason,
            "share": self.share,
            "sqnr_before_db": _decibel(self.before),
            "sqnr_after_db": _decibel(self.after),
            "own_sqnr_db": _decibel(self.own),
            "rules": [rule.describe() for rule in self.rules],
        }


@dataclass(frozen=True, slots=True)
class Finding:
    """What a bisection came to.

    Attributes:
        folder: The artifact.
        outcome: "agrees": within the limits (`blames` names what errs most); "export": reference.onnx is wrong already;
            "graph": the candidate is another graph; "mended": with `plan` all limits are met, measured.
        runner: What ran the candidate, with its version.
        blames: Layers in the order in which they were found: the first one goes wrong first.
        before: The candidate against the golden set.
        after: The candidate under `plan`; for "graph" the artifact's own plan carried out afresh; else None.
        plan: The artifact's plan with the exceptions; None where none mends anything.
        notes: What else has to be said.
        runs: How often each side ran, and the samples searched.
    """

    folder: Path
    outcome: Outcome
    runner: str
    blames: tuple[Blame, ...]
    before: ParityReport
    after: ParityReport | None
    plan: PrecisionPlan | None
    notes: tuple[str, ...]
    runs: dict[str, int]

    @property
    def exception(self) -> str:
        """The exceptions alone as YAML: entries for a plan's `rules`."""
        rules = tuple(rule for blame in self.blames for rule in blame.rules)
        if not rules:
            return ""
        text = PrecisionPlan(rules=rules).to_yaml()
        return text[text.index("rules:") :]

    def to_json(self) -> dict[str, Any]:
        """JSON-able, as `bisect --json` prints it."""
        return {
            "folder": str(self.folder),
            "outcome": self.outcome,
            "runner": self.runner,
            "blames": [blame.to_json() for blame in self.blames],
            "measured": {"before": _worst(self.before), "after": self.after and _worst(self.after)},
            "limits": self.before.tolerance.to_json(),
            "exception": self.exception or None,
            "plan": self.plan.to_yaml() if self.plan else None,
            "notes": list(self.notes),
            "runs": self.runs,
        }


def _decibel(noise: float) -> float | None:
    return -10 * math.log10(noise) if noise and math.isfinite(noise) else None


def _worst(report: ParityReport) -> dict[str, Any]:
    measures = [output.pooled for output in report.outputs if output.pooled is not None]
    worst = min((m.sqnr_db for m in measures), default=math.nan)
    return {
        "passed": report.passed,
        "sqnr_db": worst if math.isfinite(worst) else str(worst),
        "reasons": list(report.reasons),
    }
