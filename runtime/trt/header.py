"""What stands in the first 64 bytes of a TensorRT-RTX plan: it can be read without a GPU and without TensorRT."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from trtforge.runtime.errors import ArtifactError

__all__ = ["RtxHeader", "read_rtx_header"]

_HEADER_BYTES = 64
_MAGIC = b"vtrt"
# Found by building for each target in turn (tests/facts/test_rtx_header.py); NVIDIA documents no layout.
_LAYOUT = "<4sxxxxQQ4s4sI"
_MASK_BITS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True, slots=True)
class RtxHeader:
    """Facts of one plan.

    Attributes:
        serialization_version: Of the plan format.
        size_bytes: Of the whole plan; equal to the file's length.
        version: Of the TensorRT-RTX that built it, the only one that loads it: "1.7.1.116".
        compute_capabilities: The targets it was built for; empty where no mask bit names them ("9.0").
    """

    serialization_version: int
    size_bytes: int
    version: str
    compute_capabilities: tuple[str, ...]


def read_rtx_header(path: Path) -> RtxHeader:
    """Reads the header. It holds no checksum: keep a SHA-256 beside the engine.

    Raises:
        ArtifactError: unreadable, no TensorRT-RTX plan, or its length is not the one in its header.
    """
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
    except OSError as error:
        raise ArtifactError(
            f"cannot read the engine {path}: {error.strerror}", fix="copy the artifact whole, or build it again"
        ) from error
    if len(head) < _HEADER_BYTES or head[:4] != _MAGIC:
        raise ArtifactError(
            f"{path} ({length} bytes) is not a TensorRT-RTX plan",
            why=f"it starts with {head[:4]!r}, not {_MAGIC!r}" if len(head) >= 4 else "it is too short",
            fix="build the engine again",
        )
    _, serialization, size, version, _, mask = struct.unpack_from(_LAYOUT, head)
    if size != length:
        raise ArtifactError(
            f"the engine {path} has {length} bytes, and its header says {size}",
            why="it was cut short or appended to",
            fix="copy the artifact whole, or build it again",
        )
    named = tuple(capability for bit, capability in enumerate(_MASK_BITS) if mask & (1 << bit))
    return RtxHeader(serialization, size, ".".join(str(number) for number in version), named)
