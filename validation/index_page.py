"""`index.html`: one row for each artifact of a folder, with a link to its report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trtforge.runtime.errors import ArtifactError
from trtforge.validation.pages import template
from trtforge.validation.parity import Verdict

__all__ = ["IndexEntry", "render_index", "write_index"]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One artifact.

    Attributes:
        name: Its folder.
        status: "validated", "built", "portable", "failed".
        verdict: Of its proof.
        precision: The plan's default.
        runner: What the last comparison ran on.
        sqnr_db: The least SQNR of an output there; None where nothing was measured.
        max_abs_over_std: The greatest error there, in standard deviations of its output.
        size: Bytes of the engine, or of the ONNX where there is none.
        created: When it was made.
        error: What went wrong, in one line; "" where nothing did.
    """

    name: str
    status: str
    verdict: Verdict
    precision: str
    runner: str
    sqnr_db: float | None
    max_abs_over_std: float | None
    size: int
    created: str
    error: str = ""


def render_index(title: str, entries: Sequence[IndexEntry]) -> str:
    """The page as text; failures first, then by name."""
    order = {Verdict.FAILED: 0, Verdict.NOT_PROVED: 1, Verdict.PASSED: 2}
    ordered = sorted(entries, key=lambda entry: (order[entry.verdict], entry.name))
    passed = sum(entry.verdict is Verdict.PASSED for entry in entries)
    return template("index.html.j2").render(title=title, entries=ordered, passed=passed, total=len(entries))


def write_index(title: str, entries: Sequence[IndexEntry], path: Path) -> None:
    """Writes the page. Raises `ArtifactError` where it cannot."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")  # two batches may end at once
    try:
        aside.write_text(render_index(title, entries), encoding="utf-8", newline="\n")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ArtifactError(
            f"cannot write {path}: {error.strerror or error}", fix="free space or give permission there"
        ) from error
