"""Calibration within a conversion: which tensors need ranges, the pass over the data, and Q/DQ in the cast graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from trtforge.calibration.cache import load_ranges, save_ranges
from trtforge.calibration.calibrate import calibrate
from trtforge.calibration.existing import check_existing
from trtforge.calibration.histogram import Histogram
from trtforge.calibration.pictures import write_page
from trtforge.calibration.placement import PRODUCTS, Placement, quantizable_tensors
from trtforge.calibration.qdq import insert_qdq
from trtforge.calibration.ranges import Ranges
from trtforge.converter.config import Calibration, ConversionConfig
from trtforge.converter.data import find_source
from trtforge.converter.progress import Event, Stages
from trtforge.converter.types import infer_types
from trtforge.runtime.errors import CalibrationError, ConfigError
from trtforge.runtime.graph import OnnxModel, load_graph
from trtforge.runtime.precision import Precision, PrecisionPlan
from trtforge.runtime.specs import InputSpec

__all__ = [
    "CALIBRATION",
    "Quantization",
    "calibration_source",
    "find_ranges",
    "halved_products",
    "make_placement",
    "quantize_graph",
    "quantized_products",
    "read_ranges",
    "save_calibration",
]

CALIBRATION = "calibration.json"
PAGE = "calibration.html"


@dataclass(frozen=True, slots=True)
class Quantization:
    """What to quantize, in which ranges, and the histograms that these were chosen from (none where they were read)."""

    placement: Placement
    ranges: Ranges
    histograms: Mapping[str, Histogram] = field(default_factory=dict)


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


def find_ranges(
    config: ConversionConfig,
    live: object | None,
    reference: OnnxModel,
    placement: Placement,
    specs: tuple[InputSpec, ...],
    stages: Stages,
    *,
    cache: Path | None = None,
) -> Quantization:
    """One pass of the float graph over the calibration data; no ranges where the model carries Q/DQ of its own.

    Args:
        config: Its `calibration` names loader, method and how many batches to read.
        live: Data from Python.
        reference: The float graph.
        placement: What needs ranges.
        specs: Its inputs.
        stages: Receives progress, and a note where `cache` is not used.
        cache: A file of ranges, reused where all that it was made from is the same, and else written.

    Raises:
        ConfigError: there is no data.
        CalibrationError: the data do not fit, or activations are not finite.
        Exception: whatever the user's loader raises.
    """
    if placement.existing:
        return Quantization(placement, Ranges({}))
    calibration = config.calibration or Calibration()
    source = calibration_source(config, live)
    found = calibrate(
        reference,
        placement.measured,
        source,
        specs,
        config.profiles,
        method=calibration.method,
        batches=calibration.batches,
        cache=cache,
        on_samples=lambda samples: stages.on_event(Event("progress", stages.current, "samples", samples)),
    )
    if found.why_not:
        stages.note(f"{cache} is not reused: {'; '.join(found.why_not)}")
    return Quantization(placement, found.ranges, found.histograms)


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
        report = insert_qdq(graph, placement, quantization.ranges)
        if report.in_float:
            raise CalibrationError(f"no range for {', '.join(report.in_float)}")
    used: set[Precision] = {tensor.format for tensor in placement.tensors}
    return used | {weight.format for weight in placement.weights}


def read_ranges(path: Path, reference: OnnxModel, placement: Placement) -> Quantization:
    """Ranges that `trtforge calibrate` wrote, where they are this graph's.

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
    missing = [name for name in placement.measured if name not in ranges]
    if missing:
        raise CalibrationError(
            f"{path} has no range for {len(missing)} of {len(placement.measured)} tensors: {', '.join(missing[:5])}",
            fix="run `trtforge calibrate` again",
        )
    return Quantization(placement, ranges)


def save_calibration(folder: Path, found: Quantization) -> None:
    """Writes `calibration.json`, and `calibration.html` with a picture of each histogram and its threshold."""
    if not found.ranges.tensors:
        return
    save_ranges(folder / CALIBRATION, found.ranges)
    if found.histograms:
        formats = {tensor.format for tensor in found.placement.tensors}
        write_page(
            folder / PAGE,
            found.ranges,
            found.histograms,
            format="fp8" if formats == {"fp8"} else "int8",
            title="Calibration",
        )
