"""Writes an artifact's `report.json` and `report.html` from its proofs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtforge.converter.artifact import REPORT
from trtforge.runtime.errors import ParityError

if TYPE_CHECKING:
    from trtforge.validation.parity import ParityReport

__all__ = ["read_reports", "write_reports"]


def read_reports(folder: Path) -> list[ParityReport]:
    """The proofs in an artifact's `report.json`, which its manifest's hash vouches for.

    Raises:
        ArtifactError: another schema version, or damaged.
    """
    from trtforge.validation.parity import ParityReport

    data = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return [ParityReport.from_json(report) for report in data["reports"]]


def write_reports(
    folder: Path,
    name: str,
    status: str,
    facts: Mapping[str, Any],
    reports: list[ParityReport],
    failed: ParityError | None,
) -> None:
    """Writes both reports into `folder`."""
    data = {
        "schema": 1,
        "name": name,
        "status": status,
        "error": None if failed is None else {"what": failed.what, "why": failed.why, "fix": failed.fix},
        "reports": [report.to_json() for report in reports],
        **facts,
    }
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    (folder / REPORT).write_text(text, encoding="utf-8")
