"""What a report shows beside its proof: errors by layer, calibrated ranges, what the engine fused. Data alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtforge.converter.artifact import ENGINE
from trtforge.runtime.graph import load_graph

if TYPE_CHECKING:
    from trtforge.calibration.histogram import Histogram
    from trtforge.converter.package import Package
    from trtforge.converter.quantize import Quantization

__all__ = ["EXTRAS", "collect_extras", "engine_layers", "range_entries"]

EXTRAS = ("layers", "ranges", "engine_layers", "search", "bench")
"""Keys of `report.json` that a later validation takes over from the report before."""
_BINS = 64


def collect_extras(package: Package, folder: Path) -> dict[str, Any]:
    """What there is of `EXTRAS` for a conversion; a measurement that fails is left out, and says why.

    Args:
        package: What the conversion made.
        folder: Holds the engine where there is one.
    """
    extras: dict[str, Any] = {}
    missing = {}
    if package.quantization is not None and package.quantization.ranges.tensors:
        extras["ranges"] = range_entries(package.quantization)
    if package.model is not package.reference and package.golden.samples:
        try:
            extras["layers"] = _measure(package)
        except Exception as error:  # noqa: BLE001  # a conversion that is proved must not fail over a picture of it
            missing["layers"] = f"{type(error).__name__}: {error}"
    ran = any(report.candidate.stage == "engine" for report in package.reports)
    if ran and package.engine is not None:
        from trtforge.runtime.trt.execute import inspect_engine

        try:
            found = inspect_engine(
                folder / ENGINE,
                package.engine.backend,
                tf32=package.config.plan.float_default == "tf32",
                version_compatible=package.config.target.options.version_compatible,
                plugins=package.config.target.options.plugins,
            )
            extras["engine_layers"] = engine_layers(found["layers"])
        except Exception as error:  # noqa: BLE001  # as above
            missing["engine_layers"] = f"{type(error).__name__}: {error}"
    return {**extras, **({"missing": missing} if missing else {})}


def range_entries(quantization: Quantization) -> list[dict[str, Any]]:
    """Each calibrated tensor's range, with a histogram of |x| in at most 64 bins where it was measured here."""
    formats = {tensor.measured: tensor.format for tensor in quantization.placement.tensors}
    entries = []
    for name, found in quantization.ranges.tensors.items():
        if name not in formats:  # measured, and its layer put back into float since
            continue
        entry: dict[str, Any] = {"name": name, "format": formats[name], **found.to_json()}
        if name in quantization.histograms:
            entry |= _coarse(quantization.histograms[name])
        entries.append(entry)
    return entries


def engine_layers(inspection: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Layers of an engine as its inspector lists them: name, kind, the ONNX nodes fused in it, types of its outputs.

    Args:
        inspection: `{"Layers": […]}`; a layer is an object, or its name alone where the engine keeps no more.
    """
    entries = []
    for layer in inspection.get("Layers", []):
        if isinstance(layer, str):
            entries.append({"name": layer, "type": "", "nodes": [], "outputs": []})
            continue
        metadata = str(layer.get("Metadata", ""))
        nodes = re.findall(r"\[ONNX Layer: (.*?)\](?=[\x1e\[,; ]|$)", metadata)
        outputs = [str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Outputs", [])]
        entries.append(
            {
                "name": str(layer.get("Name", "")),
                "type": str(layer.get("LayerType", "")),
                "nodes": list(dict.fromkeys(nodes)),
                "outputs": [text for text in outputs if text],
            }
        )
    return entries


def _measure(package: Package) -> Sequence[dict[str, Any]]:
    from trtforge.converter.pieces import open_onnx, run_with
    from trtforge.converter.types import infer_types
    from trtforge.validation.bisect import Side
    from trtforge.validation.layers import measure_layers

    sides = []
    for model in (package.reference, package.model):
        graph = load_graph(model.path)
        infer_types(graph)
        sides.append(Side(graph, run_with(open_onnx)))
    sample = min(package.golden.samples, key=lambda s: sum(array.nbytes for array in s.inputs.values()))
    return [layer.to_json() for layer in measure_layers(sides[0], sides[1], sample.inputs)]


def _coarse(histogram: Histogram) -> dict[str, Any]:
    counts = histogram.counts[: histogram.used].tolist()
    step = -(-len(counts) // _BINS)
    coarse = [sum(counts[start : start + step]) for start in range(0, len(counts), step)]
    return {"counts": coarse, "width": histogram.width * step}
