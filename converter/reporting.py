"""Writes an artifact's `report.json` and `report.html` from its proof, and reads the proof back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trtforge.converter.artifact import FAILED_SUFFIX, PLAN, REFERENCE, REPORT
from trtforge.converter.extras import EXTRAS
from trtforge.runtime.errors import ArtifactError, ParityError
from trtforge.runtime.graph import load_graph, node_refs
from trtforge.runtime.precision import PrecisionPlan, Rule
from trtforge.validation.golden import GoldenSet
from trtforge.validation.pages import write_page
from trtforge.validation.polygraphy_data import export_polygraphy, polygraphy_command
from trtforge.validation.proof import Proof
from trtforge.validation.report import PlanException, ReportData, sample_facts

__all__ = ["PAGE", "read_report", "write_reports"]

PAGE = "report.html"
POLYGRAPHY = "polygraphy"
"""In a failed artifact: inputs and PyTorch's outputs in Polygraphy's format, for the command that the report names."""


def write_reports(
    folder: Path,
    name: str,
    status: str,
    facts: Mapping[str, Any],
    proof: Proof,
    golden: GoldenSet,
    failed: ParityError | None,
) -> None:
    """Writes both reports into `folder`, which already holds graph and plan; for a failure Polygraphy's data too."""
    # A later validation replaces the report of a copied folder: what stood there beside the proof still holds.
    before = read_report(folder).facts if (folder / REPORT).exists() else {}
    facts = {**{key: before[key] for key in EXTRAS if key in before}, **facts}
    commands = {"Make it again": str(facts.get("command", ""))}
    error = None
    if failed is not None:
        error = {"what": failed.what, "why": failed.why, "fix": failed.fix}
        export_polygraphy(golden, folder / POLYGRAPHY)
        commands["Find the layer to blame, and what mends it"] = f"trtforge bisect {name}{FAILED_SUFFIX}"
        commands |= _polygraphy_lines(folder, proof, facts)
    data = ReportData(
        name=name,
        status=status,
        proof=proof,
        facts=facts,
        exceptions=_exceptions(folder),
        samples=sample_facts(golden),
        commands=commands,
        error=error,
    )
    data.save(folder / REPORT)
    write_page(data, folder / PAGE)


def read_report(folder: Path) -> ReportData:
    """An artifact's report, which its manifest's hash vouches for.

    Raises:
        ArtifactError: missing, of another schema version, or damaged.
    """
    try:
        return ReportData.load(folder / REPORT)
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} has no {REPORT}", fix="convert again") from error


def _polygraphy_lines(folder: Path, proof: Proof, facts: Mapping[str, Any]) -> dict[str, str]:
    if not proof.reports or proof.reports[-1].candidate.note:  # nothing ran, or emulated: Polygraphy runs another graph
        return {}
    report = proof.reports[-1]
    file = {"export": REFERENCE, "precision": "model.onnx", "engine": "model.engine"}[report.candidate.stage]
    backend = facts["engine"]["backend"] if facts.get("engine") else ""
    line = polygraphy_command(report, POLYGRAPHY, model=file, backend=backend)
    return {f"Compare with Polygraphy (in {folder.name}/)": line}


def _exceptions(folder: Path) -> tuple[PlanException, ...]:
    plan = PrecisionPlan.load(folder / PLAN)
    if not plan.rules:
        return ()
    assigned = plan.resolve(node_refs(load_graph(folder / REFERENCE)))
    counts: Counter[Rule] = Counter(found.rule for found in assigned.values() if found.rule is not None)
    return tuple(
        PlanException(_selector(rule), rule.precision, counts[rule], rule.origin, rule.reason) for rule in plan.rules
    )


def _selector(rule: Rule) -> str:
    return replace(rule, reason="").describe().rpartition(", precision: ")[0]
