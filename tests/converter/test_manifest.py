"""The manifest notices every change."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
from tiny_models import write_tiny

import trtforge
from trtforge.converter import manifest as manifests
from trtforge.converter.artifact import open_artifact
from trtforge.converter.manifest import read_manifest, write_manifest
from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.publish import hash_bytes, hash_file, publish_folder, staging_folder


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


def test_large_files_are_checked_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_manifest(folder).files["model.engine"]
    monkeypatch.setattr(manifests, "_PART_BYTES", 128)
    assert read_manifest(folder).files["model.engine"] == before  # written without parts, as older ones are
    entry = write_manifest(folder, "built", "model", {}).files["model.engine"]
    data = (folder / "model.engine").read_bytes()
    assert entry.sha256 == before.sha256 == hash_bytes(data)
    assert entry.parts == tuple(hash_bytes(data[start : start + 128]) for start in range(0, 400, 128))
    test_every_single_byte_counts(folder)
    text = json.loads((folder / "manifest.json").read_text())
    text["files"]["model.engine"]["parts"].pop()
    raw = json.dumps(text)
    (folder / "manifest.json").write_text(raw)
    (folder / "manifest.sha256").write_text(hash_bytes(raw.encode()) + "\n")
    with pytest.raises(ArtifactError, match="parts of a file of 400 bytes: it names 3"):
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


def flip(rng: random.Random, data: bytes) -> bytes:
    altered = bytearray(data)
    altered[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(altered)


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def grow(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    at, length = rng.randrange(len(data)), rng.randrange(1, 64)
    return data[:at] + rng.randbytes(length) + data[at + length :]


KINDS = ("bytes", "bytes", "bytes", "several", "remove", "rename", "swap", "copy", "add", "link", "folder")


def alter(rng: random.Random, folder: Path, files: dict[Path, bytes]) -> tuple[str, list[Path]]:
    """Does one thing to the folder; gives its name and what came into being."""
    path, other = rng.sample(sorted(files), 2)
    kind = rng.choice(
        ("bytes", "bytes", "bytes", "several", "remove", "rename", "swap", "copy", "add", "link", "folder")
    )
    made: list[Path] = []
    if kind == "bytes":
        change = rng.choice((flip, cut, grow, overwrite))
        path.write_bytes(change(rng, files[path]))
        kind = f"{change.__name__} {path.name}"
    elif kind == "several":
        for each in rng.sample(sorted(files), rng.randrange(2, len(files))):
            each.write_bytes(flip(rng, files[each]))
    elif kind == "remove":
        path.unlink()
    elif kind == "rename":
        made = [path.with_name(rng.choice((path.name.upper(), path.name + "~", "." + path.name)))]
        path.rename(made[0])
    elif kind == "swap":
        path.write_bytes(files[other])
        other.write_bytes(files[path])
    elif kind == "copy":
        path.write_bytes(files[other])
    elif kind == "add":
        made = [path.with_name(f"extra-{rng.randrange(99)}")]
        made[0].write_bytes(rng.randbytes(rng.randrange(3)))
    elif kind == "link":
        path.unlink()
        path.symlink_to(other)
    else:
        path.unlink()
        path.mkdir()
    return kind, made


def restore(files: dict[Path, bytes], made: list[Path]) -> None:
    for path in made:
        path.unlink()
    for path, data in files.items():
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            path.rmdir()
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_altered_artifact_is_refused(tmp_path: Path, number: int) -> None:
    """A real artifact, altered in one random way after another."""
    write_tiny(tmp_path)
    made = trtforge.convert(tmp_path / "tiny.onnx", None, tmp_path / "artifact", dims={"n": (1, 2, 4)}).path
    files = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    rng = random.Random(number)
    accepted = []
    for _ in range(number):
        kind, new = alter(rng, made, files)
        if any(not path.is_file() or path.read_bytes() != data for path, data in files.items()) or new:
            try:
                open_artifact(made)
                accepted.append(kind)
            except ArtifactError as error:
                assert str(made) in str(error)  # noqa: PT017  # one in a thousand may be accepted: it is counted
        restore(files, new)
    assert accepted == []
    open_artifact(made)


def test_a_manifest_signed_anew_is_still_checked(folder: Path) -> None:
    whole = (folder / "manifest.json").read_text()
    changes = ('"files"', '"filez"'), ('"size"', '"syze"'), ('"schema": 1', '"schema": 2'), ('"built"', '"certified"')
    changed = [whole.replace(*change) for change in (*changes, ("model.engine", "../model.engine"))]
    for text in ("", "{", "[]", "\0", "[" * 100_000, whole[:-9], *changed):
        (folder / "manifest.json").write_text(text)
        (folder / "manifest.sha256").write_text(hash_bytes(text.encode()) + "\n")
        with pytest.raises(ArtifactError):
            read_manifest(folder)


def test_reading_while_another_publishes(folder: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    def publish() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with staging_folder(tmp_path) as staging:
                new = staging / "new"
                new.mkdir()
                (new / "model.engine").write_bytes(str(number).encode() * 50_000)
                write_manifest(new, "built", "model", {"number": number})
                publish_folder(new, folder)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        seen = {read_manifest(folder).facts.get("number") for _ in range(200)}
    finally:
        stop.set()
        thread.join()
    assert len(seen) > 1


def test_files_that_nobody_wrote_since_are_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    write_manifest(tmp_path, "built", "m", {})
    hashed: list[str] = []

    def count(path: Path) -> str:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(manifests, "hash_file", count)
    fresh = read_manifest(tmp_path)
    assert not fresh.stamps  # written a moment ago: a change might not show
    read_manifest(tmp_path, known=fresh)
    assert sorted(hashed) == ["a.bin", "a.bin", "b.bin", "b.bin"]
    monkeypatch.setattr(manifests, "_SETTLED_NS", 0)
    settled = read_manifest(tmp_path)
    hashed.clear()
    assert read_manifest(tmp_path, known=settled).stamps == settled.stamps
    assert not hashed
    # A byte altered in place, with its size and its time of writing put back.
    place = tmp_path / "b.bin"
    times = place.stat()
    altered = bytearray(place.read_bytes())
    altered[500] ^= 1
    time.sleep(0.02)
    place.write_bytes(altered)
    os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ArtifactError, match=r"b\.bin was altered"):
        read_manifest(tmp_path, known=settled)
    assert hashed == ["b.bin"]
