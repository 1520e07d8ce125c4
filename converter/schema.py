"""The YAML file's shape: every key, its type and its default. Nothing is resolved, imported or opened here."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from trtforge.runtime.specs import DTYPES
from trtforge.runtime.trt.options import HardwareCompatibility, Tiling

__all__ = [
    "AccuracySection",
    "CalibrationSection",
    "FileSection",
    "InputSection",
    "ModelSection",
    "SearchSection",
    "SourceSection",
    "TargetSection",
    "ToleranceSection",
    "ValidationSection",
]


def _spelled(pattern: str, words: str) -> AfterValidator:
    """As `Field(pattern=…)`, but the user is told in words what is wanted."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(f"must be {words}")
        return text

    return AfterValidator(check)


Positive = Annotated[int, Field(ge=1, strict=True)]
DimName = Annotated[str, _spelled(r"[A-Za-z_][A-Za-z0-9_]*", "made of letters a to z, digits and _, no digit first")]
Reference = Annotated[str, _spelled(r"[\w.]+:[\w.]+", "package.module:function")]
ModelName = Annotated[
    str, _spelled(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "made of letters a to z, digits and _ . -, neither . nor - first")
]
Capability = Annotated[str, _spelled(r"\d+\.\d", "a compute capability, as 8.9")]


class Section(BaseModel):
    """Unknown keys are errors, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceSection(Section):
    """Where the model comes from: exactly one of `factory`, `onnx` and `exported_program`.

    With `network`, the engine is built from what that function defines, and the model is what it has to equal.
    """

    factory: Reference | None = None
    kwargs: dict[str, Any] = {}
    checkpoint: str | None = None
    onnx: str | None = None
    exported_program: str | None = None
    network: Reference | None = None
    network_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_source(self) -> SourceSection:
        given = [key for key in ("factory", "onnx", "exported_program") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of factory, onnx and exported_program, not {given or 'none'}")
        if self.factory is None and (self.kwargs or self.checkpoint):
            raise ValueError("kwargs and checkpoint go with a factory only")
        if self.network_kwargs and self.network is None:
            raise ValueError("network_kwargs go with a network only")
        if self.network is not None and self.onnx is not None:
            raise ValueError("a network is proved against PyTorch: give the factory of that model, not an ONNX file")
        return self


class InputSection(Section):
    """One input: its dtype, its shape with dimension names, and the values that may be generated for it.

    `values` is `[min, max]`, true or false; or, where values decide shapes, the dimension that each of them is.
    """

    dtype: str = "float32"
    shape: list[Positive | DimName]
    values: bool | Annotated[list[float], Field(min_length=2, max_length=2)] | list[Positive | DimName] | None = None

    @model_validator(mode="after")
    def _known(self) -> InputSection:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.decides_shapes:
            self._check_elements()
        # A list without names may have been read as dimensions, of which there can be any number.
        elif isinstance(self.values, list) and not (
            len(self.values) == 2 and self.values[0] <= self.values[1]  # type: ignore[operator]
        ):
            raise ValueError(f"values {self.values} is not [min, max] with min <= max")
        return self

    @property
    def decides_shapes(self) -> bool:
        """Whether `values` names dimensions, each of which is one of the input's values."""
        return isinstance(self.values, list) and any(isinstance(value, str) for value in self.values)

    def _check_elements(self) -> None:
        assert isinstance(self.values, list)
        fixed = [size for size in self.shape if isinstance(size, int)]
        # What TensorRT takes for a shape tensor.
        if self.dtype not in ("int32", "int64") or len(self.shape) > 1 or len(fixed) < len(self.shape):
            raise ValueError(
                f"values {self.values} are dimensions, so that the input is int32 or int64 of shape [] or [N], "
                f"not {self.dtype} {self.shape}"
            )
        if len(self.values) != math.prod(fixed):
            raise ValueError(f"{len(self.values)} values for {math.prod(fixed)} elements")


class LoaderSection(Section):
    """A function that gives batches: `package.module:function`, and what it is called with."""

    loader: str | None = None
    kwargs: dict[str, Any] = {}


class CalibrationSection(LoaderSection):
    """Data and method for the ranges of quantized tensors, or a file of ranges that `trtforge calibrate` wrote."""

    method: Literal["auto", "entropy", "percentile", "mse", "max"] = "auto"
    batches: Positive | None = None
    ranges: str | None = None
    smoothing: Annotated[bool, Field(strict=True)] = True
    rounding: Annotated[bool, Field(strict=True)] = True
    bias_correction: Annotated[bool, Field(strict=True)] = True


class ToleranceSection(Section):
    """How far an output may be from PyTorch's; what is left out keeps the precision's default."""

    sqnr_db: float | None = None
    cosine: Annotated[float, Field(ge=-1, le=1)] | None = None
    max_abs_over_std: Annotated[float, Field(ge=0)] | None = None
    atol: Annotated[float, Field(ge=0)] | None = None
    rtol: Annotated[float, Field(ge=0)] | None = None


class AccuracySection(LoaderSection):
    """A budget of task accuracy over labelled data; without a loader of its own over all of the validation's."""

    metric: Annotated[str, Field(min_length=1)]
    max_drop: Annotated[float, Field(ge=0, le=1)]
    min: float | None = None
    batches: Positive | None = None
    output: str | None = None
    labels: Literal["loader", "model"] = "loader"
    decode: Reference | None = None
    classes: Positive | None = None


class ValidationSection(LoaderSection):
    """What the engine is proved on, beside generated inputs, and how near it must be."""

    batches: Positive = 4
    accuracy: AccuracySection | None = None
    tolerance: ToleranceSection = ToleranceSection()


class SearchSection(LoaderSection):
    """How a plan is searched for, under `precision: auto` or a quantized one with an accuracy budget; on which data."""

    candidates: tuple[Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8"], ...] = ()
    evaluations: Annotated[int, Field(ge=10, strict=True)] = 25
    looks: Annotated[int, Field(ge=1, le=20, strict=True)] = 5


class TargetSection(Section):
    """What the engine is built for."""

    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    compute_capabilities: list[Capability] = []
    opset: Annotated[int, Field(ge=13, le=23, strict=True)] | None = None
    optimization_level: Annotated[int, Field(ge=0, le=5, strict=True)] | None = None
    workspace_mib: Positive | None = None
    tiling: Tiling | None = None
    timing_cache: str | None = None
    version_compatible: Annotated[bool, Field(strict=True)] = False
    hardware_compatibility: HardwareCompatibility = "none"
    weight_streaming: Annotated[bool, Field(strict=True)] = False
    refit: Annotated[bool, Field(strict=True)] = False
    plugins: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _numbers_as_text(cls, data: Any) -> Any:
        # YAML reads 8.6 as a number; "12.0" must not become 12.
        if isinstance(data, dict) and isinstance(data.get("compute_capabilities"), list):
            caps = [str(c) if isinstance(c, float) else c for c in data["compute_capabilities"]]
            return {**data, "compute_capabilities": caps}
        return data


DimsSection = dict[DimName, Annotated[list[Annotated[int, Field(strict=True)]], Field(min_length=3, max_length=3)]]


class ModelSection(Section):
    """One model of the file, with `defaults` merged in."""

    source: SourceSection
    dims: DimsSection | list[DimsSection] = {}
    inputs: dict[str, InputSection] = {}
    outputs: list[str] = []
    custom_ops: Reference | None = None
    precision: str | dict[str, Any] = "fp32"
    search: SearchSection = SearchSection()
    overflow_guard: Annotated[bool, Field(strict=True)] = True
    calibration: CalibrationSection | None = None
    validation: ValidationSection = ValidationSection()
    target: TargetSection = TargetSection()


class FileSection(Section):
    """The whole file. `defaults` is merged into every model before models are checked."""

    version: Literal[1]
    defaults: dict[str, Any] = {}
    models: Annotated[dict[ModelName, ModelSection], Field(min_length=1)]
    matrix: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
