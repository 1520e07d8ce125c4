"""Files of named arrays (`.safetensors`): how tensors cross between processes and travel in artifacts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.runner import Array

__all__ = ["group_samples", "load_tensors", "save_tensors"]

# safetensors.numpy reads bfloat16 in some versions and fails in others, so the types are named here.
_DTYPES: Mapping[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
# The Rust side keeps metadata in a hash map, so several keys come out in any order; one key keeps bytes deterministic.
_METADATA_KEY = "trtforge"


def save_tensors(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays of any layout, rank (0 included) and size (0 included); equal contents give equal bytes.

    Raises:
        ArtifactError: `path` cannot be written.
        TypeError: an array's dtype that safetensors does not have.
    """
    known = {np.dtype(kind) for kind in _DTYPES.values()}
    flat: dict[str, Array] = {}
    for name, array in tensors.items():
        # save_file writes the bare memory of a strided array, in the wrong order and without a word.
        # np.ascontiguousarray would turn rank 0 into rank 1.
        native = np.asarray(array, order="C")
        native = native.astype(native.dtype.newbyteorder("="), copy=False)
        if native.dtype not in known:
            raise TypeError(f"tensor {name!r} has dtype {native.dtype}, which .safetensors files cannot hold")
        flat[name] = native
    header = {_METADATA_KEY: json.dumps(dict(metadata), sort_keys=True)} if metadata else None
    try:
        safetensors.numpy.save_file(flat, str(path), metadata=header)
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(
            f"cannot write {path}: {error}", fix="free space or give permission there, or choose another place"
        ) from error


def load_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Arrays by name (sorted), each writable and of its own, and the metadata that `save_tensors` was given.

    Raises:
        ArtifactError: the file is missing, cut short, not safetensors, or holds a dtype that numpy lacks.
    """
    fix = "make the file again, or copy the artifact whole"
    try:
        data = path.read_bytes()
        entries: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        header = _header_metadata(data)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"cannot read the tensors of {path}: {error}", fix=fix) from error
    tensors: dict[str, Array] = {}
    for name, entry in sorted(entries):
        if entry["dtype"] not in _DTYPES:
            raise ArtifactError(f"{path}: tensor {name!r} has dtype {entry['dtype']}, which numpy lacks", fix=fix)
        # A bytearray of its own for each tensor, so the array is writable and aliases nothing.
        tensors[name] = np.frombuffer(entry["data"], dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, header


def group_samples(tensors: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """`{"<sample>/<name>": array}` as `{sample: {name: array}}`; a sample's own name has no slash, a tensor's may.

    Raises:
        ArtifactError: a key without a slash.
    """
    samples: dict[str, dict[str, Array]] = {}
    for key, array in tensors.items():
        sample, slash, name = key.partition("/")
        if not slash:
            raise ArtifactError(f"the tensor {key!r} belongs to no sample", fix="name it `<sample>/<tensor>`")
        samples.setdefault(sample, {})[name] = array
    return samples


def _header_metadata(data: bytes) -> dict[str, str]:
    # Layout of the format: length of the JSON header (8 bytes, little endian), the header, the tensors.
    length = int.from_bytes(data[:8], "little")
    stored: Mapping[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    own: dict[str, str] = json.loads(stored[_METADATA_KEY]) if _METADATA_KEY in stored else dict(stored)
    return own
