"""From a YAML file to one frozen `ConversionConfig` a model; from Python, `trtforge.converter.api` makes the same."""

from __future__ import annotations

import copy
import itertools
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trtforge.calibration.ranges import Method
from trtforge.converter.schema import (
    AccuracySection,
    FileSection,
    InputSection,
    LoaderSection,
    ModelSection,
    SearchSection,
    SourceSection,
    TargetSection,
)
from trtforge.converter.yaml_source import KeyPath, YamlSource, read_yaml
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.precision import QUANTIZED, Precision, PrecisionPlan
from trtforge.runtime.specs import DimRange, InputSpec, Profile, ValueRange
from trtforge.runtime.suggest import nearest
from trtforge.runtime.trt.options import DEFAULT_BUILD, BuildOptions

__all__ = [
    "AUTO",
    "Accuracy",
    "Calibration",
    "ConversionConfig",
    "Loader",
    "Search",
    "Source",
    "Target",
    "Validation",
    "asks_auto",
    "check_dims",
    "parse_accuracy",
    "parse_profiles",
    "parse_search",
    "read_config",
    "resolve_target",
]


AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Loader:
    """`package.module:function` (or a path, where `function` is None), and its keyword arguments."""

    reference: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from: one of `factory`, `onnx`, `exported_program`, or none (a live module from Python).

    Attributes:
        network: The function that defines the engine's network by TensorRT's API; the model is then its reference.
        network_kwargs: What it is called with, beside the network and TensorRT's module; JSON-able.
    """

    factory: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    onnx: Path | None = None
    exported_program: Path | None = None
    network: str | None = None
    network_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Target:
    """What the engine is built for; None means the backend's default."""

    backend: str = "auto"
    compute_capabilities: tuple[str, ...] = ()
    opset: int | None = None
    options: BuildOptions = DEFAULT_BUILD


@dataclass(frozen=True, slots=True)
class Calibration:
    """Data and method for ranges, or a file of them. `loader` is None where Python gives live data.

    Attributes:
        smoothing: Outliers of matrix products' inputs move into weights, where that pays.
        rounding: Weights are rounded by their effect on the output, not each to its nearest code.
        bias_correction: What is left of the mean error goes into biases.
    """

    loader: Loader | None = None
    method: Method = "auto"
    batches: int | None = None
    ranges: Path | None = None
    smoothing: bool = True
    rounding: bool = True
    bias_correction: bool = True


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A budget of task accuracy over labelled data.

    Attributes:
        metric: "top1", "topK", "miou", "cosine", "wer", "cer", `package.module:function`, or the function itself.
        max_drop: How much less than PyTorch the candidate may score.
        min: How much it has to score; None: no matter.
        loader: Labelled data; None: the validation's, or what Python gave.
        batches: How many batches to read at most; None reads all.
        output: The output that is scored; None: the only one (a function of the user's gets all of several).
        labels: "loader", or "model": PyTorch's own answers, so that the score is agreement with them.
        decode: From an output to one text, or sequence of integers, a sample, for wer and cer.
        classes: For miou on outputs that are maps of classes already.
    """

    metric: str | Callable[[Any, Any], Any]
    max_drop: float
    min: float | None = None
    loader: Loader | None = None
    batches: int | None = None
    output: str | None = None
    labels: str = "loader"
    decode: str | Callable[[Any], Any] | None = None
    classes: int | None = None


@dataclass(frozen=True, slots=True)
class Validation:
    """Real data to prove on, tolerances that replace the precision's defaults, and a budget of task accuracy."""

    loader: Loader | None = None
    batches: int = 4
    tolerance: Mapping[str, float] = field(default_factory=dict)
    accuracy: Accuracy | None = None


@dataclass(frozen=True, slots=True)
class Search:
    """How a plan is searched for.

    Attributes:
        auto: The precision itself is to be found; else only a quantized plan with an accuracy budget is mended.
        candidates: Precisions to try; empty: all floats, and the quantized ones where a GPU can time them.
        evaluations: How many plans may be run for each candidate.
        looks: How many of those may be judged by the budget; each makes all bounds wider.
        loader: Labelled data that the looks are judged on instead: the budget's own samples then see one plan, the one
            that was chosen.
    """

    auto: bool = False
    candidates: tuple[Precision, ...] = ()
    evaluations: int = 25
    looks: int = 5
    loader: Loader | None = None

    def wanted(self, plan: PrecisionPlan, *, budget: bool) -> bool:
        """Whether there is anything to search for."""
        return self.auto or (budget and plan.default in QUANTIZED)

    def chosen(self, plan: PrecisionPlan, *, timed: bool, calibrated: bool) -> tuple[Precision, ...]:
        """The candidates.

        Args:
            plan: As it was given.
            timed: There is a GPU: without one nothing shows that int8 pays.
            calibrated: There is calibration data.
        """
        if not self.auto:
            return (plan.default,)
        if self.candidates:
            return self.candidates
        return ("fp32", "bf16", "fp16", *(("fp8", "int8") if timed and calibrated else ()))


@dataclass(frozen=True, slots=True)
class ConversionConfig:
    """Everything that decides one conversion.

    Attributes:
        name: The model's name in the file, with the matrix's values appended.
        model: The model's name in the file.
        source: Where it comes from.
        profiles: Optimization profiles, each a range for every dynamic dimension; one empty profile without any.
        inputs: Inputs by the forward's parameter names; may be empty where Python gives examples.
        outputs: The names that outputs shall have; empty: derived from the model.
        custom_ops: `package.module:table` of translations for the user's own operators.
        plan: The precision plan.
        search: How it is searched for, where it is.
        calibration: None where nothing is quantized.
        validation: How it is proved.
        target: What it is built for.
        folder: Relative paths and imports of the file start here.
        origin: The YAML file, where there is one: it and `name` reproduce the conversion.
    """

    name: str
    model: str = ""
    source: Source = Source()
    profiles: tuple[Profile, ...] = ({},)
    inputs: tuple[InputSpec, ...] = ()
    outputs: tuple[str, ...] = ()
    custom_ops: str | None = None
    plan: PrecisionPlan = field(default_factory=PrecisionPlan)
    search: Search = Search()
    calibration: Calibration | None = None
    validation: Validation = Validation()
    target: Target = Target()
    folder: Path = Path()
    origin: Path | None = None


def read_config(path: Path) -> tuple[ConversionConfig, ...]:
    """Reads and checks a YAML file, and resolves `defaults` and `matrix`.

    Raises:
        ConfigError: with the file's line and, for an unknown key, the nearest right one.
    """
    source = read_yaml(path)
    data = _merge_defaults(source)
    try:
        section = FileSection.model_validate(data)
    except ValidationError as error:
        raise _explain(error, source) from None
    return tuple(_resolve_all(section, data, source))


def parse_profiles(dims: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]]) -> tuple[Profile, ...]:
    """Profiles from `{"batch": (1, 8, 32)}` or a list of such maps.

    Raises:
        ConfigError: a range that is not three ascending sizes, or profiles that name different dimensions.
    """
    maps = [dims] if isinstance(dims, Mapping) else list(dims) or [{}]
    profiles: list[dict[str, DimRange]] = []
    for entry in maps:
        profile: dict[str, DimRange] = {}
        for name, sizes in entry.items():
            values = list(sizes)
            if len(values) != 3 or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
                raise ConfigError(f"dimension {name!r} is {sizes!r}, not [min, opt, max]", fix="three sizes, ascending")
            try:
                profile[name] = DimRange(*values)
            except ConfigError as error:
                raise ConfigError(f"dimension {name!r}: {error.what}", fix=error.fix) from None
        profiles.append(profile)
    for index, profile in enumerate(profiles):
        if set(profile) != set(profiles[0]):
            raise ConfigError(
                f"profile {index} has the dimensions {sorted(profile)}, profile 0 has {sorted(profiles[0])}",
                fix="give every profile a range for each dimension",
            )
    return tuple(profiles)


def check_dims(inputs: Sequence[InputSpec], profiles: Sequence[Profile]) -> None:
    """Raises `ConfigError` unless the inputs' named dimensions and the profiles' are the same."""
    used = {dim for spec in inputs for dim in spec.dims}
    known = set(profiles[0])
    for name in sorted(used - known):
        raise ConfigError(
            f"dimension {name!r} stands in an input's shape but has no range in `dims`",
            fix=f"add `{name}: [min, opt, max]` to dims ({nearest(name, known)})" if known else "add it to `dims`",
        )
    for name in sorted(known - used):
        if inputs:
            raise ConfigError(
                f"dimension {name!r} has a range in `dims` but no input's shape names it", fix=nearest(name, used)
            )


def _merge_defaults(source: YamlSource) -> dict[str, Any]:
    data = copy.deepcopy(dict(source.data))
    defaults, models = data.get("defaults"), data.get("models")
    if isinstance(defaults, dict) and isinstance(models, dict):
        for name, model in models.items():
            if isinstance(model, dict):
                models[name] = _merge(defaults, model)
    return data


def _merge(base: Any, over: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(over, dict):
        return copy.deepcopy(over)
    merged = {key: _merge(base[key], over[key]) for key in base if key in over}
    return copy.deepcopy({**base, **over}) | merged


def _explain(error: ValidationError, source: YamlSource) -> ConfigError:
    problems: list[str] = []
    for detail in error.errors(include_url=False):
        problem = _explain_one(detail, source)
        if problem not in problems:
            problems.append(problem)
    return ConfigError("\n".join(problems[:20]))


def _explain_one(detail: ErrorDetails, source: YamlSource) -> str:
    at = _real_path(detail["loc"], source)
    inherited: KeyPath = ("defaults", *at[2:]) if at[:1] == ("models",) and len(at) > 2 else at
    where = source.where(at, inherited)
    name = ".".join(str(part) for part in at) or "the file"
    if detail["type"] == "extra_forbidden":
        parent = ".".join(map(str, at[:-1])) or "the file"
        return f"{where}: unknown key {at[-1]!r} in {parent}; {_near_key(detail['loc'])}"
    if detail["type"] == "missing":
        return f"{where}: {name} is missing" + ("; write `version: 1`" if at == ("version",) else "")
    message = detail["msg"].removeprefix("Value error, ")
    value = detail.get("input")
    shown = "" if isinstance(value, dict | list) and len(str(value)) > 80 else f" (it is {value!r})"
    return f"{where}: {name}: {message[:1].lower() + message[1:]}{shown}"


def _real_path(loc: tuple[int | str, ...], source: YamlSource) -> KeyPath:
    """A location of pydantic's without the tags it adds for unions and constraints, which are no keys of the file."""
    data: Any = _merge_defaults(source)
    path: list[int | str] = []
    for index, part in enumerate(loc):
        inside = isinstance(data, dict) and part in data
        inside = inside or (isinstance(data, list) and isinstance(part, int) and part < len(data))
        if inside:
            data = data[part]
            path.append(part)
        elif index == len(loc) - 1 and isinstance(data, dict) and "[" not in str(part) and str(part).isidentifier():
            path.append(part)
    return tuple(path)


def _near_key(loc: tuple[int | str, ...]) -> str:
    return nearest(str(loc[-1]), _keys_at(FileSection, loc[:-1]))


def _keys_at(annotation: Any, loc: Sequence[int | str]) -> list[str]:
    """The keys that the schema `annotation` knows at a location inside it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not loc:
            return list(annotation.model_fields)
        field_info = annotation.model_fields.get(str(loc[0]))
        return _keys_at(field_info.annotation, loc[1:]) if field_info else []
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict:
        return _keys_at(arguments[1], loc[1:])
    return next((keys for part in arguments if (keys := _keys_at(part, loc))), [])


def _resolve_all(section: FileSection, data: Mapping[str, Any], source: YamlSource) -> list[ConversionConfig]:
    out: list[ConversionConfig] = []
    axes = list(section.matrix)
    for name, model in section.models.items():
        for values in itertools.product(*section.matrix.values()):
            full = "-".join([name, *(_label(value) for value in values)])
            if values:
                changed = copy.deepcopy(data["models"][name])
                for axis, value in zip(axes, values, strict=True):
                    _set(changed, axis, value)
                try:
                    model = ModelSection.model_validate(changed)
                except ValidationError as error:
                    first = error.errors(include_url=False)[0]
                    at = ".".join(map(str, first["loc"]))
                    said = first["msg"].removeprefix("Value error, ")
                    raise ConfigError(f"{source.where(('matrix',))}: matrix value for {at}: {said}") from None
            try:
                out.append(_resolve(full, name, model, source))
            except ConfigError as error:
                raise ConfigError(
                    f"{source.where(('models', name))}: {full}: {error.what}", why=error.why, fix=error.fix
                ) from error
    names = [config.name for config in out]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{source.path}: two models resolve to the name {name!r}", fix="rename one of them")
    return out


def _label(value: Any) -> str:
    text = Path(value).stem if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return "".join(c if c.isalnum() or c in "._" else "_" for c in text).strip("_")[:40] or "value"


def _set(data: dict[str, Any], axis: str, value: Any) -> None:
    *parents, last = axis.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(f"matrix key {axis!r}: {parent!r} is not a mapping")
    data[last] = value


def _resolve(name: str, model_name: str, model: ModelSection, source: YamlSource) -> ConversionConfig:
    folder = source.path.resolve().parent
    profiles = parse_profiles(model.dims)
    inputs = tuple(_input(key, value) for key, value in model.inputs.items())
    if not inputs and model.source.factory:
        raise ConfigError(
            "`inputs` is missing", fix="name each parameter of the model's forward with its dtype and shape"
        )
    check_dims(inputs, profiles)
    if model.custom_ops is not None and model.source.onnx is not None:
        raise ConfigError(
            "`custom_ops` translates operators of PyTorch, and the source is an ONNX file", fix="leave it out"
        )
    return ConversionConfig(
        name=name,
        model=model_name,
        source=_source(model.source, folder),
        profiles=profiles,
        inputs=inputs,
        outputs=tuple(model.outputs),
        custom_ops=model.custom_ops,
        plan=_plan(model.precision, folder, guard=model.overflow_guard),
        search=parse_search(model.search, auto=asks_auto(model.precision)),
        calibration=None
        if model.calibration is None
        else Calibration(
            _loader(model.calibration),
            model.calibration.method,
            model.calibration.batches,
            None if model.calibration.ranges is None else folder / model.calibration.ranges,
            model.calibration.smoothing,
            model.calibration.rounding,
            model.calibration.bias_correction,
        ),
        validation=Validation(
            _loader(model.validation),
            model.validation.batches,
            {k: v for k, v in model.validation.tolerance.model_dump().items() if v is not None},
            parse_accuracy(model.validation.accuracy),
        ),
        target=resolve_target(model.target, folder),
        folder=folder,
        origin=source.path,
    )


def resolve_target(section: TargetSection, folder: Path) -> Target:
    """What a section asks to build for; the paths of the timing cache and of plugins start at `folder`."""
    values = section.model_dump(exclude={"backend", "compute_capabilities", "opset", "timing_cache", "plugins"})
    plugins = tuple(folder / Path(path).expanduser() for path in section.plugins)
    cache = None if section.timing_cache is None else folder / Path(section.timing_cache).expanduser()
    options = BuildOptions(timing_cache=cache, plugins=plugins, **values)
    return Target(section.backend, tuple(section.compute_capabilities), section.opset, options)


def parse_accuracy(section: AccuracySection | None) -> Accuracy | None:
    """The budget that a section asks for.

    Raises:
        ConfigError: there is no such metric.
    """
    if section is None:
        return None
    if ":" in section.metric:
        if not re.fullmatch(r"[\w.]+:[\w.]+", section.metric):
            raise ConfigError(f"accuracy metric {section.metric!r} is not package.module:function")
    else:
        from trtforge.validation.accuracy_metrics import find_metric

        find_metric(section.metric)
    values = section.model_dump(exclude={"loader", "kwargs"})
    return Accuracy(loader=_loader(section), **values)


def _source(section: SourceSection, folder: Path) -> Source:
    def path(text: str | None) -> Path | None:
        return None if text is None else folder / Path(text).expanduser()

    return Source(
        section.factory,
        section.kwargs,
        path(section.checkpoint),
        path(section.onnx),
        path(section.exported_program),
        section.network,
        section.network_kwargs,
    )


def _loader(section: LoaderSection) -> Loader | None:
    return None if section.loader is None else Loader(section.loader, section.kwargs)


def parse_search(section: SearchSection, *, auto: bool) -> Search:
    """How a section says to search."""
    return Search(auto, section.candidates, section.evaluations, section.looks, _loader(section))


def _input(name: str, section: InputSection) -> InputSpec:
    values = section.values
    if isinstance(values, bool):
        return InputSpec(name, section.dtype, tuple(section.shape), ValueRange(float(values), float(values)))
    if section.decides_shapes:
        return InputSpec(
            name, section.dtype, tuple(section.shape), elements=tuple(typing.cast("list[int | str]", values))
        )
    bounds = typing.cast("list[float] | None", values)
    return InputSpec(name, section.dtype, tuple(section.shape), ValueRange(*bounds) if bounds else None)


def asks_auto(precision: object) -> bool:
    """Whether the precision is to be found: `auto`, or a plan with `default: auto` whose rules hold in any case."""
    return precision == AUTO or (isinstance(precision, Mapping) and precision.get("default") == AUTO)


def _plan(precision: str | Mapping[str, Any], folder: Path, *, guard: bool) -> PrecisionPlan:
    if asks_auto(precision):
        precision = {**(precision if isinstance(precision, Mapping) else {}), "default": "fp32"}
    if isinstance(precision, str) and precision.endswith((".yaml", ".yml")):
        plan = PrecisionPlan.load(folder / precision)
    else:
        plan = PrecisionPlan.from_data(precision, name="precision", others=[AUTO])
    return plan if guard else replace(plan, overflow_guard=False)
