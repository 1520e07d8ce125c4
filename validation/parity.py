"""What a comparison found: verdict, reasons and figures, as data that goes into reports and comes back."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trtforge.runtime.errors import ArtifactError, ParityError
from trtforge.validation.histogram import Magnitude
from trtforge.validation.metrics import Measures
from trtforge.validation.tolerance import Tolerance

__all__ = ["Candidate", "OutputResult", "ParityReport", "SampleResult", "Stage", "Verdict", "worst_verdict"]

SCHEMA = 1

Stage = Literal["export", "precision", "engine"]
"""What was compared with PyTorch: `reference.onnx`, `model.onnx` (both by onnxruntime), or the engine."""


class Verdict(str, enum.Enum):
    """`NOT_PROVED`: nothing differed beyond the tolerance, but the comparison could not have shown a difference."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_PROVED = "not_proved"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What was compared with the reference.

    Attributes:
        stage: Which file of the artifact ran.
        runner: What ran it: "onnxruntime", "tensorrt-rtx".
        version: The version of that.
        precision: The plan's default.
        hashes: SHA-256 in hex of what ran: "graph" (`graph_hash`), "file", "engine".
        note: How the run differed from the real thing, e.g. bf16 emulated by rounding in fp32; else "".
    """

    stage: Stage
    runner: str
    version: str
    precision: str
    hashes: Mapping[str, str]
    note: str = ""


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One output in one sample; `unmet` has a sentence for each limit that was not met."""

    sample: str
    shape: tuple[int, ...]
    measures: Measures
    unmet: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputResult:
    """One output over all samples.

    Attributes:
        name: The output's name.
        dtype: The reference's dtype.
        verdict: On this output alone.
        reasons: Sentences: why it did not pass.
        notes: Sentences that do not touch the verdict.
        pooled: The figures over all samples together; None where shapes or dtypes forbid a comparison.
        samples: Each sample's figures.
        fix: What to do about it, as an instruction; "" where it passed.
        exponents: `count_exponents` of a floating output, for a histogram of its errors.
        magnitudes: `errors_by_magnitude` of a floating output; () in reports older than it.
    """

    name: str
    dtype: str
    verdict: Verdict
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    pooled: Measures | None = None
    samples: tuple[SampleResult, ...] = ()
    fix: str = ""
    exponents: tuple[tuple[int, int], ...] = ()
    magnitudes: tuple[Magnitude, ...] = ()

    @property
    def worst(self) -> SampleResult | None:
        """The sample with the least SQNR, then the most mismatches; None without samples."""
        return min(self.samples, key=lambda s: (s.measures.sqnr_db, -s.measures.mismatches), default=None)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """A candidate compared with the reference.

    Attributes:
        candidate: What was compared.
        reference: What recorded the golden set: "torch 2.14.1".
        tolerance: The limits.
        verdict: Failed if anything failed, else not proved if anything could not be, else passed.
        reasons: Sentences: why it did not pass; names, counts and shapes first.
        outputs: Each output's result, in the reference's order.
        samples: Names of the samples compared.
        fix: What to do about it, as an instruction; "" where it passed.
    """

    candidate: Candidate
    reference: str
    tolerance: Tolerance
    verdict: Verdict
    reasons: tuple[str, ...]
    outputs: tuple[OutputResult, ...] = ()
    samples: tuple[str, ...] = ()
    fix: str = ""

    @property
    def passed(self) -> bool:
        """Whether equality was proved."""
        return self.verdict is Verdict.PASSED

    @property
    def notes(self) -> tuple[str, ...]:
        """The candidate's note and those of all outputs."""
        own = (self.candidate.note,) if self.candidate.note else ()
        return (*own, *(note for output in self.outputs for note in output.notes))

    def raise_unless_passed(self) -> None:
        """Does nothing if equality was proved.

        Raises:
            ParityError: it was not.
        """
        if self.passed:
            return
        run = f"{self.candidate.precision} on {self.candidate.runner} {self.candidate.version}"
        if self.verdict is Verdict.FAILED:
            what = f"{_SUBJECTS[self.candidate.stage]} ({run}) does not equal {self.reference}"
        else:
            what = f"{_SUBJECTS[self.candidate.stage]} ({run}) is not proved equal to {self.reference}"
        shown = self.reasons[:6]
        more = [f"and {len(self.reasons) - 6} more"] if len(self.reasons) > 6 else []
        raise ParityError(what, why="\n    ".join([*shown, *more]), fix=self.fix)

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` reads it back equal."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict.value,
            "reasons": list(self.reasons),
            "fix": self.fix,
            "candidate": {
                "stage": self.candidate.stage,
                "runner": self.candidate.runner,
                "version": self.candidate.version,
                "precision": self.candidate.precision,
                "hashes": dict(self.candidate.hashes),
                "note": self.candidate.note,
            },
            "reference": self.reference,
            "tolerance": self.tolerance.to_json(),
            "samples": list(self.samples),
            "outputs": [_output_to_json(output) for output in self.outputs],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ParityReport:
        """The inverse of `to_json`.

        Raises:
            ArtifactError: another schema version, or damaged.
        """
        try:
            if data["schema"] != SCHEMA:
                raise ArtifactError(
                    f"the parity report has schema {data['schema']!r}; this trtforge reads {SCHEMA}",
                    fix="validate the artifact again",
                )
            candidate = data["candidate"]
            return cls(
                candidate=Candidate(
                    stage=candidate["stage"],
                    runner=candidate["runner"],
                    version=candidate["version"],
                    precision=candidate["precision"],
                    hashes=dict(candidate["hashes"]),
                    note=candidate["note"],
                ),
                reference=data["reference"],
                tolerance=Tolerance.from_json(data["tolerance"]),
                verdict=Verdict(data["verdict"]),
                reasons=tuple(data["reasons"]),
                outputs=tuple(_output_from_json(output) for output in data["outputs"]),
                samples=tuple(data["samples"]),
                fix=data["fix"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"the parity report is damaged: {error!r}", fix="validate the artifact again"
            ) from error


_SUBJECTS: Mapping[Stage, str] = {
    "export": "the exported ONNX",
    "precision": "the ONNX with the precision plan carried out",
    "engine": "the engine",
}


def worst_verdict(*verdicts: Verdict) -> Verdict:
    """Failed before not proved before passed; not proved where there is none."""
    for verdict in (Verdict.FAILED, Verdict.NOT_PROVED):
        if verdict in verdicts:
            return verdict
    return Verdict.PASSED if verdicts else Verdict.NOT_PROVED


def _output_to_json(output: OutputResult) -> dict[str, Any]:
    return {
        "name": output.name,
        "dtype": output.dtype,
        "verdict": output.verdict.value,
        "reasons": list(output.reasons),
        "notes": list(output.notes),
        "pooled": output.pooled.to_json() if output.pooled else None,
        "samples": [
            {"sample": s.sample, "shape": list(s.shape), "measures": s.measures.to_json(), "unmet": list(s.unmet)}
            for s in output.samples
        ],
        "fix": output.fix,
        "exponents": [list(pair) for pair in output.exponents],
        "magnitudes": [magnitude.to_json() for magnitude in output.magnitudes],
    }


def _output_from_json(data: Mapping[str, Any]) -> OutputResult:
    return OutputResult(
        name=data["name"],
        dtype=data["dtype"],
        verdict=Verdict(data["verdict"]),
        reasons=tuple(data["reasons"]),
        notes=tuple(data["notes"]),
        pooled=Measures.from_json(data["pooled"]) if data["pooled"] else None,
        samples=tuple(
            SampleResult(s["sample"], tuple(s["shape"]), Measures.from_json(s["measures"]), tuple(s["unmet"]))
            for s in data["samples"]
        ),
        fix=data["fix"],
        exponents=tuple((exponent, count) for exponent, count in data["exponents"]),
        magnitudes=tuple(
            Magnitude(int(e), int(n), float(rms), float(top)) for e, n, rms, top in data.get("magnitudes", ())
        ),
    )
