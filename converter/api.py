"""The Python API: the same pipeline as a YAML file, on live objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trtforge.calibration.ranges import Method
from trtforge.converter.artifact import Artifact, open_artifact
from trtforge.converter.config import (
    AUTO,
    Accuracy,
    Calibration,
    ConversionConfig,
    Search,
    Source,
    Target,
    Validation,
    asks_auto,
    parse_accuracy,
    parse_profiles,
    parse_search,
    resolve_target,
)
from trtforge.converter.network import with_network
from trtforge.converter.pipeline import LiveData, run_pipeline
from trtforge.converter.progress import OnEvent, Stages, ignore_events
from trtforge.converter.schema import AccuracySection, SearchSection, TargetSection
from trtforge.converter.sources import LoadedModel, PythonExample, check_weights, load_source, module_hash
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.precision import PrecisionPlan
from trtforge.runtime.publish import hash_bytes
from trtforge.runtime.suggest import nearest

if TYPE_CHECKING:
    import torch

__all__ = ["convert", "load"]

Dims = Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]]


def convert(
    model: torch.nn.Module | torch.export.ExportedProgram | str | Path,
    example_inputs: Any,
    output: str | Path,
    *,
    precision: str | Mapping[str, Any] | PrecisionPlan = "fp32",
    search: Mapping[str, Any] | None = None,
    overflow_guard: bool = True,
    dims: Dims | None = None,
    inputs: Mapping[str, Sequence[int | str | None]] | None = None,
    outputs: Sequence[str] = (),
    custom_ops: Mapping[Any, Any] | None = None,
    network: str | Callable[..., Any] | None = None,
    network_kwargs: Mapping[str, Any] | None = None,
    calibration: object | None = None,
    calibration_method: Method = "auto",
    smoothing: bool = True,
    rounding: bool = True,
    bias_correction: bool = True,
    validation: object | None = None,
    tolerance: Mapping[str, float] | None = None,
    accuracy: Mapping[str, Any] | None = None,
    backend: str = "auto",
    compute_capabilities: Sequence[str] = (),
    opset: int | None = None,
    optimization_level: int | None = None,
    workspace_mib: int | None = None,
    target: Mapping[str, Any] | None = None,
    on_event: OnEvent = ignore_events,
) -> Artifact:
    """Converts a model to an artifact: exported, cast, proved against the model, built, and proved again on a GPU.

    Args:
        model: A module (any device; it is left as it was), an `ExportedProgram`, or the path of an `.onnx` or `.pt2`
            file.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments, which may hold dicts,
            tuples, None and dataclasses; may be None for an exported program, and for an ONNX file, of which it is a
            tensor or array, or several by order or name.
        output: The artifact's folder, replaced as a whole; its last part is the model's name.
        precision: "fp32", "tf32", "fp16", "bf16", "int8", "fp8", a plan, or the path of a plan's YAML file; "auto"
            finds the fastest that keeps tolerances and budget. int8 and fp8 with a budget are mended until they do.
        search: For these two: `{"candidates": ["fp16", "int8"], "evaluations": 25, "looks": 5, "data": loader}`. With
            data of its own, labelled as the budget's, the search leaves the budget's samples alone.
        overflow_guard: Keep nodes that would overflow float16 on the samples in fp32; False leaves the plan as it is.
        dims: `{"batch": (min, opt, max)}`, or a list of such maps, one an optimization profile.
        inputs: The shape of each input with dimension names: `{"x": ("batch", 3, 224, 224)}`; None on an axis keeps the
            example's size. Inputs left out are static.
        outputs: Names for the outputs; by default the keys and fields of what the model returns.
        custom_ops: For operators of your own (`torch.library`): `{operator or "namespace::name": onnxscript function}`.
        network: A function (or `package.module:function`) that defines the engine's network by TensorRT's own API,
            called as `function(network, trt, **network_kwargs)` in another process; the model is what it has to equal.
            It returns what holds its weights, or None. Needs a GPU: only running such an engine proves it.
        network_kwargs: What the function is called with; JSON-able.
        calibration: Data for int8 and fp8 ranges: a DataLoader, Dataset, or any re-iterable of batches.
        calibration_method: "auto", "entropy", "percentile", "mse" or "max".
        smoothing: int8: move outliers of matrix products' inputs into the weights, where that pays.
        rounding: int8: round weights by their effect on the output, not each to its nearest code.
        bias_correction: int8: take out of biases what quantization adds to outputs on average.
        validation: Real data to prove on, in the same forms, beside generated inputs.
        tolerance: Limits that replace the precision's defaults: sqnr_db, cosine, max_abs_over_std, atol, rtol.
        accuracy: A budget of task accuracy: `{"metric": "top1", "data": loader, "max_drop": 0.005}`, the loader giving
            (inputs, labels). `metric` may be a function of predictions and labels; the other keys are YAML's.
        backend: "auto", "tensorrt" or "tensorrt-rtx".
        compute_capabilities: Targets of an engine that is built ahead of time, as "8.9".
        opset: ONNX opset; by default the highest that the backend takes well.
        optimization_level: 0 to 5, TensorRT's builder optimization level.
        workspace_mib: Limit of TensorRT's workspace, MiB.
        target: The other keys of YAML's `target`: `{"weight_streaming": True, "timing_cache": "timings.bin"}`.
        on_event: Called with progress.

    Returns:
        The published artifact; `artifact.load()` gives the engine where its status is `validated`.

    Raises:
        ConfigError: an argument is wrong.
        ExportError: the model cannot be exported, or a dynamic dimension came out static.
        BuildError: TensorRT cannot build it.
        ParityError: it does not equal the model; nothing is published at `output`, see `output + ".failed"`.
        AccuracyError: it does not keep the budget, or the samples are too few to show it; likewise.
    """
    place = Path(output)
    plan = _plan(precision) if overflow_guard else replace(_plan(precision), overflow_guard=False)
    budget = parse_budget(accuracy)
    config = ConversionConfig(
        name=place.name,
        model=place.name,
        source=with_network(_source(model), network, network_kwargs),
        profiles=parse_profiles(dims or {}),
        outputs=tuple(outputs),
        plan=plan,
        search=_search(search, auto=asks_auto(precision)),
        calibration=None
        if calibration is None
        else Calibration(
            method=calibration_method, smoothing=smoothing, rounding=rounding, bias_correction=bias_correction
        ),
        validation=Validation(tolerance=dict(tolerance or {}), accuracy=budget),
        target=parse_target(
            {
                "backend": backend,
                "compute_capabilities": list(compute_capabilities),
                "opset": opset,
                "optimization_level": optimization_level,
                "workspace_mib": workspace_mib,
                **(target or {}),
            }
        ),
    )
    stages = Stages(on_event)
    with stages.stage("load"):
        loaded = _load(model, example_inputs, dict(inputs or {}), config)
        loaded = _with_custom_ops(loaded, custom_ops)
    live = LiveData(validation, calibration, (accuracy or {}).get("data"), (search or {}).get("data"))
    return run_pipeline(config, loaded, place, stages, live)


def load(path: str | Path, *, allow_unvalidated: bool = False) -> Any:
    """The engine of the artifact at `path`; `open_artifact(path).load()`.

    Raises:
        ArtifactError: altered, not validated, or not for this machine.
    """
    return open_artifact(path).load(allow_unvalidated=allow_unvalidated)


def parse_budget(given: Mapping[str, Any] | None) -> Accuracy | None:
    """The budget that `convert(accuracy=…)` asks for.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    if given is None:
        return None
    functions = {key: given[key] for key in ("metric", "decode") if callable(given.get(key))}
    texts = {key: value for key, value in given.items() if key != "data" and key not in functions}
    if "metric" in functions:
        texts["metric"] = "top1"  # a stand-in: the function takes its place below
    for key in texts:
        if key not in AccuracySection.model_fields or key in ("loader", "kwargs"):
            known = [*sorted(set(AccuracySection.model_fields) - {"loader", "kwargs"}), "data"]
            raise ConfigError(f"accuracy has no key {key!r}", fix=nearest(key, known))
    try:
        section = AccuracySection.model_validate(texts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"accuracy: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    parsed = parse_accuracy(section)
    assert parsed is not None
    return replace(parsed, **functions)


def _search(given: Mapping[str, Any] | None, *, auto: bool) -> Search:
    known = ["data", *SearchSection.model_fields]
    for key in given or {}:
        if key not in known:
            raise ConfigError(f"search has no key {key!r}", fix=nearest(key, known))
    try:
        section = SearchSection.model_validate({k: v for k, v in (given or {}).items() if k != "data"})
        return parse_search(section, auto=auto)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"search: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def parse_target(given: Mapping[str, Any]) -> Target:
    """What `convert(target=…)` asks to build for; paths start at the working folder.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    for key in given:
        if key not in TargetSection.model_fields:
            raise ConfigError(f"target has no key {key!r}", fix=nearest(key, TargetSection.model_fields))
    try:
        return resolve_target(TargetSection.model_validate(dict(given)), Path())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"target: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _plan(precision: str | Mapping[str, Any] | PrecisionPlan) -> PrecisionPlan:
    if isinstance(precision, PrecisionPlan):
        return precision
    if asks_auto(precision):
        rest = precision if isinstance(precision, Mapping) else {}
        return PrecisionPlan.from_data({**rest, "default": "fp32"}, name="precision")
    if isinstance(precision, str) and precision.endswith((".yaml", ".yml")):
        return PrecisionPlan.load(Path(precision))
    return PrecisionPlan.from_data(precision, name="precision", others=[AUTO])


def _source(model: object) -> Source:
    if not isinstance(model, str | Path):
        return Source()
    suffix = Path(model).suffix
    if suffix not in (".onnx", ".pt2"):
        raise ConfigError(
            f"{model} is neither an .onnx nor a .pt2 file", fix="pass a module, or the path of an ONNX or .pt2 file"
        )
    return Source(onnx=Path(model)) if suffix == ".onnx" else Source(exported_program=Path(model))


def _with_custom_ops(loaded: LoadedModel, custom_ops: Mapping[Any, Any] | None) -> LoadedModel:
    if custom_ops is None:
        return loaded
    if loaded.onnx is not None:
        raise ConfigError(
            "`custom_ops` translates operators of PyTorch, and the model is an ONNX file", fix="leave it out"
        )
    from trtforge.converter.custom_ops import read_table

    return replace(loaded, translations=read_table(custom_ops, name="custom_ops"))


def _load(model: Any, example: Any, shapes: dict[str, Any], config: ConversionConfig) -> LoadedModel:
    import torch

    if isinstance(model, str | Path):
        return replace(load_source(config), example=PythonExample(example, shapes))
    if isinstance(model, torch.export.ExportedProgram):
        check_weights(model)
        described = str(model.graph)
        loaded = LoadedModel(None, None, hash_bytes(described.encode()), module_hash(model), program=model)
        return replace(loaded, example=PythonExample(example, shapes))
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"model is {type(model).__name__}, not a torch.nn.Module, an ExportedProgram or the path of a file",
            fix="wrap a function in a module whose forward() calls it",
        )
    if example is None:
        raise ConfigError("example_inputs is None", fix="give one call's inputs: a tensor, a tuple, or a dict")
    check_weights(model)
    described = f"{type(model).__module__}.{type(model).__qualname__}"
    return LoadedModel(model, None, hash_bytes(described.encode()), module_hash(model), PythonExample(example, shapes))
