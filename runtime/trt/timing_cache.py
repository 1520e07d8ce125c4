"""TensorRT's timing cache on disk: read before a build, merged with what others wrote since, replaced whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trtforge.runtime.errors import ArtifactError

__all__ = ["keep_timings", "use_timings"]


def use_timings(config: Any, path: Path) -> list[str]:
    """Gives an `IBuilderConfig` the timings that `path` holds, or an empty cache.

    Args:
        config: The builder's configuration.
        path: The cache; need not exist.

    Returns:
        A warning where the file is corrupt, or of another release or GPU: the build then times everything anew.

    Raises:
        ArtifactError: the file is there and cannot be read.
    """
    kept = _read(path)
    cache = _parse(config, kept)
    if cache is not None and config.set_timing_cache(cache, False):
        return []
    config.set_timing_cache(config.create_timing_cache(b""), False)
    if not kept:
        return []
    return [f"the timing cache {path} ({len(kept)} bytes) is ignored: corrupt, or of another release or GPU"]


def keep_timings(config: Any, path: Path) -> None:
    """Writes an `IBuilderConfig`'s timings to `path`, with those that other builds wrote since it was read.

    Raises:
        ArtifactError: it cannot be written.
    """
    cache = config.get_timing_cache()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            other = _parse(config, _read(path))
            if other is not None:
                cache.combine(other, False)  # False where it is of another release or GPU: then ours replaces it
            partial.write_bytes(memoryview(cache.serialize()))
            partial.replace(path)
    except OSError as error:
        raise ArtifactError(
            f"cannot write the timing cache {path}: {error.strerror}",
            fix="give permission or free space there, or leave timing_cache out of the target",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _parse(config: Any, kept: bytes) -> Any:
    """The `ITimingCache` in these bytes; None where there is none."""
    cache = config.create_timing_cache(kept) if kept else None
    if cache is None:
        return None
    # Of corrupt bytes TensorRT makes an empty cache, with no more than a line in the log.
    made, empty = (bytes(memoryview(one.serialize())) for one in (cache, config.create_timing_cache(b"")))
    return None if made == empty != kept else cache


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ArtifactError(
            f"cannot read the timing cache {path}: {error.strerror}",
            fix="give permission, or leave timing_cache out of the target",
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The lock's file stays: to delete it would let two builds lock two files of one name.
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
