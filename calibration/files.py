"""JSON files of calibration: written whole or not at all, and read with errors that name the file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtforge.runtime.errors import ArtifactError

__all__ = ["read_json", "write_json"]


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes beside `path` and renames over it, so that a reader sees the old file or the new one.

    Raises:
        ArtifactError: the folder cannot be made or written.
    """
    text = json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp lets nobody else read it
            os.chmod(aside, 0o644)
            Path(aside).replace(path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror or error}", fix="free space or give permission there"
        ) from error


def read_json(path: Path, *, kind: str, schema: int) -> dict[str, Any]:
    """Reads an object that has `"kind": kind` and `"schema": schema`.

    Raises:
        ArtifactError: it cannot be read, is no such file, or comes from a later trtforge.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}", fix="delete it and calibrate again") from error
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise ArtifactError(f"{path} is no {kind} file", fix="give the file that `trtforge calibrate` wrote")
    if data.get("schema") != schema:
        raise ArtifactError(
            f"{path} has schema {data.get('schema')!r}; this trtforge reads {schema}",
            fix="calibrate again, or use the trtforge that wrote it",
        )
    return data
