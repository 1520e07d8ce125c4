"""`trtforge report`: draws an artifact's page again from its `report.json`, and the index page of a folder of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtforge.converter.artifact import REPORT, Artifact, open_artifact
from trtforge.converter.manifest import MANIFEST, read_manifest, write_manifest
from trtforge.converter.reporting import PAGE, read_report
from trtforge.runtime.errors import ArtifactError, TrtForgeError
from trtforge.runtime.publish import publish_folder, staging_folder
from trtforge.validation.index_page import IndexEntry, write_index
from trtforge.validation.pages import render_page, summarize, write_page
from trtforge.validation.report import ReportData

__all__ = ["INDEX", "Reported", "add_to_report", "report_folder", "update_index"]

INDEX = "index.html"


@dataclass(frozen=True, slots=True)
class Reported:
    """One artifact's report: where it is, what it says, and whether its page was drawn anew."""

    path: Path
    data: ReportData
    rewritten: bool

    def to_json(self) -> dict[str, Any]:
        """As `report --json` lists it."""
        return {
            "name": self.data.name,
            "status": self.data.status,
            "verdict": self.data.proof.verdict.value,
            "summary": summarize(self.data),
            "blame": self.data.proof.blame,
            "page": str(self.path / PAGE),
            "data": str(self.path / "report.json"),
            "rewritten": self.rewritten,
        }


def report_folder(folder: Path) -> list[Reported]:
    """Draws the page of an artifact, or of every artifact in a folder of them together with their index.

    A page that comes out as it stands is left; else the artifact is published anew, with the page's new hash.

    Raises:
        ArtifactError: neither, altered, or not to be written.
    """
    if (folder / MANIFEST).exists():
        return [_redraw(folder)]
    children = _children(folder)
    if not children:
        raise ArtifactError(f"{folder} is no artifact and holds none", fix="check the path")
    found = [_redraw(child) for child in children]
    update_index(folder)
    return found


def add_to_report(folder: Path, extras: Mapping[str, Any]) -> None:
    """Adds data to an artifact's report, draws its page, and publishes the artifact anew.

    Args:
        folder: The artifact.
        extras: By key out of `extras.EXTRAS`; what stood there is replaced.

    Raises:
        ArtifactError: not an artifact, altered, or not to be written.
    """
    artifact = open_artifact(folder)
    before = read_report(folder)
    data = replace(before, facts={**before.facts, **extras})
    with staging_folder(folder.absolute().parent) as staging:
        copy = staging / "artifact"
        shutil.copytree(folder, copy)
        data.save(copy / REPORT)
        write_page(data, copy / PAGE)
        _publish(artifact, copy, folder)


def update_index(folder: Path) -> Path | None:
    """Writes `index.html` beside the artifacts in `folder`; None where there are none.

    Raises:
        ArtifactError: it cannot be written.
    """
    entries = [entry for child in _children(folder) if (entry := _entry(child)) is not None]
    if not entries:
        return None
    write_index(folder.resolve().name, entries, folder / INDEX)
    return folder / INDEX


def _children(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ArtifactError(f"there is no folder {folder}", fix="check the path")
    return sorted(child for child in folder.iterdir() if not child.name.startswith(".") and (child / MANIFEST).exists())


def _redraw(folder: Path) -> Reported:
    artifact = open_artifact(folder)
    data = read_report(folder)
    page = render_page(data)
    before = folder / PAGE
    if before.exists() and before.read_text(encoding="utf-8") == page:
        return Reported(folder, data, rewritten=False)
    with staging_folder(folder.absolute().parent) as staging:
        copy = staging / "artifact"
        shutil.copytree(folder, copy)
        (copy / PAGE).write_text(page, encoding="utf-8", newline="\n")
        _publish(artifact, copy, folder)
    return Reported(folder, data, rewritten=True)


def _publish(artifact: Artifact, copy: Path, target: Path) -> None:
    own = ("schema", "status", "name", "files")
    facts = {key: value for key, value in artifact.facts.items() if key not in own}
    for name in set(copy.iterdir()) - {copy / name.split("/")[0] for name in artifact.manifest.files}:
        if name.name != PAGE:  # manifest and digest, which are written anew
            name.unlink()
    write_manifest(copy, artifact.status, artifact.name, facts)
    publish_folder(copy, target)


def _entry(folder: Path) -> IndexEntry | None:
    """None for what has no report that can be read: the index shows what there is."""
    try:
        manifest = read_manifest(folder, check_files=False)
        data = read_report(folder)
    except TrtForgeError:
        return None
    measured: Mapping[str, Any] = manifest.facts.get("measured") or {}
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    engine = sum(size for name, size in sizes.items() if name.startswith("model.engine"))
    onnx = sum(size for name, size in sizes.items() if name.endswith((".onnx", ".onnx.data")))
    return IndexEntry(
        folder.name,
        data.status,
        data.proof.verdict,
        str(manifest.facts.get("precision", "")),
        str(measured.get("runner", "")),
        _number(measured.get("sqnr_db")),
        _number(measured.get("max_abs_over_std")),
        engine or onnx,
        str(manifest.facts.get("created", "")),
        data.error["what"] if data.error else "",
    )


def _number(value: object) -> float | None:
    if not isinstance(value, int | float | str):
        return None
    number = float(value)
    return None if math.isnan(number) else number
