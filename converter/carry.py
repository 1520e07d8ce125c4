"""A plan carried out on a reference graph, in memory: the same casts and Q/DQ that a conversion writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from trtforge.calibration.ranges import Ranges
from trtforge.converter.assign import Decision
from trtforge.converter.casts import apply_plan
from trtforge.converter.quantize import (
    CALIBRATION,
    Quantization,
    make_placement,
    quantize_graph,
    quantized_products,
    read_ranges,
)
from trtforge.converter.types import check_types
from trtforge.runtime.graph import OnnxModel, load_graph
from trtforge.runtime.precision import Precision, PrecisionPlan

__all__ = ["Carried", "carry", "carry_out"]


@dataclass(frozen=True, slots=True)
class Carried:
    """The graph with the plan carried out, every precision that a node runs in, and what was decided for which."""

    model: ir.Model
    used: frozenset[Precision]
    decisions: tuple[Decision, ...]


def carry(reference: OnnxModel, plan: PrecisionPlan, quantization: Quantization | None, half_products: bool) -> Carried:
    """Casts, then Q/DQ, on a copy of a float graph. Types are not checked.

    Args:
        reference: The float graph; not changed.
        plan: The plan.
        quantization: What is quantized, in which ranges; None: nothing but what the model carries.
        half_products: Whether the backend takes quantized products with float16 scales
            (`Capabilities.half_quantized_products`).

    Raises:
        ConfigError: a rule that matches nothing.
        CalibrationError: a tensor without a range.
    """
    graph = load_graph(reference.path)
    no_half: frozenset[str] = frozenset()
    if not half_products:
        no_half = quantized_products(graph, quantization.placement if quantization else None)
    decisions = apply_plan(graph, plan, graph=reference.hash, no_half=no_half)
    used: set[Precision] = {decision.precision for decision in decisions} or {"fp32"}
    if quantization is not None:
        used |= quantize_graph(graph, quantization)
    return Carried(graph, frozenset(used), tuple(decisions))


def carry_out(reference: OnnxModel, plan: PrecisionPlan, folder: Path, *, half_products: bool = True) -> Carried:
    """The graph that a conversion under `plan` would write.

    Args:
        reference: The float graph; not changed.
        plan: The plan, with the rules of the overflow guard where they are wanted.
        folder: Holds `calibration.json` where the plan quantizes.
        half_products: As `carry` takes it.

    Raises:
        ConfigError: a rule that matches nothing, or nothing can be quantized.
        ArtifactError: the ranges cannot be read.
        CalibrationError: a tensor without a range.
    """
    quantization = None
    if plan.quantizes:
        placement = make_placement(reference, plan)
        carries = placement.existing > 0
        quantization = (
            Quantization(placement, Ranges({})) if carries else read_ranges(folder / CALIBRATION, reference, plan)
        )
    carried = carry(reference, plan, quantization, half_products)
    check_types(carried.model, strict=False)
    return carried
