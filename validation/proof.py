"""The chain of comparisons with PyTorch that makes one proof, and which step is to blame where it fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtforge.runtime.errors import ArtifactError, ParityError
from trtforge.validation.parity import ParityReport, Stage, Verdict, worst_verdict

__all__ = ["Proof"]

SCHEMA = 1

_SUSPICIOUS_DB = 12.0
"""An engine that errs four times as much as onnxruntime on the same ONNX may have a fault that its limits let pass."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Every comparison that was made of one model.

    The export has to pass: fp32 against fp32 it holds the structure to 80 dB, which the limits of a low precision
    cannot. The engine has to pass where it ran; `model.onnx` on onnxruntime has to where no engine ran, and otherwise
    only tells the precision plan's errors from TensorRT's.

    Attributes:
        reports: At most one a stage.
        required: Stages without which nothing is proved; "precision" only where `model.onnx` is not `reference.onnx`.
        notes: Sentences for the report, e.g. that onnxruntime crashed on `model.onnx`.
    """

    reports: tuple[ParityReport, ...]
    required: tuple[Stage, ...] = ("export",)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stages = [report.candidate.stage for report in self.reports]
        if len(set(stages)) != len(stages):
            raise ValueError(f"two reports of one stage: {stages}")

    def stage(self, stage: Stage) -> ParityReport | None:
        """The report of one stage."""
        return next((report for report in self.reports if report.candidate.stage == stage), None)

    @property
    def deciding(self) -> tuple[ParityReport, ...]:
        """The reports that make the verdict, in the order of the chain."""
        last = self.stage("engine") or self.stage("precision")
        found = (self.stage("export"), last)
        return tuple(report for report in found if report is not None)

    @property
    def missing(self) -> tuple[Stage, ...]:
        """Required stages without a report; an engine that ran stands for "precision"."""
        present = {report.candidate.stage for report in self.reports}
        if "engine" in present:
            present.add("precision")
        return tuple(stage for stage in self.required if stage not in present)

    @property
    def verdict(self) -> Verdict:
        """The worst of the deciding reports; not proved while a required one is missing."""
        verdict = worst_verdict(*(report.verdict for report in self.deciding))
        return Verdict.NOT_PROVED if self.missing and verdict is Verdict.PASSED else verdict

    @property
    def passed(self) -> bool:
        """Whether the whole chain is proved."""
        return self.verdict is Verdict.PASSED

    @property
    def blame(self) -> str:
        """One sentence: the step that is to blame; "" where all passed."""
        export, precision, engine = self.stage("export"), self.stage("precision"), self.stage("engine")
        if self.passed:
            return ""
        if export is not None and export.verdict is Verdict.FAILED:
            return "The export is to blame: reference.onnx already differs from PyTorch."
        if engine is not None and engine.verdict is Verdict.FAILED:
            return _blame_engine(precision or export)
        if precision is not None and precision.verdict is Verdict.FAILED:
            return "The precision plan is to blame: the export is right, and model.onnx no longer is."
        if self.missing:
            return f"Nothing failed, but nothing was compared for: {', '.join(self.missing)}."
        return "Nothing failed, but the comparison could not have shown a difference."

    @property
    def all_notes(self) -> tuple[str, ...]:
        """The proof's notes, every report's, and what is odd between them."""
        return (*self.notes, *dict.fromkeys(n for report in self.reports for n in report.notes), *self._oddities())

    def raise_unless_passed(self) -> None:
        """Does nothing if the chain is proved.

        Raises:
            ParityError: it is not; says which step is to blame.
        """
        if self.passed:
            return
        for verdict in (Verdict.FAILED, Verdict.NOT_PROVED):
            for report in self.deciding:
                if report.verdict is verdict:
                    try:
                        report.raise_unless_passed()
                    except ParityError as error:
                        error.why = f"{self.blame}\n    {error.why}"
                        raise
        raise ParityError(
            "the model is not proved",
            why=self.blame,
            fix="run the comparisons that are missing",
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` reads it back equal. Verdict and blame are written for other readers."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict.value,
            "blame": self.blame,
            "required": list(self.required),
            "notes": list(self.notes),
            "reports": [report.to_json() for report in self.reports],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Proof:
        """The inverse of `to_json`.

        Raises:
            ArtifactError: another schema version, damaged, or its verdict is not what its reports say.
        """
        fix = "validate the artifact again"
        try:
            if data["schema"] != SCHEMA:
                raise ArtifactError(f"the proof has schema {data['schema']!r}; this trtforge reads {SCHEMA}", fix=fix)
            reports = tuple(ParityReport.from_json(report) for report in data["reports"])
            proof = cls(reports, tuple(data["required"]), tuple(data["notes"]))
            stated = Verdict(data["verdict"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"the proof is damaged: {error!r}", fix=fix) from error
        if proof.verdict is not stated:
            raise ArtifactError(
                f"the proof says {stated.value}, its comparisons say {proof.verdict.value}",
                why="it was edited, or put together from parts",
                fix=fix,
            )
        return proof

    def _oddities(self) -> list[str]:
        precision, engine = self.stage("precision") or self.stage("export"), self.stage("engine")
        if precision is None or engine is None:
            return []
        notes = []
        if engine.passed and not precision.passed and precision.candidate.stage == "precision":
            notes.append("onnxruntime on model.onnx did not pass where the engine did")
        if precision.candidate.precision != engine.candidate.precision:
            return notes
        before = {output.name: output.pooled for output in precision.outputs}
        for output in engine.outputs:
            expected = before.get(output.name)
            if expected is None or output.pooled is None or not engine.passed:
                continue
            # Errors of rounding in fp32 differ freely between libraries.
            if output.pooled.sqnr_db < min(expected.sqnr_db, 80.0) - _SUSPICIOUS_DB:
                notes.append(
                    f"output {output.name!r} of the engine has {output.pooled.sqnr_db:.1f} dB, onnxruntime on the same "
                    f"ONNX {expected.sqnr_db:.1f} dB: within the tolerance, but look whether the build went astray"
                )
        return notes


def _blame_engine(before: ParityReport | None) -> str:
    if before is None:
        return "The engine differs from PyTorch; without onnxruntime's results the step to blame is not known."
    if before.verdict is Verdict.FAILED:
        return "The precision plan is to blame: onnxruntime on the same model.onnx differs, too."
    if before.candidate.stage == "export" and before.candidate.precision != "fp32":
        return "The export is right; the precision plan or TensorRT's build is to blame."
    return "TensorRT's build is to blame: onnxruntime on the same ONNX agrees with PyTorch."
