"""What a bisection came to, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from trtforge.converter.finding import Blame, Finding
from trtforge.validation.kinds import decibels
from trtforge.validation.parity import ParityReport

__all__ = ["describe_finding"]

_HEADS = {
    "agrees": "meets its limits",
    "export": "reference.onnx differs from PyTorch: the export is to blame, and no plan mends it",
    "graph": "is another graph than reference.onnx",
    "mended": "does not meet its limits, and an exception mends it",
    "not mended": "does not meet its limits, and no exception was found that mends it",
}


def describe_finding(found: Finding) -> str:
    """The layers in the order in which they were found, what was measured, and the exceptions as YAML."""
    lines = [f"{found.folder.name} ({found.runner}) {_HEADS[found.outcome]}", *(f"note: {n}" for n in found.notes)]
    if found.outcome == "agrees" and found.blames:
        lines.append("most of what error there is comes from:")
    for number, blame in enumerate(found.blames, 1):
        lines += ["", *_blame(number, blame)]
    lines += ["", *_figures("before", found.before)]
    if found.after is not None:
        lines += _figures("with the exceptions" if found.exception else "its plan, carried out afresh", found.after)
    if found.exception:
        lines += ["", "add to the plan:", found.exception.rstrip()]
    if found.outcome == "graph":
        lines += ["", "convert again: what wrote model.onnx, or changed it since, is to blame, and no plan mends it"]
    return "\n".join(lines)


def _blame(number: int, blame: Blame) -> Iterator[str]:
    where = f" in {blame.module}" if blame.module else ""
    line = f", {blame.line}" if blame.line else ""
    yield f"{number}. {', '.join(blame.nodes)}: {blame.op}{where}{line}"
    if blame.code:
        yield f"   > {blame.code}"
    yield f"   {blame.symptom.kind}: {blame.symptom.reason}"
    before = "are exact" if not blame.before else f"have {decibels(blame.before)}"
    yield f"   the outputs {before} before it and have {decibels(blame.after)} with it"
    yield f"   alone, fed the reference's tensors, it has {decibels(blame.own)}"
    if blame.share < 0.5:
        yield f"   it adds {blame.share:.0%} of the noise: error piles up over many layers, this one adds most"


def _figures(when: str, report: ParityReport) -> list[str]:
    worst = min((o.pooled.sqnr_db for o in report.outputs if o.pooled is not None), default=float("nan"))
    if report.passed:
        return [f"{when}: SQNR {worst:.1f} dB, all limits met on {len(report.samples)} samples"]
    return [f"{when}: SQNR {worst:.1f} dB", *(f"   {reason}" for reason in report.reasons[:4])]
