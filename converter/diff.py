"""Two artifacts compared as the pytest plugin compares one with its baseline: `trtforge diff OLD NEW`."""

from __future__ import annotations

from pathlib import Path

from trtforge.converter.artifact import open_artifact
from trtforge.converter.compare_artifacts import Comparison, compare_records
from trtforge.converter.record import record_artifact
from trtforge.converter.terminal import print_json, print_table
from trtforge.runtime.errors import ParityError

__all__ = ["diff", "diff_artifacts"]


def diff_artifacts(old: Path, new: Path) -> Comparison:
    """Compares two artifacts of any status.

    Raises:
        ArtifactError: one of them is none, or was altered.
    """
    return compare_records(record_artifact(open_artifact(old)), record_artifact(open_artifact(new)))


def diff(old: Path, new: Path, *, as_json: bool) -> int:
    """Prints what differs; the exit code is 0, or `ParityError`'s where `new` is a regression."""
    found = diff_artifacts(old, new)
    if as_json:
        print_json({"old": str(old), "new": str(new), **found.to_json()})
    else:
        columns = ("stage", "output", "measure", "old", "new", "allowed", "")
        rows = [[r.stage, r.output, r.measure, r.old, r.new, r.allowed, "worse" if r.worse else ""] for r in found.rows]
        print_table(f"{old} -> {new}", columns, rows)
        if found.causes:
            print_table("likely cause, likeliest first", ("kind", "what"), [[c.kind, c.text] for c in found.causes])
        beside = [[c.kind, c.text] for c in found.changes if c not in found.causes]
        if beside:
            print_table("what changed" + (" beside it" if found.causes else ""), ("kind", "what"), beside)
        if found.sizes:
            sizes = [[name, _bytes(before), _bytes(after)] for name, (before, after) in found.sizes.items()]
            print_table("sizes", ("file", "old bytes", "new bytes"), sizes)
    return ParityError.exit_code if found.regressions else 0


def _bytes(size: int | None) -> str:
    return "-" if size is None else f"{size:,}"
