"""An artifact's manifest: what the folder holds, what it was made from, and the check that nothing changed since."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.publish import hash_bytes, hash_file, hash_part

__all__ = ["DIGEST", "MANIFEST", "SCHEMA", "FileEntry", "Manifest", "Status", "read_manifest", "write_manifest"]

SCHEMA = 1
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
"""Holds the manifest's own SHA-256, so that one altered byte anywhere in the folder is noticed."""

Status = Literal["validated", "built", "portable", "failed"]
_ATTEMPTS = 5
_THREADS = 16
"""Parts hashed at a time, at most: hashlib lets other threads run."""
_PART_BYTES = 16 << 20
"""Files larger than this are hashed in parts as well, so that all processors check them side by side."""
_SETTLED_NS = 2_000_000_000
"""Of a file that changed later than this before it was hashed, a further change may not show in its times."""
_REFUSED = "make the artifact again, or copy it again from where it was whole"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file.

    Attributes:
        sha256: Of the whole, in hex.
        size: In bytes.
        parts: SHA-256 of each `_PART_BYTES` of a large one, in order; the check goes by these where there are any.
    """

    sha256: str
    size: int
    parts: tuple[str, ...] = ()

    @classmethod
    def of_file(cls, path: Path) -> FileEntry:
        """Reads and hashes a file."""
        size = path.stat().st_size
        if size <= _PART_BYTES:
            return cls(hash_file(path), size)
        with ThreadPoolExecutor(_THREADS) as pool:
            whole = pool.submit(hash_file, path)
            parts = pool.map(lambda offset: hash_part(path, offset, _PART_BYTES), range(0, size, _PART_BYTES))
            return cls(whole.result(), size, tuple(parts))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FileEntry:
        """Reads what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        entry = cls(str(data["sha256"]), int(data["size"]), tuple(map(str, data.get("parts", ()))))
        if entry.parts and len(entry.parts) != -(-entry.size // _PART_BYTES):
            raise ValueError(f"parts of a file of {entry.size} bytes: it names {len(entry.parts)}")
        return entry

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        data: dict[str, Any] = {"sha256": self.sha256, "size": self.size}
        return {**data, "parts": list(self.parts)} if self.parts else data


@dataclass(frozen=True, slots=True)
class Manifest:
    """`facts` is the JSON object as written; the attributes are what code decides by.

    `stamps` tells, by file that was hashed, which file that was and when it last changed; see `_stamp`.
    """

    status: Status
    name: str
    files: Mapping[str, FileEntry]
    facts: Mapping[str, Any]
    stamps: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)


def write_manifest(folder: Path, status: Status, name: str, facts: Mapping[str, Any]) -> Manifest:
    """Hashes every file in `folder` and writes the manifest and its digest beside them."""
    files = {path: FileEntry.of_file(folder / path) for path in _files_in(folder)}
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "status": status,
        "name": name,
        **facts,
        "files": {path: entry.to_json() for path, entry in files.items()},
    }
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
    (folder / DIGEST).write_text(hash_bytes(text.encode()) + "\n", encoding="ascii")
    return Manifest(status, name, files, data)


def read_manifest(folder: Path, *, check_files: bool = True, known: Manifest | None = None) -> Manifest:
    """Reads a folder's manifest and checks that every file is the one that it names, and that there is no other.

    An artifact that is published anew meanwhile is read again from the start.

    Args:
        folder: An artifact.
        check_files: False checks the manifest alone, for listings.
        known: What an earlier reading in this process gave: files that nobody has written since are not hashed again.

    Raises:
        ArtifactError: not an artifact, of a newer schema, or anything was altered, added or removed.
    """
    for _ in range(_ATTEMPTS):
        before = _identity(folder)
        try:
            return _read(folder, check_files, known)
        except ArtifactError:
            if _identity(folder) == before:
                raise
    return _read(folder, check_files, known)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        facts = folder.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _read(folder: Path, check_files: bool, known: Manifest | None) -> Manifest:
    data = _read_checked(folder)
    if data.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{folder} has manifest schema {data.get('schema')!r}; this trtforge reads {SCHEMA}",
            fix="use the trtforge that made it, or convert again",
        )
    try:
        files = {str(path): FileEntry.from_json(entry) for path, entry in data["files"].items()}
        status, name = data["status"], str(data["name"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{folder / MANIFEST} lacks {error}", fix=_REFUSED) from error
    if status not in get_args(Status):
        raise ArtifactError(f"{folder} has the unknown status {status!r}", fix=_REFUSED)
    seen = known.stamps if known is not None and known.files == files else {}
    stamps = _check_files(folder, files, seen) if check_files else {}
    return Manifest(status, name, files, data, stamps)


def _read_checked(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ArtifactError(f"there is no artifact {folder}", fix="check the path; an artifact is a folder")
    try:
        raw = (folder / MANIFEST).read_bytes()
        digest = (folder / DIGEST).read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} is not an artifact: it has no {Path(error.filename).name}", fix="check the path"
        ) from error
    except OSError as error:
        raise ArtifactError(
            f"cannot read {folder}: {error.strerror or error}", fix="give permission to read it"
        ) from error
    if digest != (hash_bytes(raw) + "\n").encode():
        raise ArtifactError(f"{folder / MANIFEST} is not the one that was published with {DIGEST}", fix=_REFUSED)
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder / MANIFEST} is not JSON: {error}", fix=_REFUSED) from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{folder / MANIFEST} is not a JSON object", fix=_REFUSED)
    return data


def _check_files(
    folder: Path, files: Mapping[str, FileEntry], known: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    present = set(_files_in(folder))
    for path in sorted(present - set(files)):
        raise ArtifactError(f"{folder / path} is not in the artifact's manifest", why="a file was added", fix=_REFUSED)
    for path in files:
        if path not in present:
            raise ArtifactError(f"{folder / path} is missing", fix=_REFUSED)
    # Threads for small files would cost a reader time in which another process may publish the artifact anew.
    pool = ThreadPoolExecutor(_THREADS) if any(entry.parts for entry in files.values()) else None
    try:
        # All parts of all large files are under way before the first is waited for.
        checks = {path: _Check(folder / path, files[path], known.get(path), pool) for path in files}
        stamps = {path: check.finish() for path, check in checks.items()}
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return {path: stamp for path, stamp in stamps.items() if stamp}


class _Check:
    """Whether a file is the one that its entry says; parts of a large one are hashed in the pool meanwhile."""

    def __init__(
        self, path: Path, entry: FileEntry, known: tuple[int, ...] | None, pool: ThreadPoolExecutor | None
    ) -> None:
        self._path, self._entry = path, entry
        self._parts: list[Future[str]] = []
        with self._readable():
            self._stamp, self._size = _stamp(path), path.stat().st_size
        self._known = bool(self._stamp) and self._stamp == known
        if pool is not None and entry.parts and not self._known and self._size == entry.size:
            offsets = range(0, entry.size, _PART_BYTES)
            self._parts = [pool.submit(hash_part, path, offset, _PART_BYTES) for offset in offsets]

    def finish(self) -> tuple[int, ...]:
        """The file's stamp.

        Raises:
            ArtifactError: it is another file, or cannot be read.
        """
        if self._known:
            return self._stamp
        size, entry = self._size, self._entry
        with self._readable():
            same = size == entry.size and self._holds()
        if not same:
            raise ArtifactError(
                f"{self._path} was altered",
                why=f"it has {size} bytes, the manifest says {entry.size}"
                if size != entry.size
                else f"its SHA-256 is not {entry.sha256[:16]}…, which the manifest says",
                fix=_REFUSED,
            )
        return self._stamp

    def _holds(self) -> bool:
        if self._parts:
            return tuple(part.result() for part in self._parts) == self._entry.parts
        return hash_file(self._path) == self._entry.sha256

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(f"cannot read {self._path}: {error.strerror or error}") from error


def _stamp(path: Path) -> tuple[int, ...]:
    """Which file it is and when it was last written or replaced; () where a change from now on might not show.

    The time of the last change of an inode (`ctime`) cannot be set by a program, unlike `mtime`.
    """
    facts = path.stat()
    if time.time_ns() - facts.st_ctime_ns < _SETTLED_NS:
        return ()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _files_in(folder: Path) -> list[str]:
    """Every file below `folder` but the manifest and its digest, as sorted POSIX paths. A link counts as a file."""
    found = []
    for root, dirs, names in os.walk(folder):
        links = [name for name in dirs if (Path(root) / name).is_symlink()]
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in [*names, *links]]
    return sorted(path for path in found if path not in (MANIFEST, DIGEST))
