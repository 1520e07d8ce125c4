"""`trtforge calibrate`: ranges without a conversion, in shards, from TensorRT caches, and the layers that hurt most."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trtforge.calibration.auto import choose_ranges
from trtforge.calibration.cache import save_ranges
from trtforge.calibration.calibrate import run_shard
from trtforge.calibration.collect import Shard, merge_collected
from trtforge.calibration.loaders import read_batches
from trtforge.calibration.parts import load_part, save_part
from trtforge.calibration.placement import Placement
from trtforge.calibration.ranges import Ranges
from trtforge.calibration.sensitivity import keep_in_float, rank_layers
from trtforge.calibration.smoothing import apply_smoothing
from trtforge.calibration.trt_cache import ranges_from_trt_cache, read_trt_cache, write_trt_cache
from trtforge.converter.config import Calibration, ConversionConfig
from trtforge.converter.pipeline import find_buildable
from trtforge.converter.progress import Event, Stages
from trtforge.converter.quantize import (
    Quantization,
    calibration_source,
    find_ranges,
    make_placement,
    prepare,
    read_ranges,
    write_ranges,
)
from trtforge.converter.reference import Reference, make_reference
from trtforge.converter.sources import load_source
from trtforge.converter.types import infer_types
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.graph import load_graph, node_refs
from trtforge.runtime.precision import PrecisionPlan
from trtforge.runtime.publish import staging_folder

__all__ = ["Ask", "Calibrated", "calibrate_model", "parse_shard"]

_SENSITIVITY_BATCHES = 4


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked of one model.

    Attributes:
        output: The file to write: ranges, or the shard's part.
        shard: This part of the data alone; `output` is then a part, to be merged.
        merge: Parts of all shards; no data is read.
        import_cache: A calibration cache of TensorRT 10 or older; no data is read.
        export_cache: Also write the scales in that format.
        trt_version: The version that its first line names, in digits.
        keep: Rank layers by measured harm, and write a plan that leaves the worst `keep` in float; None ranks none.
        plan_output: Where that plan goes.
    """

    output: Path
    shard: Shard | None = None
    merge: tuple[Path, ...] = ()
    import_cache: Path | None = None
    export_cache: Path | None = None
    trt_version: str = "100300"
    keep: int | None = None
    plan_output: Path | None = None


@dataclass(slots=True)
class Calibrated:
    """What came of it: facts for people and machines, `ranges` where there are whole ones."""

    facts: dict[str, Any] = field(default_factory=dict)
    ranges: Ranges | None = None


def parse_shard(text: str) -> Shard:
    """A shard from "2/8".

    Raises:
        ConfigError: not two numbers, or no such shard.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"shard {text!r} is not K/N with 1 <= K <= N", fix="write --shard 2/8 for part 2 of 8")
    return Shard(int(found[1]), int(found[2]))


def calibrate_model(config: ConversionConfig, ask: Ask, stages: Stages) -> Calibrated:
    """Exports the model, finds its ranges, and writes what was asked.

    Raises:
        ConfigError: the plan quantizes nothing, or there is no data.
        CalibrationError: the data, parts or cache do not fit the model.
        ArtifactError: a file cannot be read or written.
    """
    plan = config.plan if config.plan.quantizes else replace(config.plan, default="int8")
    with staging_folder(ask.output.absolute().parent) as folder:
        with stages.stage("load"):
            loaded = load_source(config)
        with stages.stage("export"):
            reference = make_reference(config, loaded, find_buildable(config, stages), folder)
        placement = make_placement(reference.model, plan)
        done = Calibrated({"model": config.name, "tensors": len(placement.measured), "output": str(ask.output)})
        with stages.stage("calibrate"):
            if ask.shard is not None:
                calibration = config.calibration or Calibration()
                source = calibration_source(config, None)
                prepared = prepare(config, source, reference.model, plan, reference.specs, folder, stages)
                part = run_shard(
                    prepared.model,
                    prepared.placement.measured,
                    source,
                    reference.specs,
                    ask.shard,
                    config.profiles,
                    batches=calibration.batches,
                    smoothed=prepared.smoothed,
                )
                save_part(ask.output, part)
                done.facts |= {"shard": f"{ask.shard.index}/{ask.shard.total}", "samples": part.samples}
                return done
            found = _quantization(config, ask, plan, reference, placement, folder, stages, done.facts)
            done.ranges = found.ranges
            write_ranges(ask.output, found)
            if ask.export_cache is not None:
                write_trt_cache(done.ranges, ask.export_cache, ask.trt_version)
                done.facts["exported"] = str(ask.export_cache)
        if ask.keep is not None:
            with stages.stage("sensitivity"):
                _rank(config, ask, plan, reference, found, done, stages)
    return done


def _quantization(
    config: ConversionConfig,
    ask: Ask,
    plan: PrecisionPlan,
    reference: Reference,
    placement: Placement,
    folder: Path,
    stages: Stages,
    facts: dict[str, Any],
) -> Quantization:
    if ask.import_cache is not None:
        graph = load_graph(reference.model.path)
        infer_types(graph)
        ranges, report = ranges_from_trt_cache(read_trt_cache(ask.import_cache), graph, placement)
        facts["imported"] = {
            "matched": len(report.matched),
            "unmatched": list(report.unmatched),
            "unnamed": list(report.unnamed),
            "missing": list(report.missing),
        }
        return Quantization(placement, ranges)
    if ask.merge:
        method = (config.calibration or Calibration()).method
        # No data is read here: the fit is made by whoever has it, or left out.
        ranges = choose_ranges(merge_collected([load_part(path) for path in ask.merge]), method)
        save_ranges(ask.output, ranges)
        found = read_ranges(ask.output, reference.model, plan)
    else:
        if ask.export_cache is not None:
            # A cache of TensorRT's names tensors of the graph as it is; there are none behind a Mul of ours in it.
            config = replace(config, calibration=replace(config.calibration or Calibration(), smoothing=False))
        known = ask.output.exists()
        found = find_ranges(config, None, reference.model, plan, reference.specs, stages, work=folder, cache=ask.output)
        facts["reused"] = known and not found.histograms
    made = found.ranges.made_from
    facts |= {"samples": made.samples, "method": made.method, "smoothed": len(found.ranges.smoothing)}
    facts["fitted"] = found.fit.settings if found.fit is not None else "nothing"
    return found


def _rank(
    config: ConversionConfig,
    ask: Ask,
    plan: PrecisionPlan,
    reference: Reference,
    found: Quantization,
    done: Calibrated,
    stages: Stages,
) -> None:
    assert ask.keep is not None
    graph = load_graph(reference.model.path)
    infer_types(graph)
    if found.ranges.smoothing:
        apply_smoothing(graph, found.before or found.placement, found.ranges.smoothing)
    source = calibration_source(config, None)
    samples = list(read_batches(source, reference.specs, config.profiles, limit=_SENSITIVITY_BATCHES))

    def tell(event: dict[str, Any]) -> None:
        stages.on_event(Event("progress", stages.current, event.get("layer", ""), event["done"], event["total"]))

    ranking = rank_layers(graph, found.ranges, plan, samples, fit=found.fit, on_event=tell)
    mended = keep_in_float(plan, ranking, ask.keep, node_refs(graph), reference.model.hash)
    place = ask.plan_output or ask.output.with_suffix(".plan.yaml")
    partial = place.with_name(f".{place.name}.partial")
    partial.write_text(mended.to_yaml(), encoding="utf-8")
    partial.replace(place)
    done.facts |= {"sensitivity": ranking.to_json(), "plan": str(place)}
