"""Calibration within a conversion: which tensors need ranges, the pass over the data, and Q/DQ in the cast graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from trtforge.calibration.cache import load_ranges, save_ranges
from trtforge.calibration.calibrate import Smoothed, calibrate
from trtforge.calibration.existing import check_existing
from trtforge.calibration.fit import Fit, FitSettings, describe_key, fit_weights, load_fit, save_fit
from trtforge.calibration.histogram import Histogram
from trtforge.calibration.loaders import read_batches
from trtforge.calibration.pictures import write_page
from trtforge.calibration.placement import PRODUCTS, Placement, quantizable_tensors
from trtforge.calibration.probe import choose_samples
from trtforge.calibration.qdq import insert_qdq
from trtforge.calibration.ranges import Ranges
from trtforge.calibration.smoothing import Factors, apply_smoothing, measure_smoothing
from trtforge.converter.config import Calibration, ConversionConfig
from trtforge.converter.data import find_source
from trtforge.converter.progress import Event, Stages
from trtforge.converter.types import infer_types
from trtforge.runtime.errors import CalibrationError, ConfigError
from trtforge.runtime.graph import OnnxModel, load_graph, save_graph
from trtforge.runtime.precision import Precision, PrecisionPlan
from trtforge.runtime.runner import Tensors
from trtforge.runtime.specs import InputSpec

__all__ = [
    "CALIBRATION",
    "Prepared",
    "Quantization",
    "calibration_source",
    "find_ranges",
    "fit_settings",
    "halved_products",
    "make_placement",
    "narrow",
    "prepare",
    "quantize_graph",
    "quantized_products",
    "read_ranges",
    "save_calibration",
    "scale_type",
    "write_ranges",
]

CALIBRATION = "calibration.json"
PAGE = "calibration.html"
FIT_SUFFIX = ".safetensors"
"""Of the file of fitted codes and biases, beside the ranges."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """What is quantized, and how.

    Attributes:
        placement: What to quantize, in the graph as it is after smoothing.
        ranges: In which ranges, and what was smoothed before.
        histograms: What these were chosen from; none where they were read.
        fit: Codes and biases fitted to the data; None: nearest codes.
        before: The placement before smoothing; None where nothing is smoothed.
    """

    placement: Placement
    ranges: Ranges
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    fit: Fit | None = None
    before: Placement | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """The float graph as calibration runs it: smoothed, where that pays.

    Attributes:
        model: The graph.
        placement: Of it.
        before: Of the graph as exported.
        smoothed: How it came from the graph as exported; None where it is that.
        samples: Data for stages that look at it several times; empty where there is none.
    """

    model: OnnxModel
    placement: Placement
    before: Placement
    smoothed: Smoothed | None
    samples: list[Tensors]


def make_placement(reference: OnnxModel, plan: PrecisionPlan) -> Placement:
    """Which tensors the plan quantizes; empty but for `existing` where the model carries Q/DQ, which is checked here.

    Raises:
        ConfigError: a rule that matches nothing, or nothing can be quantized.
        CalibrationError: Q/DQ of the model's own that TensorRT does not take.
    """
    graph = load_graph(reference.path)
    infer_types(graph)
    if check_existing(graph) is not None:
        return quantizable_tensors(graph, plan)
    placement = quantizable_tensors(graph, plan)
    if not placement.nodes:
        why = "; ".join(f"{skipped.node}: {skipped.reason}" for skipped in placement.skipped[:3])
        raise ConfigError(
            f"precision {plan.default} quantizes nothing in this model",
            why=why or "it has no Conv, ConvTranspose, Gemm or MatMul",
            fix="choose a float precision",
        )
    return placement


def prepare(
    config: ConversionConfig,
    source: object,
    reference: OnnxModel,
    plan: PrecisionPlan,
    specs: tuple[InputSpec, ...],
    work: Path,
    stages: Stages,
) -> Prepared:
    """Reads the data once for the samples that stand for it, and smooths the graph where that pays.

    Args:
        config: Its `calibration` says what is wanted.
        source: The calibration data.
        reference: The float graph as exported.
        plan: What is quantized.
        specs: The graph's inputs.
        work: Where the smoothed graph is written.
        stages: Receives a note where the data can be read only once.

    Raises:
        CalibrationError: the data do not fit.
        Exception: whatever the user's loader raises.
    """
    calibration = config.calibration or Calibration()
    placement = make_placement(reference, plan)
    plain = Prepared(reference, placement, placement, None, [])
    if not (calibration.smoothing or calibration.rounding or calibration.bias_correction):
        return plain
    if not any(weight.format == "int8" for weight in placement.weights):
        return plain
    if isinstance(source, Iterator):
        stages.note("weights get their nearest codes: the calibration data is an iterator, which can be read only once")
        return plain
    samples = choose_samples(reference, read_batches(source, specs, config.profiles, calibration.batches))
    if not calibration.smoothing:
        return replace(plain, samples=samples)
    factors = measure_smoothing(
        reference, placement, samples, calibration.method, specs=specs, profiles=config.profiles
    )
    if not factors:
        return replace(plain, samples=samples)
    graph, smooth = _smooth(reference, plan, placement, factors)
    model = save_graph(graph, work / "smoothed.onnx")
    return Prepared(model, smooth, placement, Smoothed(reference.hash, factors), samples)


def _smooth(
    reference: OnnxModel, plan: PrecisionPlan, placement: Placement, factors: Factors
) -> tuple[ir.Model, Placement]:
    graph = load_graph(reference.path)
    infer_types(graph)
    apply_smoothing(graph, placement, factors)
    return graph, quantizable_tensors(graph, plan)


def find_ranges(
    config: ConversionConfig,
    live: object | None,
    reference: OnnxModel,
    plan: PrecisionPlan,
    specs: tuple[InputSpec, ...],
    stages: Stages,
    *,
    work: Path,
    cache: Path | None = None,
    fit: bool = True,
) -> Quantization:
    """Smoothing, ranges and fitted weights from the calibration data.

    Args:
        config: Its `calibration` names loader, method, what is fitted, and how many batches to read.
        live: Data from Python.
        reference: The float graph, without Q/DQ of its own.
        plan: What is quantized.
        specs: Its inputs.
        stages: Receives progress, and a note where `cache` is not used.
        work: Where temporary graphs go.
        cache: A file of ranges, reused where all that it was made from is the same, and else written.
        fit: Also fit weights and biases.

    Raises:
        ConfigError: there is no data.
        CalibrationError: the data do not fit, or activations are not finite.
        Exception: whatever the user's loader raises.
    """
    calibration = config.calibration or Calibration()
    source = calibration_source(config, live)
    prepared = prepare(config, source, reference, plan, specs, work, stages)
    found = calibrate(
        prepared.model,
        prepared.placement.measured,
        source,
        specs,
        config.profiles,
        method=calibration.method,
        batches=calibration.batches,
        cache=cache,
        smoothed=prepared.smoothed,
        on_samples=lambda samples: stages.on_event(Event("progress", stages.current, "samples", samples)),
    )
    if found.why_not:
        stages.note(f"{cache} is not reused: {'; '.join(found.why_not)}")
    fitted = _fit(calibration, prepared, found.ranges, plan) if fit and prepared.samples else None
    return Quantization(prepared.placement, found.ranges, found.histograms, fitted, prepared.before)


def _fit(calibration: Calibration, prepared: Prepared, ranges: Ranges, plan: PrecisionPlan) -> Fit:
    return fit_weights(
        prepared.model,
        prepared.placement,
        ranges,
        prepared.samples,
        settings=fit_settings(calibration),
        dtype=scale_type(plan),
    )


def fit_settings(calibration: Calibration) -> FitSettings:
    """What of weights and biases the configuration wants fitted."""
    return FitSettings(rounding=calibration.rounding, bias=calibration.bias_correction)


def scale_type(plan: PrecisionPlan) -> ir.DataType:
    """The narrowest float type among the plan's: a scale that is exact in it is exact in float32 too."""
    found = {plan.float_default, *(rule.precision for rule in plan.rules)}
    if "bf16" in found:
        return ir.DataType.BFLOAT16
    return ir.DataType.FLOAT16 if "fp16" in found else ir.DataType.FLOAT


def calibration_source(config: ConversionConfig, live: object | None) -> object:
    """The calibration data.

    Raises:
        ConfigError: there is none.
    """
    source = find_source(config, config.calibration.loader if config.calibration else None, live)
    if source is None:
        raise ConfigError(
            f"precision {config.plan.default} needs ranges, and there is no calibration data",
            fix="name a `calibration: {loader: package.module:function}`, or pass calibration= from Python",
        )
    return source


def quantized_products(graph: ir.Model, placement: Placement | None) -> frozenset[str]:
    """Ids of the nodes that multiply codes, and of the model's own Q/DQ around such.

    Where a backend takes float32 scales only (`Capabilities.half_quantized_products`) they run in float32 instead.

    Args:
        graph: Before the placement is carried out.
        placement: What will be quantized; None: nothing but what the model carries.
    """
    wanted = frozenset(placement.nodes) if placement else frozenset()
    found = set()
    for node in graph.graph:
        own = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        reads_codes = any(v is not None and _is_dequantized(v) for v in node.inputs)
        if own or (node.op_type in PRODUCTS and (node.name in wanted or reads_codes)):
            found.add(node.name or "")
    return frozenset(found)


def halved_products(graph: ir.Model) -> list[str]:
    """Ids of the nodes that multiply codes and give float16; types are known (`types.infer_types`)."""
    products = quantized_products(graph, None)
    return [
        node.name or node.op_type
        for node in graph.graph
        if node.op_type in PRODUCTS and node.name in products and node.outputs[0].dtype == ir.DataType.FLOAT16
    ]


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def quantize_graph(graph: ir.Model, quantization: Quantization) -> set[Precision]:
    """Writes Q/DQ into a graph whose casts are done; gives the quantized precisions that it now has.

    Raises:
        CalibrationError: as `insert_qdq` raises.
    """
    placement = quantization.placement
    if not placement.existing:
        if quantization.ranges.smoothing:
            apply_smoothing(graph, quantization.before or placement, quantization.ranges.smoothing)
        report = insert_qdq(graph, placement, quantization.ranges, quantization.fit)
        if report.in_float:
            raise CalibrationError(f"no range for {', '.join(report.in_float)}")
    used: set[Precision] = {tensor.format for tensor in placement.tensors}
    return used | {weight.format for weight in placement.weights}


def read_ranges(
    path: Path, reference: OnnxModel, plan: PrecisionPlan, settings: FitSettings | None = None
) -> Quantization:
    """What `trtforge calibrate` or a conversion wrote, where it is this graph's: ranges, and the fit beside them.

    Args:
        path: The file of ranges.
        reference: The float graph as exported.
        plan: What is quantized.
        settings: What must have been fitted for the fit to be used; None uses whatever is there.

    Raises:
        ArtifactError: not a calibration file.
        CalibrationError: it was made from another graph, or lacks a tensor.
    """
    ranges = load_ranges(path)
    made = ranges.made_from
    if made.graph and made.graph != reference.hash:
        raise CalibrationError(
            f"{path} holds ranges of graph {made.graph[:12]}, this model is graph {reference.hash[:12]}",
            why="ranges hold for the graph that they were measured on",
            fix="run `trtforge calibrate` again",
        )
    before, placement = _place(reference, plan, ranges)
    missing = [name for name in placement.measured if name not in ranges]
    if missing:
        raise CalibrationError(
            f"{path} has no range for {len(missing)} of {len(placement.measured)} tensors: {', '.join(missing[:5])}",
            fix="run `trtforge calibrate` again",
        )
    return Quantization(placement, ranges, fit=_read_fit(path, ranges, settings), before=before)


def narrow(whole: Quantization, reference: OnnxModel, plan: PrecisionPlan) -> Quantization | None:
    """The same ranges and fit for a plan that quantizes less; None where a tensor of it has no range there.

    Args:
        whole: Of a plan that quantizes more.
        reference: The float graph as exported.
        plan: What is quantized.
    """
    before, placement = _place(reference, plan, whole.ranges)
    if placement.existing:
        return whole
    if any(name not in whole.ranges for name in placement.measured):
        return None
    return replace(whole, placement=placement, before=before)


def _place(reference: OnnxModel, plan: PrecisionPlan, ranges: Ranges) -> tuple[Placement, Placement]:
    """The placement before smoothing, and in the graph as it was smoothed when the ranges were measured."""
    before = make_placement(reference, plan)
    if not ranges.smoothing or before.existing:
        return before, before
    return before, _smooth(reference, plan, before, ranges.smoothing)[1]


def _read_fit(path: Path, ranges: Ranges, settings: FitSettings | None) -> Fit | None:
    """The fit beside a file of ranges, where it was made from just these."""
    place = path.with_suffix(FIT_SUFFIX)
    if not place.exists():
        return None
    found = load_fit(place)
    types = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    every = [FitSettings(rounding, bias) for rounding in (True, False) for bias in (True, False)]
    wanted = every if settings is None else [settings]
    keys = {describe_key(ranges.made_from.graph, ranges, one, dtype) for one in wanted for dtype in types}
    return found if found.key in keys else None


def save_calibration(folder: Path, found: Quantization) -> None:
    """Writes `calibration.json`, `calibration.safetensors` (fitted codes and biases), and `calibration.html`."""
    if not found.ranges.tensors:
        return
    write_ranges(folder / CALIBRATION, found)
    if found.histograms:
        formats = {tensor.format for tensor in found.placement.tensors}
        write_page(
            folder / PAGE,
            found.ranges,
            found.histograms,
            format="fp8" if formats == {"fp8"} else "int8",
            title="Calibration",
            layers=found.fit.layers if found.fit is not None else (),
        )


def write_ranges(path: Path, found: Quantization) -> None:
    """Writes ranges, and beside them the fit; `read_ranges` reads both.

    Raises:
        ArtifactError: a file cannot be written.
    """
    beside = path.with_suffix(FIT_SUFFIX)
    if found.fit is None:
        beside.unlink(missing_ok=True)  # it belongs to other ranges
        save_ranges(path, found.ranges)
        return
    save_ranges(path, found.ranges)
    save_fit(beside, found.fit)
