"""The proof proved: what a comparison lets through of faults that matter, and refuses of rewrites that don't.

As in mutation testing: a planted fault counts only where it exceeds the budget on a large held-out set that the golden
set does not contain; one that does nothing there is an equivalent mutant and set aside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trtforge.runtime.runner import Tensors
from trtforge.validation.compare import compare
from trtforge.validation.golden import GoldenSet
from trtforge.validation.parity import Candidate, Stage, Verdict
from trtforge.validation.tolerance import Tolerance

__all__ = ["LEAST_REFUSED", "AuditReport", "Judge", "Trial"]

LEAST_REFUSED = 0.99
"""The share of faults beyond the budget that a proof has to refuse."""

Outcome = Literal["passed", "failed", "not_proved", "error"]


@dataclass(frozen=True, slots=True)
class Trial:
    """One changed model.

    Attributes:
        kind: Fault or rewrite, as tables show it.
        what: What was done, and where.
        seed: What made it.
        stage: Which graph was changed.
        fault: False for a harmless rewrite.
        proof: The verdict on the artifact's golden set; "error" where it did not run on it.
        held_out: The verdict on the held-out set.
        held_out_reason: Its first reason.
        polygraphy: Whether Polygraphy's default comparison refused it, on the golden set's inputs.
        polygraphy_own: The same on the inputs that Polygraphy makes by default; None where it was not run.
    """

    kind: str
    what: str
    seed: int
    stage: Stage
    fault: bool
    proof: Outcome
    held_out: Outcome
    held_out_reason: str = ""
    polygraphy: bool | None = None
    polygraphy_own: bool | None = None

    @property
    def refused(self) -> bool:
        """Whether the artifact's proof does not pass it."""
        return self.proof != "passed"

    @property
    def counts(self) -> bool:
        """A rewrite always; a fault where it exceeds the budget on the held-out set."""
        return not self.fault or self.held_out in ("failed", "error")

    def to_json(self) -> dict[str, Any]:
        """All fields, and whether it counts and was refused."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {**fields, "counts": self.counts, "refused": self.refused}


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an artifact's proof let through.

    Attributes:
        name: The artifact's name.
        trials: Every changed model.
        golden: Samples and rows of the golden set.
        held_out: Samples and rows of the held-out set.
        wanted: How many faults and rewrites were asked for.
        seconds: The whole audit.
    """

    name: str
    trials: tuple[Trial, ...]
    golden: tuple[int, int]
    held_out: tuple[int, int]
    wanted: tuple[int, int]
    seconds: float = 0.0

    @property
    def faults(self) -> tuple[Trial, ...]:
        """Faults that exceed the budget on the held-out set."""
        return tuple(trial for trial in self.trials if trial.fault and trial.counts)

    @property
    def set_aside(self) -> tuple[Trial, ...]:
        """Faults that don't."""
        return tuple(trial for trial in self.trials if trial.fault and not trial.counts)

    @property
    def rewrites(self) -> tuple[Trial, ...]:
        """Harmless rewrites."""
        return tuple(trial for trial in self.trials if not trial.fault)

    @property
    def let_through(self) -> tuple[Trial, ...]:
        """Faults that count and that the proof passed."""
        return tuple(trial for trial in self.faults if not trial.refused)

    @property
    def refused_wrongly(self) -> tuple[Trial, ...]:
        """Harmless rewrites that the proof refused."""
        return tuple(trial for trial in self.rewrites if trial.refused)

    @property
    def refused_share(self) -> float:
        """Of the faults that count; 0 where there is none."""
        return 1 - len(self.let_through) / len(self.faults) if self.faults else 0.0

    @property
    def passed(self) -> bool:
        """Whether at least 99 % of the faults were refused, and no rewrite."""
        return bool(self.faults) and self.refused_share >= LEAST_REFUSED and not self.refused_wrongly

    def to_json(self) -> dict[str, Any]:
        """JSON-able: counts first, then what was let through or refused wrongly, then every trial."""
        return {
            "name": self.name,
            "passed": self.passed,
            "faults": len(self.faults),
            "refused": len(self.faults) - len(self.let_through),
            "refused_share": round(self.refused_share, 4),
            "set_aside": len(self.set_aside),
            "rewrites": len(self.rewrites),
            "rewrites_refused": len(self.refused_wrongly),
            "polygraphy": {
                own: {
                    "faults_refused": sum(bool(getattr(t, own)) for t in self.faults),
                    "rewrites_refused": sum(bool(getattr(t, own)) for t in self.rewrites),
                }
                for own in ("polygraphy", "polygraphy_own")
            },
            "golden": {"samples": self.golden[0], "rows": self.golden[1]},
            "held_out": {"samples": self.held_out[0], "rows": self.held_out[1]},
            "wanted": {"faults": self.wanted[0], "rewrites": self.wanted[1]},
            "seconds": round(self.seconds, 1),
            "let_through": [trial.to_json() for trial in self.let_through],
            "refused_wrongly": [trial.to_json() for trial in self.refused_wrongly],
            "trials": [trial.to_json() for trial in self.trials],
        }


@dataclass(frozen=True, slots=True)
class Judge:
    """Judges outputs as the artifact's own proof does, on the golden set and on the held-out one."""

    golden: GoldenSet
    held_out: GoldenSet
    tolerance: Tolerance
    candidate: Candidate
    dtypes: Mapping[str, str]

    def verdict(self, outputs: Mapping[str, Tensors], *, held_out: bool) -> tuple[Outcome, str]:
        """The verdict and its first reason."""
        known = self.held_out if held_out else self.golden
        report = compare(known, outputs, self.tolerance, self.candidate, dtypes=self.dtypes)
        reason = next(iter(report.reasons), "")
        outcome: Outcome = (
            "passed"
            if report.verdict is Verdict.PASSED
            else "failed"
            if report.verdict is Verdict.FAILED
            else "not_proved"
        )
        return outcome, reason


def rows_of(golden: GoldenSet) -> int:
    """The sum of first dimensions of every sample's first input: images, sentences."""
    return sum(_rows(list(sample.inputs.values())) for sample in golden.samples)


def _rows(arrays: Sequence[Any]) -> int:
    return int(arrays[0].shape[0]) if arrays and arrays[0].ndim else 1
