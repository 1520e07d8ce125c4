"""How close is close enough: the limits that measures are held against, and where the defaults come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.precision import Precision
from trtforge.runtime.suggest import nearest
from trtforge.validation.metrics import Measures

__all__ = ["DEFAULTS", "EXPORT", "SAMPLE_LEEWAY_DB", "Tolerance", "resolve_tolerance"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits on `Measures`; None means not asked.

    Attributes:
        sqnr_db: Least signal to noise ratio, dB.
        cosine: Least cosine similarity.
        max_abs_over_std: Greatest |error| in standard deviations of the output.
        atol: With `rtol`: no value may have |c - r| > atol + rtol |r|. None and None: not asked; else None counts as 0.
        rtol: See `atol`.
        mismatch: Greatest share of values of an integer or boolean output that may differ.
    """

    sqnr_db: float | None = None
    cosine: float | None = None
    max_abs_over_std: float | None = None
    atol: float | None = None
    rtol: float | None = None
    mismatch: float = 0.0

    @property
    def elementwise(self) -> bool:
        """Whether `atol` or `rtol` is asked."""
        return self.atol is not None or self.rtol is not None

    def unmet(self, measures: Measures, *, exact: bool, pooled: bool) -> tuple[str, ...]:
        """One sentence for each limit that is not met. NaN meets none.

        Args:
            measures: The figures.
            exact: The output is integer or boolean: `mismatch` alone applies.
            pooled: They are over all samples. Those of one sample alone may have `SAMPLE_LEEWAY_DB` less SQNR, and
                their cosine is not judged: the few values of one sample scatter, and may hold next to no signal.
        """
        if exact:
            if not measures.mismatch <= self.mismatch:
                wanted = f"at most {self.mismatch:.4%}" if self.mismatch else "none"
                return (f"{measures.mismatches} of {measures.count} values differ, {wanted} may",)
            return ()
        found = []
        if self.sqnr_db is not None:
            least = self.sqnr_db if pooled else self.sqnr_db - SAMPLE_LEEWAY_DB
            if not measures.sqnr_db >= least:
                found.append(f"SQNR is {measures.sqnr_db:.1f} dB, at least {least:g} dB is asked")
        if pooled and self.cosine is not None and not measures.cosine >= self.cosine:
            found.append(f"cosine is {measures.cosine:.6f}, at least {self.cosine:g} is asked")
        # A constant reference has no deviation to measure in; its SQNR still speaks.
        over = measures.max_abs_over_std
        if self.max_abs_over_std is not None and measures.std != 0 and not over <= self.max_abs_over_std:
            limit = f"at most {self.max_abs_over_std:g} is asked"
            found.append(f"the greatest error is {over:.4g} standard deviations, {limit}")
        if self.elementwise and measures.violations:
            limits = f"atol {self.atol or 0:g} + rtol {self.rtol or 0:g}"
            found.append(f"{measures.violations} of {measures.count} values are beyond {limits}")
        return tuple(found)

    def to_json(self) -> dict[str, float | None]:
        """All fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tolerance:
        """The inverse of `to_json`."""
        return cls(**{field.name: data[field.name] for field in fields(cls)})


SAMPLE_LEEWAY_DB = 6.0
"""How much less SQNR one sample alone may have: twice the error. A fault at one shape costs far more."""

EXPORT = Tolerance(sqnr_db=80, cosine=0.999999, max_abs_over_std=0.001)
"""Limits of the float graph on onnxruntime's CPU provider, against PyTorch; the reasons stand below."""

DEFAULTS: Mapping[Precision, Tolerance] = {
    "fp32": Tolerance(sqnr_db=70, cosine=0.999999, max_abs_over_std=0.003),
    "tf32": Tolerance(sqnr_db=30, cosine=0.999, max_abs_over_std=0.2),
    "fp16": Tolerance(sqnr_db=30, cosine=0.999, max_abs_over_std=0.2),
    "bf16": Tolerance(sqnr_db=18, cosine=0.99, max_abs_over_std=0.6),
    "int8": Tolerance(sqnr_db=10, cosine=0.95, max_abs_over_std=4.0),
    "fp8": Tolerance(sqnr_db=10, cosine=0.95, max_abs_over_std=4.0),
}
"""Limits that healthy deep models hold and faults do not.

Rounding normal values once costs, measured: fp16 (11 significant bits, as TF32) 73.6 dB, bf16 (8 bits) 55.6 dB. Deep
models add 10 to 40 dB of their own; 6.02 dB are one bit of the result. SQNR in dB against fp32 by torch 2.14 on a CPU,
every operator in fp64, fp16 or bf16, or the operands of Conv, Linear and MatMul rounded to tf32, int8 or fp8 (largest
value of the tensor as range); then two faults in fp32, a residual block left out and one layer's weight doubled:

    model (weights, inputs)              fp64 tf32 fp16 bf16 int8  fp8   left out, doubled
    LSTM, 2 layers (random, noise)        135   76   64   47   44   32      -   11
    encoder, BERT-size (random, ids)      130   70   59   42   40   29     17   18
    MiniLM-L6 (trained, ids)              121   61   55   37   11   20      5    5
    ViT-B/16 (random, noise)              121   62   56   37   28   20      8   14
    Swin-T (random, noise)                129   65   62   44   32   23      9   12
    ResNet-50 (random, noise)             126   66   64   47   34   23      8    4
    EfficientNet-Lite0 (trained, noise)   123   52   50   35   23   12     21   -2
    EfficientNet-Lite0 (trained, photos)  120   47   45   24   17    6     13    2
    MobileNetV2 (random, BN settled)      108   37   35   20   13   11      8   -1
    ResNet-50 (random, BN settled)         96   34   31   19   15   14     13  -10

The last two are chaotic: batch norms that were fitted to untrained weights amplify every error. They mark the edge.

- export: the float graph on onnxruntime. On CPUs no TF32 result reaches 80 dB and every fp32 one does.
- fp32: GPUs sum long products one after the other. Measured on an H100 with RTX 1.6.1, TF32 off: one 3x3 convolution of
  64 channels 107 dB, of 512 channels 91 dB; ResNet-50 76 dB, ViT-B/16 92 dB, LSTM 116 dB. 70 dB is below these, and
  above what TF32 leaves of most models: it tells, too, that TF32 was left on.
- tf32, fp16: the same significand, so the same limits. fp16's range is another matter; it shows as NaN, Inf or 0 dB.
- bf16: 3 bits (18 dB) less than fp16, whence most models keep 35 dB; the limit is what the chaotic ones keep.
- int8, fp8: what the format costs is a matter of model and calibration, and task accuracy decides. These limits only
  refuse wrecks. Structure is held by the export stage: at its 80 dB every fault above fails.

An error at right angles to the signal has a cosine of 1 - 10^(-SQNR / 10) / 2, so the cosine's limits are the SQNR's
over again, for those who think in cosines. The greatest error was 0.11 (fp16) and 0.44 (bf16) standard deviations.
"""

_RANGES: Mapping[str, tuple[float, float]] = {
    "sqnr_db": (0.0, math.inf),
    "cosine": (-1.0, 1.0),
    "max_abs_over_std": (0.0, math.inf),
    "atol": (0.0, math.inf),
    "rtol": (0.0, math.inf),
    "mismatch": (0.0, 1.0),
}


def resolve_tolerance(precisions: Iterable[Precision], overrides: Mapping[str, Any] | None = None) -> Tolerance:
    """The limits for a model whose nodes run in `precisions`: the loosest default of each, then what the user asks.

    Args:
        precisions: At least one; a mixed plan is as exact as its least exact part.
        overrides: Limits by the names of `Tolerance`'s fields; None there switches one off.

    Raises:
        ConfigError: an unknown name, or a value that is no number or out of range; every limit switched off.
    """
    found = [DEFAULTS[precision] for precision in precisions]
    if not found:
        raise ValueError("no precision given")
    tolerance = Tolerance(
        sqnr_db=min(t.sqnr_db for t in found if t.sqnr_db is not None),
        cosine=min(t.cosine for t in found if t.cosine is not None),
        max_abs_over_std=max(t.max_abs_over_std for t in found if t.max_abs_over_std is not None),
    )
    if overrides:
        checked: dict[str, Any] = {name: _check(name, value) for name, value in overrides.items()}
        tolerance = replace(tolerance, **checked)
    if tolerance.sqnr_db is None and tolerance.max_abs_over_std is None and not tolerance.elementwise:
        # The cosine does not see a wrong scale, so it proves no equality on its own.
        raise ConfigError(
            "the tolerance asks for nothing that measures the size of an error",
            fix="give at least one of sqnr_db, max_abs_over_std, atol or rtol",
        )
    return tolerance


def _check(name: str, value: object) -> float | None:
    if name not in _RANGES:
        raise ConfigError(f"unknown tolerance {name!r}", fix=nearest(name, _RANGES))
    if value is None and name != "mismatch":
        return None
    low, high = _RANGES[name]
    wanted = f"between {low:g} and {high:g}" if math.isfinite(high) else f"from {low:g} up"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or math.isinf(value):
        raise ConfigError(
            f"tolerance {name} is {value!r}",
            fix=f"give a number {wanted}",
        )
    return float(value)
