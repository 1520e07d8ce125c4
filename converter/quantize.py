"""Calibration within a conversion: which tensors need ranges, the pass over the data, and Q/DQ in the cast graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from trtforge.calibration.cache import load_ranges, save_ranges
from trtforge.calibration.collect import Collected, Shard, collect
from trtforge.calibration.existing import check_existing
from trtforge.calibration.placement import Placement, quantizable_tensors
from trtforge.calibration.qdq import insert_qdq
from trtforge.calibration.ranges import Ranges
from trtforge.converter.progress import Event, Stages
from trtforge.converter.types import infer_types
from trtforge.runtime.errors import CalibrationError, ConfigError
from trtforge.runtime.graph import OnnxModel, load_graph
from trtforge.runtime.precision import Precision, PrecisionPlan
from trtforge.runtime.runner import Tensors

__all__ = [
    "CALIBRATION",
    "Quantization",
    "collect_ranges",
    "make_placement",
    "quantize_graph",
    "read_ranges",
    "save_calibration",
]

CALIBRATION = "calibration.json"


@dataclass(frozen=True, slots=True)
class Quantization:
    """What to quantize, and in which ranges."""

    placement: Placement
    ranges: Ranges


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


def collect_ranges(
    reference: OnnxModel,
    placement: Placement,
    batches: Iterable[Tensors],
    stages: Stages,
    *,
    shard: Shard | None = None,
) -> Collected:
    """One pass of the float graph over the data.

    Raises:
        CalibrationError: no data, or activations that are not finite.
        Exception: whatever the user's loader raises.
    """

    def tell(samples: int) -> None:
        stages.on_event(Event("progress", stages.current, "samples", samples))

    return collect(reference, placement.measured, batches, on_samples=tell, shard=shard or Shard())


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


def read_ranges(path: Path, reference: OnnxModel, placement: Placement) -> Ranges:
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
    return ranges


def save_calibration(folder: Path, ranges: Ranges) -> None:
    """Writes `calibration.json`."""
    save_ranges(folder / CALIBRATION, ranges)
