"""The baseline file of a user's repository: what each of its engines was like when somebody last looked at it."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from trtforge.converter.compare_artifacts import compare_records
from trtforge.converter.record import ArtifactRecord, Figures
from trtforge.runtime.errors import ConfigError

__all__ = ["read_baseline", "write_baseline"]

SCHEMA = 1
_UPDATE = "restore it from version control, or delete it and run `pytest --engine-baseline=update`"
_NOISE_DB = 0.3
_NOISE_GROWTH = 1.25
"""Two machines differ by that much in SQNR and greatest error; an update leaves such an entry as it is."""


def read_baseline(path: Path) -> dict[str, ArtifactRecord]:
    """Records by key, "configs/x.yaml::name"; none where there is no file.

    Raises:
        ConfigError: not JSON, of another schema version, or damaged; says where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the baseline {path}: {error}", fix=_UPDATE) from error
    try:
        data = json.loads(text)
    except ValueError as error:
        conflict = "<<<<<<<" in text
        raise ConfigError(
            f"the baseline {path} is not JSON: {error}",
            why="it holds marks of a merge conflict" if conflict else "",
            fix=_UPDATE,
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("engines"), dict):
        raise ConfigError(f"the baseline {path} holds no object `engines`", fix=_UPDATE)
    if data.get("schema") != SCHEMA:
        raise ConfigError(
            f"the baseline {path} has schema {data.get('schema')!r}; this trtforge reads {SCHEMA}",
            fix="use the trtforge that wrote it, or run `pytest --engine-baseline=update`",
        )
    found = {}
    for key, entry in data["engines"].items():
        try:
            found[key] = ArtifactRecord.from_json(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"the baseline {path}: entry {key!r} is damaged: {error!r}", fix=_UPDATE) from error
    return found


def write_baseline(path: Path, records: Mapping[str, ArtifactRecord]) -> tuple[str, ...]:
    """Puts `records` into the file, keeps its other entries, and returns the keys whose entry changed.

    Keys are sorted, figures rounded, and an entry that differs in noise alone stays as it is: running it twice gives
    the same bytes. Safe beside other processes that do the same. A record without an engine's figures keeps those
    that the file has, where nothing that decides them changed: a run without a GPU does not erase a GPU's results.

    Raises:
        ConfigError: as `read_baseline`; the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            known = read_baseline(path)
            merged = {key: _merge(known.get(key), record) for key, record in records.items()}
            changed = tuple(key for key, record in merged.items() if known.get(key) != record)
            if changed:
                _write(path, {**known, **merged})
    except OSError as error:
        raise ConfigError(
            f"cannot write the baseline {path}: {error.strerror or error}", fix="give permission there"
        ) from error
    return changed


def _merge(old: ArtifactRecord | None, new: ArtifactRecord) -> ArtifactRecord:
    new = ArtifactRecord.from_json(new.to_json())  # as the file will have it
    if old is None:
        return new
    same = not compare_records(old, new).pinned_changes
    if same and "engine" in old.proof and "engine" not in new.proof:
        versions = {k: v for k, v in old.versions.items() if k.startswith("tensorrt")}
        new = replace(
            new,
            proof={**new.proof, "engine": old.proof["engine"]},
            device=old.device,
            versions={**{k: v for k, v in new.versions.items() if not k.startswith("tensorrt")}, **versions},
            sizes={**new.sizes, **{k: v for k, v in old.sizes.items() if k.endswith(".engine")}},
        )
    return old if same and _alike(old, new) else new


def _alike(old: ArtifactRecord, new: ArtifactRecord) -> bool:
    if replace(old, proof={}) != replace(new, proof={}) or list(old.proof) != list(new.proof):
        return False
    for stage, before in old.proof.items():
        after = new.proof[stage]
        if (before.runner, before.verdict, set(before.outputs)) != (after.runner, after.verdict, set(after.outputs)):
            return False
        if not all(_close(figures, after.outputs[name]) for name, figures in before.outputs.items()):
            return False
    return True


def _close(old: Figures, new: Figures) -> bool:
    if (old.sqnr_db is None, old.mismatch) != (new.sqnr_db is None, new.mismatch):
        return False
    if old.sqnr_db is None or new.sqnr_db is None:
        return True
    low, high = sorted((old.max_abs_over_std or 0.0, new.max_abs_over_std or 0.0))
    quiet = old.sqnr_db == new.sqnr_db or abs(old.sqnr_db - new.sqnr_db) <= _NOISE_DB
    return quiet and (low == high or high <= _NOISE_GROWTH * low)


def _write(path: Path, records: Mapping[str, ArtifactRecord]) -> None:
    data = {"schema": SCHEMA, "engines": {key: records[key].to_json() for key in sorted(records)}}
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.close(handle)
        Path(name).write_text(text, encoding="utf-8", newline="\n")
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the folder's lock: pytest-xdist's workers update one file, and leave no lock file beside it."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
