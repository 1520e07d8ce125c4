"""The manifest notices every change."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from trtforge.converter.artifact import open_artifact
from trtforge.converter.manifest import read_manifest, write_manifest
from trtforge.runtime.errors import ArtifactError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "artifact"
    (path / "proof").mkdir(parents=True)
    (path / "model.engine").write_bytes(os.urandom(400))
    (path / "proof" / "inputs.safetensors").write_bytes(os.urandom(100))
    write_manifest(path, "built", "model", {"engine": {"backend": "tensorrt-rtx"}})
    return path


def test_reads_what_was_written(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert (manifest.status, manifest.name) == ("built", "model")
    assert sorted(manifest.files) == ["model.engine", "proof/inputs.safetensors"]
    assert open_artifact(folder).facts["engine"] == {"backend": "tensorrt-rtx"}


def test_every_single_byte_counts(folder: Path) -> None:
    rng = random.Random(0)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        for index in {0, len(data) - 1, *rng.sample(range(len(data)), min(40, len(data)))}:
            altered = bytearray(data)
            altered[index] ^= 1 << rng.randrange(8)
            path.write_bytes(bytes(altered))
            with pytest.raises(ArtifactError):
                read_manifest(folder)
        path.write_bytes(data)
    read_manifest(folder)


def test_added_removed_truncated_or_foreign(folder: Path, tmp_path: Path) -> None:
    def altered(name: str) -> Path:
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        return copy

    added = altered("added")
    (added / "extra").write_text("")
    removed = altered("removed")
    (removed / "model.engine").unlink()
    truncated = altered("truncated")
    (truncated / "model.engine").write_bytes((folder / "model.engine").read_bytes()[:-1])
    foreign = altered("foreign")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.engine").write_bytes(b"other")
    write_manifest(other, "built", "other", {})
    shutil.copy(other / "manifest.json", foreign)
    both = altered("both")
    for name in ("manifest.json", "manifest.sha256"):
        shutil.copy(other / name, both)
    for path in (added, removed, truncated, foreign, both):
        with pytest.raises(ArtifactError):
            read_manifest(path)


def test_what_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no artifact"):
        open_artifact(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        open_artifact(tmp_path)


def test_failed_and_engineless_artifacts_are_not_loaded(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="never run"):
        open_artifact(folder).load()
    write_manifest(folder, "failed", "model", {})
    with pytest.raises(ArtifactError, match="never loaded"):
        open_artifact(folder).load(allow_unvalidated=True)
    (folder / "model.engine").unlink()
    write_manifest(folder, "portable", "model", {})
    with pytest.raises(ArtifactError, match="no engine"):
        open_artifact(folder).load()
