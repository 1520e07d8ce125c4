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

__all__ = ["write_reports"]


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
