"""Where TensorRT-RTX's runtime cache is kept between processes: one file an engine, release and GPU."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from trtforge.runtime.device import DeviceFacts
from trtforge.runtime.publish import hash_file

__all__ = ["RuntimeCacheFile", "cache_folder"]

_log = logging.getLogger("trtforge.engine")

_MAGIC = b"trtforge runtime cache 1\n"
_KEPT_FILES = 256
_ASIDE = ".writing-"
_STALE_S = 3600


def cache_folder() -> Path | None:
    """`$XDG_CACHE_HOME/trtforge/runtime`, by default `~/.cache/trtforge/runtime`; None for a user without a home."""
    # The XDG specification: a relative path in the variable is to be ignored.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / "trtforge" / "runtime"
    try:
        return Path.home() / ".cache" / "trtforge" / "runtime"
    except RuntimeError:
        return None


@dataclass(slots=True)
class RuntimeCacheFile:
    """The file, framed with its own SHA-256, so that TensorRT is never fed a damaged one.

    Its content is code for the GPU: the folder is the user's alone. A reader sees an old file or a new one, whole; of
    several writers the last one wins. Nothing here ever raises for the disk's sake: without a cache it takes longer.

    Attributes:
        path: Where it is.
    """

    path: Path
    _written: bytes = field(default=b"", repr=False)

    @classmethod
    def of_engine(cls, engine: Path, version: str, device: DeviceFacts, digest: str = "") -> RuntimeCacheFile | None:
        """The file that belongs to an engine, a release of the runtime, and a GPU; None without a folder for it.

        Args:
            engine: The plan file.
            version: Of the runtime.
            device: The GPU.
            digest: The plan file's SHA-256 in hex; "" to compute it.
        """
        folder = cache_folder()
        if folder is None:
            return None
        digest = digest or hash_file(engine)
        gpu = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
        return cls(folder / f"{digest[:32]}-{version}-{gpu}-{device.compute_capability}-{device.sm_count}.bin")

    def read(self) -> bytes | None:
        """What was written; None, with a RuntimeWarning, if it was damaged since; None if there is nothing."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(f"cannot be read: {error.strerror or error}")
            return None
        head = len(_MAGIC) + hashlib.sha256().digest_size
        content = data[head:]
        if data[:head] != _MAGIC + hashlib.sha256(content).digest():
            self._warn("is damaged")
            return None
        self._written = data[:head]
        with contextlib.suppress(OSError):
            os.utime(self.path)  # the files used longest ago are deleted first
        return content

    def write(self, content: bytes) -> None:
        """Replaces the file, if the content is another."""
        head = _MAGIC + hashlib.sha256(content).digest()
        if head == self._written:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor, aside = tempfile.mkstemp(prefix=_ASIDE, dir=self.path.parent)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(head + content)
                Path(aside).replace(self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(aside).unlink()
                raise
        except OSError as error:
            _log.info("the runtime cache %s is not kept: %s", self.path, error.strerror or error)
            return
        self._written = head
        _prune(self.path.parent)

    def _warn(self, what: str) -> None:
        warnings.warn(f"{self.path} {what}; it is ignored and made anew", RuntimeWarning, stacklevel=3)


def _prune(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another process may be deleting the same files
        files = sorted(folder.glob("*.bin"), key=lambda path: path.stat().st_mtime)
        for path in files[:-_KEPT_FILES]:
            path.unlink(missing_ok=True)
        for path in folder.glob(_ASIDE + "*"):  # of processes that were killed
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink(missing_ok=True)
