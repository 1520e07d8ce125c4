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
from collections.abc import Iterator
from pathlib import Path

from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.watch import note

__all__ = [
    "check_replaceable",
    "discard_folder",
    "hash_bytes",
    "hash_file",
    "hash_part",
    "publish_folder",
    "scratch_folder",
    "staging_folder",
    "sweep_stale",
]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_STAGING = ".trtforge-staging-"
_OLD = ".trtforge-old-"
_ATTEMPTS = 5


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


def hash_part(path: Path, offset: int, size: int) -> str:
    """SHA-256 in hex of `size` bytes of a file from `offset` on, or of those that are there."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(size, 1 << 20)))
        while size and (count := file.readinto(buffer[: min(size, len(buffer))])):
            digest.update(buffer[:count])
            size -= count
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
        # Shared with others that stage, against those that sweep: making and locking a folder are two steps.
        with _locked(parent, fcntl.LOCK_SH):
            note(staging=str(parent.absolute()))
            path = Path(tempfile.mkdtemp(prefix=_STAGING, dir=parent))
            lock = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ArtifactError(
            f"cannot write into {parent}: {error.strerror or error}",
            fix="free space or give permission there, or choose another --output",
        ) from error
    try:
        yield path
    finally:
        _remove(path)
        os.close(lock)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder elsewhere, for what is never published; deleted after a crash of the command too."""
    with tempfile.TemporaryDirectory(prefix="trtforge-", ignore_cleanup_errors=True) as name:
        note(scratch=name)
        yield Path(name)


def sweep_stale(parent: Path) -> None:
    """Deletes staging folders in `parent` whose owner is gone, and puts back an artifact that one had set aside."""
    left = [*parent.glob(_STAGING + "*"), *parent.glob(_OLD + "*")]
    if not left:
        return
    with contextlib.suppress(OSError), _locked(parent, fcntl.LOCK_EX | fcntl.LOCK_NB, needed=True):
        for path in left:
            with contextlib.suppress(OSError):
                lock = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB, needed=True)
                try:
                    target = path.with_name(path.name.removeprefix(_OLD).rpartition("-")[0])
                    if path.name.startswith(_OLD) and not target.exists():
                        os.rename(path, target)
                    else:
                        _remove(path)
                finally:
                    os.close(lock)


def check_replaceable(target: Path) -> None:
    """Raises `ArtifactError` where `publish_folder` could not replace what stands at `target`."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ArtifactError(
            f"{target} is a {'symbolic link' if target.is_symlink() else 'file'}, not an artifact's folder",
            fix="remove it, or choose another --output",
        )
    # Moving a folder to another parent writes its "..", so that it has to be writable itself.
    if target.exists() and not os.access(target, os.W_OK):
        raise ArtifactError(
            f"{target} is read-only, and is not replaced", fix=f"chmod -R u+w {target}, or choose another --output"
        )


def publish_folder(staged: Path, target: Path) -> None:
    """Puts the whole folder `staged` at `target`, replacing what stood there, as one step.

    Exchanged by `renameat2(RENAME_EXCHANGE)`; where the kernel or file system lacks it, old aside and new in.
    Every file is synced first, so that a power cut cannot publish an empty one.

    Raises:
        ArtifactError: `target` is a file, a symbolic link or read-only, or cannot be written.
    """
    check_replaceable(target)
    mask = ~_umask()
    try:
        for path in sorted(staged.rglob("*")):
            os.chmod(path, (0o777 if path.is_dir() else 0o666) & mask)  # some writers make private files
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        os.chmod(staged, 0o777 & mask)
        _put(staged, target)
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


def discard_folder(path: Path, staging: Path) -> None:
    """Moves the folder at `path` into `staging`, which is deleted, so that nobody sees half of it. It may stay."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):
            os.rename(path, staging / f"discarded-{path.name}")


def _put(staged: Path, target: Path) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            if target.exists():
                _replace(staged, target)
            else:
                os.rename(staged, target)
            return
        except OSError as error:
            # Another process published or removed `target` between our look and our step.
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) or attempt == _ATTEMPTS - 1:
                raise
            if not staged.exists():
                raise


def _replace(staged: Path, target: Path) -> None:
    if _exchange(staged, target):
        _remove(staged)
        return
    aside = target.with_name(f"{_OLD}{target.name}-{os.getpid()}")
    with _locked(target.parent, fcntl.LOCK_EX):  # nobody sweeps `aside` meanwhile
        os.rename(target, aside)
        try:
            os.rename(staged, target)
        except OSError:
            os.rename(aside, target)
            raise
        _remove(aside)


def _remove(path: Path) -> None:
    """Deletes a tree as far as it can; folders in it may be read-only."""
    for root, folders, _ in os.walk(path):
        for name in (".", *folders):
            inner = Path(root, name)
            if not inner.is_symlink() and not os.access(inner, os.W_OK):
                with contextlib.suppress(OSError):
                    os.chmod(inner, 0o700)
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, how: int, *, needed: bool = False) -> Iterator[None]:
    lock = _lock(folder, how, needed=needed)
    try:
        yield
    finally:
        os.close(lock)


def _lock(folder: Path, how: int, *, needed: bool = False) -> int:
    """A descriptor that holds the lock until it is closed.

    NFS locks only what is open for writing, which a folder never is: what is not `needed` goes on without the lock
    there, and nothing is swept.

    Raises:
        OSError: another holds it, and `how` says not to wait; or `needed`, and there are no locks here.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, how)
    except OSError as error:
        if needed or isinstance(error, BlockingIOError):
            os.close(lock)
            raise
    return lock


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
    """This process's mask, read from Linux; to ask for it otherwise is to set it, for every thread, for a moment."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    value = os.umask(0o077)
    os.umask(value)
    return value
