"""`part.json`: the exact state of a pass over a part of the data, so that parts can be run apart and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trtforge.calibration.collect import Collected, Shard
from trtforge.calibration.files import read_json, write_json
from trtforge.calibration.histogram import BINS, Histogram
from trtforge.runtime.errors import ArtifactError, CalibrationError

__all__ = ["load_part", "save_part"]

_KIND, _SCHEMA = "trtforge calibration part", 1


def save_part(path: Path, part: Collected) -> None:
    """Writes a state exactly; equal states give equal bytes.

    Raises:
        ArtifactError: the file cannot be written.
    """
    write_json(
        path,
        {
            "kind": _KIND,
            "schema": _SCHEMA,
            "graph": part.graph,
            "batch": part.batch,
            "provider": part.provider,
            "onnxruntime": part.onnxruntime,
            "shards": [[shard.index, shard.total] for shard in part.shards],
            "samples": part.samples,
            "data": f"{part.data:064x}",
            "shapes": {name: sorted(map(list, shapes)) for name, shapes in part.shapes.items()},
            "smoothing": {name: list(factors) for name, factors in part.smoothing.items()},
            "histograms": {name: _write(histogram) for name, histogram in part.histograms.items()},
        },
    )


def load_part(path: Path) -> Collected:
    """Reads what `save_part` wrote.

    Raises:
        ArtifactError: it cannot be read, or is not a part of this schema.
    """
    data = read_json(path, kind=_KIND, schema=_SCHEMA)
    try:
        return Collected(
            {name: _read(histogram) for name, histogram in data["histograms"].items()},
            int(data["samples"]),
            int(data["data"], 16),
            {name: {tuple(shape) for shape in shapes} for name, shapes in data["shapes"].items()},
            data["graph"],
            data["batch"],
            data["provider"],
            data["onnxruntime"],
            tuple(Shard(index, total) for index, total in data["shards"]),
            {name: tuple(map(float, factors)) for name, factors in data.get("smoothing", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, CalibrationError) as error:
        raise ArtifactError(f"{path} is damaged: {type(error).__name__} {error}", fix="run that shard again") from error


def _write(histogram: Histogram) -> dict[str, Any]:
    # JSON has the shortest decimal that reads back as the same double, and `peak` is a float32 in one.
    counts = histogram.counts[: histogram.used].tolist()
    return {"exponent": histogram.exponent, "peak": histogram.peak, "counts": counts}


def _read(data: dict[str, Any]) -> Histogram:
    counts = np.zeros(BINS, np.int64)
    counts[: len(data["counts"])] = data["counts"]
    histogram = Histogram(int(data["exponent"]), counts, float(data["peak"]))
    if counts.min() < 0 or len(data["counts"]) != histogram.used:
        raise ValueError("its counts do not fit its peak")
    return histogram
