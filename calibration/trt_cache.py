"""TensorRT's calibration caches, in and out: the way from TensorRT 10's `IInt8EntropyCalibrator2` to TensorRT 11.

The text that `write_calibration_cache` was given, as TensorRT 8 to 10 wrote it:

    TRT-100300-EntropyCalibration2
    input: 3c010a14
    (Unnamed Layer* 3) [Convolution]_output: 3b810a13

After the first line each holds a tensor's name and its int8 scale (amax / 127) as the big-endian bits of a float32, in
hex. TensorRT wrote them without leading zeros. A name may hold ": " itself. There are no weight scales: TensorRT took
those from the weights, and so does `insert_qdq`.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from trtforge.calibration.placement import Placement
from trtforge.calibration.ranges import CODE_MAX, MadeFrom, Ranges, TensorRange
from trtforge.runtime.errors import CalibrationError

__all__ = ["ALGORITHMS", "ImportReport", "TrtCache", "ranges_from_trt_cache", "read_trt_cache", "write_trt_cache"]

ALGORITHMS: tuple[str, ...] = ("EntropyCalibration2", "EntropyCalibration", "MinMaxCalibration", "LegacyCalibration")
"""What TensorRT's four calibrators call themselves in the first line."""

_HEADER = re.compile(r"TRT-(?P<version>\w+)-(?P<algorithm>\w+)\Z")
_HEX = re.compile(r"[0-9a-fA-F]{1,8}\Z")
_UNNAMED = re.compile(r"\(Unnamed Layer\* \d+\)")


@dataclass(frozen=True, slots=True)
class TrtCache:
    """A calibration cache.

    Attributes:
        version: Of the TensorRT that wrote it, as it stands there ("100300", "8601").
        algorithm: One of `ALGORITHMS`, or whatever stands there.
        scales: int8 scale by tensor name, in the file's order; float32 numbers, finite and above 0.
    """

    version: str
    algorithm: str
    scales: dict[str, float]


@dataclass(frozen=True, slots=True)
class ImportReport:
    """How a cache met a model.

    Attributes:
        matched: Tensors of the model that got a range, in the cache's order.
        unmatched: Names in the cache that the model has not.
        unnamed: `(Unnamed Layer* N)` entries: they stood for layers that TensorRT made, and belong to no ONNX tensor.
        missing: Tensors that were asked for and got no range.
    """

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    unnamed: tuple[str, ...]
    missing: tuple[str, ...]


def read_trt_cache(path: Path) -> TrtCache:
    """Reads a cache.

    Raises:
        CalibrationError: it cannot be read, is no cache, or holds a scale that is no positive finite float32; with the
            line's number.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror or error}", fix="name a readable file") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not a TensorRT calibration cache: byte {error.start} is not text", fix=_WHAT_A_CACHE_IS
        ) from error
    # A tensor's name may hold what str.splitlines takes for a line's end.
    first, *lines = text.replace("\r\n", "\n").split("\n")
    header = _HEADER.match(first.strip().removeprefix("\ufeff"))
    if header is None:
        raise CalibrationError(
            f"{path} is not a TensorRT calibration cache: it begins with {first[:60]!r}", fix=_WHAT_A_CACHE_IS
        )
    scales: dict[str, float] = {}
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        name, scale = _parse_line(path, number, line)
        if name in scales and scales[name] != scale:
            raise CalibrationError(
                f"{path}, line {number}: tensor {name!r} is there twice, with scales {scales[name]:g} and {scale:g}",
                fix="the file is damaged or was edited: remove the wrong line",
            )
        scales[name] = scale
    return TrtCache(header["version"], header["algorithm"], scales)


_WHAT_A_CACHE_IS = "give the file that write_calibration_cache wrote; it begins with TRT-<version>-<algorithm>"


def _parse_line(path: Path, number: int, line: str) -> tuple[str, float]:
    name, separator, digits = line.rpartition(": ")
    digits = digits.strip()
    if not separator or not name or not _HEX.match(digits):
        raise CalibrationError(
            f"{path}, line {number}: {line[:80]!r} is not `tensor: hex`",
            fix="the file is damaged or was edited: restore it, or remove the line",
        )
    (scale,) = struct.unpack(">f", bytes.fromhex(digits.zfill(8)))
    if not (math.isfinite(scale) and scale > 0):
        raise CalibrationError(
            f"{path}, line {number}: tensor {name!r} has scale {scale:g} ({digits})",
            why="a scale is positive and finite; calibration on all-zero or non-finite values gave others",
            fix="remove the line and calibrate that tensor, or calibrate the model again",
        )
    return name, scale


def ranges_from_trt_cache(
    cache: TrtCache, model: ir.Model, placement: Placement | None = None
) -> tuple[Ranges, ImportReport]:
    """The ranges that a cache holds for the tensors of a model.

    Args:
        cache: What was read.
        model: The graph; its tensors are matched by name.
        placement: What needs a range. Where the cache has the tensor that a node reads and not the one it is a
            reordering of, the latter takes the former's range.

    Returns:
        Ranges with method "imported", for matched names alone, and the report.

    Raises:
        CalibrationError: not one name matches, so that the cache belongs to another model or to other names.
    """
    names = {value.name or "" for node in model.graph for value in node.outputs}
    names |= {value.name or "" for value in model.graph.inputs}
    matched = [name for name in cache.scales if name in names]
    others = [name for name in cache.scales if name not in names]
    if not matched:
        raise CalibrationError(
            f"none of the cache's {len(cache.scales)} tensors is in the model",
            why=f"the cache has {_some(cache.scales)}; the model has {_some(sorted(names - {''}))}",
            fix="import it into the ONNX file that was calibrated: exporting it again may have given other names",
        )
    scales = {name: cache.scales[name] for name in matched}
    wanted = placement.tensors if placement is not None else ()
    for tensor in wanted:
        if tensor.measured not in scales and tensor.name in scales:
            scales[tensor.measured] = scales[tensor.name]
    # scale * 127 is exact in double precision, so that dividing by 127 gives the very scale back.
    found = {name: TensorRange(scale * CODE_MAX["int8"], "imported") for name, scale in scales.items()}
    made_from = MadeFrom(method=f"imported from TensorRT {cache.version}, {cache.algorithm}")
    report = ImportReport(
        tuple(matched),
        tuple(name for name in others if not _UNNAMED.search(name)),
        tuple(name for name in others if _UNNAMED.search(name)),
        tuple(dict.fromkeys(tensor.measured for tensor in wanted if tensor.measured not in found)),
    )
    return Ranges(found, made_from), report


def write_trt_cache(ranges: Ranges, path: Path, version: str, *, algorithm: str = "EntropyCalibration2") -> None:
    """Writes the int8 scales of `ranges` as a cache, whole or not at all.

    Args:
        ranges: What to write; the order is kept.
        path: The file, replaced if it is there.
        version: Of the TensorRT that shall read it, as digits ("100300" is 10.3.0): it may refuse another one's.
        algorithm: The calibrator that shall read it, of `ALGORITHMS`; it refuses another one's.

    Raises:
        CalibrationError: a version or algorithm that is none, a name that the format cannot hold, or a path that cannot
            be written.
    """
    if not re.fullmatch(r"\w+", version) or algorithm not in ALGORITHMS:
        raise CalibrationError(
            f"TRT-{version}-{algorithm} is not the first line of a calibration cache",
            fix=f"give a version in digits, like 100300 for 10.3.0, and one of {', '.join(ALGORITHMS)}",
        )
    lines = [f"TRT-{version}-{algorithm}"]
    for name, scale in ranges.scales("int8").items():
        if not name or "\n" in name or "\r" in name:
            raise CalibrationError(
                f"tensor name {name!r} cannot stand in a calibration cache", fix="rename it in the ONNX file"
            )
        lines.append(f"{name}: {struct.pack('>f', scale).hex()}")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes("\n".join([*lines, ""]).encode())
        aside.replace(path)
    except OSError as error:
        raise CalibrationError(
            f"cannot write {path}: {error.strerror or error}", fix="give permission there, or choose another place"
        ) from error


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return ", ".join(repr(name) for name in shown[:4]) + more
