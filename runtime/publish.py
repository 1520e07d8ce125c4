"""Hashes of files, and publishing a folder so that a reader sees the old one or the new one, whole, at any instant."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from trtforge.runtime.errors import ArtifactError

__all__ = ["hash_bytes", "hash_file", "publish_folder", "staging_folder", "sweep_stale"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_STAGING = ".trtforge-staging-"
_OLD = ".trtforge-old-"
_STALE_SECONDS = 24 * 3600


def hash_bytes(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """An empty folder inside `parent` (so that publishing is a rename), deleted at the end if it is still there.

    It is locked while its owner lives, so that `sweep_stale` of another process tells it from a left-over.

    Raises:
        ArtifactError: `parent` cannot be made or written.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        sweep_stale(parent)
        path = Path(tempfile.mkdtemp(prefix=_STAGING, dir=parent))
    except OSError as error:
        raise ArtifactError(
            f"cannot write into {parent}: {error.strerror or error}",
            fix="free space or give permission there, or choose another --output",
        ) from error
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    finally:
        os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def sweep_stale(parent: Path) -> None:
    """Deletes staging folders in `parent` whose owner is gone."""
    for path in [*parent.glob(_STAGING + "*"), *parent.glob(_OLD + "*")]:
        with contextlib.suppress(OSError):
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # mkdtemp and flock are two steps: a folder younger than this may be about to be locked.
                if time.time() - path.stat().st_mtime > 60:
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def publish_folder(staged: Path, target: Path) -> None:
    """Puts the whole folder `staged` at `target`, replacing what stood there, as one step.

    Exchanged by `renameat2(RENAME_EXCHANGE)`; where the kernel or file system lacks it, old aside and new in.
    Every file is synced first, so that a power cut cannot publish an empty one.

    Raises:
        ArtifactError: `target` is a file or a symbolic link, or cannot be written.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ArtifactError(
            f"{target} is a {'symbolic link' if target.is_symlink() else 'file'}, not an artifact's folder",
            fix="remove it, or choose another --output",
        )
    for path in sorted(staged.rglob("*")):
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~_umask())  # some writers make private files
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    os.chmod(staged, 0o777 & ~_umask())
    try:
        if target.exists():
            _replace(staged, target)
        else:
            os.rename(staged, target)
    except OSError as error:
        raise ArtifactError(
            f"cannot publish {target}: {error.strerror or error}",
            fix="give permission there, or choose another --output",
        ) from error
    with contextlib.suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _replace(staged: Path, target: Path) -> None:
    if _exchange(staged, target):
        shutil.rmtree(staged, ignore_errors=True)
        return
    aside = target.with_name(f"{_OLD}{target.name}-{os.getpid()}")
    os.rename(target, aside)
    try:
        os.rename(staged, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    done = libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if done == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
