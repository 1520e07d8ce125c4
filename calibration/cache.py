"""`calibration.json`: ranges and what they were made from. They are reused only where all of that is the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trtforge.calibration.files import read_json, write_json
from trtforge.calibration.ranges import MadeFrom, Ranges, TensorRange
from trtforge.runtime.errors import ArtifactError

__all__ = ["differences", "load_ranges", "save_ranges"]

_KIND, _SCHEMA = "trtforge calibration", 1
_MEANING: Mapping[str, str] = {
    "graph": "the model",
    "data": "the data",
    "samples": "the number of samples",
    "shapes": "the shapes of the inputs",
    "method": "the method",
    "provider": "the onnxruntime provider",
    "versions": "the versions",
    "batch": "how batches are run",
}


def save_ranges(path: Path, ranges: Ranges) -> None:
    """Writes ranges; equal ranges give equal bytes.

    Raises:
        ArtifactError: the file cannot be written.
    """
    made = ranges.made_from
    write_json(
        path,
        {
            "kind": _KIND,
            "schema": _SCHEMA,
            "made_from": {
                "graph": made.graph,
                "data": made.data,
                "samples": made.samples,
                "shapes": {name: [list(shape) for shape in shapes] for name, shapes in made.shapes.items()},
                "method": made.method,
                "provider": made.provider,
                "versions": dict(made.versions),
                "batch": made.batch,
            },
            "tensors": {name: found.to_json() for name, found in ranges.tensors.items()},
            **({"smoothing": {name: list(s) for name, s in ranges.smoothing.items()}} if ranges.smoothing else {}),
        },
    )


def load_ranges(path: Path) -> Ranges:
    """Reads what `save_ranges` wrote.

    Raises:
        ArtifactError: it cannot be read, or is not a calibration file of this schema.
    """
    data = read_json(path, kind=_KIND, schema=_SCHEMA)
    try:
        made: dict[str, Any] = dict(data["made_from"])
        made["shapes"] = {name: tuple(tuple(shape) for shape in shapes) for name, shapes in made["shapes"].items()}
        tensors = {name: TensorRange.from_json(found) for name, found in data["tensors"].items()}
        smoothing = {name: tuple(map(float, factors)) for name, factors in data.get("smoothing", {}).items()}
        return Ranges(tensors, MadeFrom(**made), smoothing)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is damaged: {type(error).__name__} {error}", fix="delete it and calibrate again"
        ) from error


def differences(
    cached: Ranges, wanted: MadeFrom, tensors: Iterable[str], smoothing: Mapping[str, tuple[float, ...]] | None = None
) -> tuple[str, ...]:
    """Why `cached` is not what ranges of `tensors`, made from `wanted` behind `smoothing`, would be; () where it is.

    Each is a phrase with both values: "the method was 'max' and is 'auto'".
    """
    made = cached.made_from
    found = [
        f"{meaning} was {_show(getattr(made, name))} and is {_show(getattr(wanted, name))}"
        for name, meaning in _MEANING.items()
        if getattr(made, name) != getattr(wanted, name)
    ]
    if dict(cached.smoothing) != dict(smoothing or {}):
        found.append(
            f"{len(cached.smoothing)} tensors were smoothed, and {len(smoothing or {})} are, or by other factors"
        )
    missing = [name for name in tensors if name not in cached]
    if missing:
        found.append(f"{len(missing)} tensors have no range, {missing[0]!r} first")
    return tuple(found)


def _show(value: object) -> str:
    if isinstance(value, str):
        return repr(value[:12] if len(value) == 64 else value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in sorted(value.items())) or "unknown"
    return str(value)
