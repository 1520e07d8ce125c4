"""What calibration found: one range a tensor, and what the ranges were made from. Data only: no graph, no numpy.

Quantization is symmetric (TensorRT rejects any other zero point), so that one number, `amax`, is a tensor's range:
int8's scale is amax / 127 and FP8 E4M3's is amax / 448 (`../shared/FACTS.md`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from trtforge.runtime.errors import CalibrationError

__all__ = ["CODE_MAX", "METHODS", "MadeFrom", "Method", "QuantFormat", "Ranges", "TensorRange", "quant_scale"]

Method = Literal["auto", "entropy", "percentile", "mse", "max"]
METHODS: tuple[str, ...] = get_args(Method)

QuantFormat = Literal["int8", "fp8"]
CODE_MAX: Mapping[str, float] = {"int8": 127.0, "fp8": 448.0}
"""The largest code of each format: a scale is amax divided by it."""

_SMALLEST_NORMAL = 2.0**-126  # of float32: TensorRT rejects a scale of 0, and kernels flush subnormal ones to 0


def quant_scale(amax: float, format: QuantFormat) -> float:
    """The scale of a symmetric range, exactly representable in float32.

    A range of zero has scale 1, which represents zero exactly; a subnormal scale becomes the smallest normal float32.

    Raises:
        CalibrationError: `amax` is negative, infinite or NaN.
    """
    if not (math.isfinite(amax) and amax >= 0):
        raise CalibrationError(f"a range of {amax} has no scale", fix="ranges are finite and not negative")
    if amax == 0:
        return 1.0
    # Dividing in double and rounding once gives the float32 quotient of two float32 numbers (53 >= 2 * 24 + 2 bits).
    scale: float = struct.unpack("<f", struct.pack("<f", amax / CODE_MAX[format]))[0]
    return max(scale, _SMALLEST_NORMAL)


@dataclass(frozen=True, slots=True)
class TensorRange:
    """The range of one tensor, and how well it fits what was seen.

    Attributes:
        amax: Values beyond it, of either sign, saturate. A float32.
        method: What chose it: "entropy", "percentile", "mse" or "max" (never "auto"), or "imported".
        peak: Largest |x| seen; None where that is not known (imported).
        clipped_fraction: Share of the elements whose |x| is above `amax`; None where not known.
        sqnr_db: Signal over int8 quantization error, from the histogram; None where not known or without signal.
        count: Elements seen; 0 where not known.
        reason: Why `method` was taken, where `auto` chose it.
    """

    amax: float
    method: str
    peak: float | None = None
    clipped_fraction: float | None = None
    sqnr_db: float | None = None
    count: int = 0
    reason: str = ""

    def scale(self, format: QuantFormat) -> float:
        """The scale in int8 or FP8; see `quant_scale`."""
        return quant_scale(self.amax, format)

    def to_json(self) -> dict[str, Any]:
        """All fields by name; those that are not known are left out."""
        data = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in data.items() if value is not None and value != ""}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorRange:
        """The inverse of `to_json`. Raises `TypeError` or `ValueError` for what it never writes."""
        found = cls(**data)
        if not (math.isfinite(found.amax) and found.amax >= 0):
            raise ValueError(f"amax is {found.amax}")
        return found


@dataclass(frozen=True, slots=True)
class MadeFrom:
    """What ranges were made from: they hold for nothing else.

    Attributes:
        graph: `graph_hash` of the float model that ran; "" where not known (imported).
        data: Hash of every sample, whatever their order and batches; "" where not known.
        samples: How many samples ran.
        shapes: For each input, the shapes of its samples, batch left out; sorted.
        method: The method asked for, with its settings, as `describe_method` writes it.
        provider: The onnxruntime provider: another one has other kernels, and so other activations.
        versions: Versions of what could change the figures: "trtforge", "onnxruntime".
        batch: How the samples were run: "sample" (one at a time) or "loader" (in the loader's own batches).
    """

    graph: str = ""
    data: str = ""
    samples: int = 0
    shapes: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    method: str = ""
    provider: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    batch: str = ""


@dataclass(frozen=True, slots=True)
class Ranges:
    """Ranges by tensor name, and what they were made from.

    `smoothing` has, by tensor name, what each channel was divided by before (`trtforge.calibration.smoothing`); the
    ranges are those of the graph with that done.
    """

    tensors: Mapping[str, TensorRange]
    made_from: MadeFrom = field(default_factory=MadeFrom)
    smoothing: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> TensorRange:
        """The range of a tensor.

        Raises:
            CalibrationError: it has none.
        """
        try:
            return self.tensors[name]
        except KeyError:
            raise CalibrationError(
                f"tensor {name!r} has no range",
                why=f"{len(self.tensors)} tensors were calibrated, and it is not one of them",
                fix="calibrate this model again: its ranges were made for another one, or for another plan",
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def select(self, names: Iterable[str]) -> Ranges:
        """The ranges of `names` alone. Raises as `ranges[name]` does."""
        return replace(self, tensors={name: self[name] for name in names})

    def scales(self, format: QuantFormat) -> dict[str, float]:
        """The scale of every tensor."""
        return {name: found.scale(format) for name, found in self.tensors.items()}
