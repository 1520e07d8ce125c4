"""From what a conversion made to an artifact on disk. Refuses an engine whose proof is missing, failed or another's."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtforge.converter.artifact import ENGINE, PLAN, Artifact, input_facts
from trtforge.converter.config import ConversionConfig
from trtforge.converter.manifest import Status, write_manifest
from trtforge.converter.recipe import Recipe, versions
from trtforge.converter.sources import LoadedModel
from trtforge.runtime.errors import ParityError
from trtforge.runtime.graph import OnnxModel
from trtforge.runtime.precision import Precision, PrecisionPlan
from trtforge.runtime.publish import hash_file, publish_folder
from trtforge.runtime.specs import InputSpec
from trtforge.runtime.trt.plugins import PluginLibrary

if TYPE_CHECKING:
    from trtforge.converter.quantize import Quantization
    from trtforge.runtime.device import DeviceFacts
    from trtforge.runtime.trt.build import BuiltEngine
    from trtforge.validation.accuracy import AccuracyReport
    from trtforge.validation.golden import GoldenSet
    from trtforge.validation.parity import ParityReport
    from trtforge.validation.proof import Proof
    from trtforge.validation.tolerance import Tolerance

__all__ = ["Package", "device_entry", "engine_facts", "measured_facts", "publish_package", "publish_proved"]


@dataclass(slots=True)
class Package:
    """What a conversion has made so far.

    Attributes:
        config: What was wanted.
        loaded: What it was made from.
        specs: Inputs, with the values that were generated for them.
        reference: The float graph.
        model: The graph with the plan carried out; the same object as `reference` where they are equal.
        plan: The plan with the overflow guard's rules.
        golden: Inputs and PyTorch's outputs.
        used: Every precision that a node runs in.
        tolerance: The limits of the last proof.
        quantization: What was quantized, and in which ranges; None where nothing was.
        engine: None where none was built.
        reports: The comparisons, in order.
        accuracy: The budget and its results; None where none was asked.
        search: The candidates that were looked at; None where the plan was given.
        recipe: What it is made from; None for a model from Python.
    """

    config: ConversionConfig
    loaded: LoadedModel
    specs: tuple[InputSpec, ...]
    reference: OnnxModel
    model: OnnxModel
    plan: PrecisionPlan
    golden: GoldenSet
    used: set[Precision] = field(default_factory=lambda: {"fp32"})
    tolerance: Tolerance | None = None
    quantization: Quantization | None = None
    engine: BuiltEngine | None = None
    reports: list[ParityReport] = field(default_factory=list)
    accuracy: AccuracyReport | None = None
    search: dict[str, Any] | None = None
    recipe: Recipe | None = None

    @property
    def proof(self) -> Proof:
        """The comparisons, and which of them there have to be."""
        from trtforge.validation.proof import Proof

        changed = self.model.hash != self.reference.hash
        return Proof(tuple(self.reports), required=("export", "precision") if changed else ("export",))


def publish_package(package: Package, folder: Path, target: Path, *, failed: ParityError | None = None) -> Artifact:
    """Writes plan, report and manifest into `folder`, which holds the rest, and publishes it at `target`.

    Args:
        package: What was made.
        folder: Staged beside `target`.
        target: The artifact's place; `NAME.failed` where `failed` is given.
        failed: Why the proof failed.

    Raises:
        ParityError: a proof is missing, did not pass, or is of another graph or engine. "Validated" is an invariant.
    """
    (folder / PLAN).write_text(package.plan.to_yaml(), encoding="utf-8")
    from trtforge.converter.extras import collect_extras

    return publish_proved(
        folder,
        target,
        package.config.name,
        _facts(package),
        package.proof,
        package.golden,
        failed=failed,
        extras=collect_extras(package, folder),
    )


def publish_proved(
    folder: Path,
    target: Path,
    name: str,
    facts: Mapping[str, Any],
    proof: Proof,
    golden: GoldenSet,
    *,
    failed: ParityError | None = None,
    extras: Mapping[str, Any] | None = None,
) -> Artifact:
    """Publishes `folder` at `target` with the status that its proof gives it.

    Args:
        folder: Everything but report and manifest.
        target: Where it goes.
        name: The model's name.
        facts: The manifest but for status and files; its `graphs` and `engine` are what the proof has to be of.
        proof: The comparisons.
        golden: What they were made on.
        failed: Why the proof failed; then nothing is required of it.
        extras: What the report shows beside the proof.

    Raises:
        ParityError: as `publish_package`.
    """
    from trtforge.converter.reporting import write_reports

    engine = folder / ENGINE
    status: Status = "failed" if failed else _status(proof, facts["graphs"], engine if engine.exists() else None)
    if failed is None:
        _require_accuracy(facts)
        _require_run(status, facts)
    write_reports(folder, name, status, {**facts, **(extras or {})}, proof, golden, failed)
    manifest = write_manifest(folder, status, name, facts)
    publish_folder(folder, target)
    return Artifact(target, manifest)


def _status(proof: Proof, graphs: Mapping[str, str], engine: Path | None) -> Status:
    proof.raise_unless_passed()
    _require_same(proof.stage("export"), "graph", graphs["reference"])
    ran = proof.stage("engine")
    if graphs["model"] != graphs["reference"] and ran is None:
        _require_same(proof.stage("precision"), "graph", graphs["model"])
    if engine is None:
        return "portable"
    if ran is None:
        return "built"
    _require_same(ran, "graph", graphs["model"])
    _require_same(ran, "engine", hash_file(engine))
    return "validated"


def engine_facts(engine: BuiltEngine, *, tf32: bool) -> dict[str, Any]:
    """An engine as the manifest holds it."""
    return {
        "sha256": engine.sha256,
        "size": engine.size_bytes,
        "backend": engine.backend,
        "version": engine.version,
        "compute_capabilities": list(engine.compute_capabilities),
        "tf32": tf32,
        "warnings": list(engine.warnings),
    }


def _require_run(status: Status, facts: Mapping[str, Any]) -> None:
    network = facts["source"].get("network")
    if network is not None and status != "validated":
        raise ParityError(
            f"the engine of {network} has not run",
            why="no ONNX is proved in its place: nothing says that the network equals the model",
            fix="convert on a machine with a GPU that the backend runs on",
        )


def _require_accuracy(facts: Mapping[str, Any]) -> None:
    if facts.get("accuracy") is None:
        return
    from trtforge.validation.accuracy import AccuracyReport

    report = AccuracyReport.from_json(facts["accuracy"])
    report.raise_unless_passed()
    if report.deciding is not None and report.deciding.graph != facts["graphs"]["model"]:
        raise ParityError(f"the accuracy is of another graph: {report.deciding.graph}", fix="convert again")


def _require_same(report: ParityReport | None, kind: str, wanted: str) -> None:
    proved = report and report.candidate.hashes.get(kind)
    if proved != wanted:
        raise ParityError(f"the proof is of another {kind}: {proved}, not {wanted}", fix="convert again")


def _facts(package: Package) -> dict[str, Any]:
    from trtforge.runtime.device import device_facts

    config, engine = package.config, package.engine
    ran = any(report.candidate.stage == "engine" for report in package.reports)
    device = device_facts() if ran else None
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "precision": config.plan.default,
        "inputs": [input_facts(spec) for spec in package.specs],
        "outputs": [spec.to_json() for spec in package.reference.outputs],
        "profiles": [{n: [d.min, d.opt, d.max] for n, d in profile.items()} for profile in config.profiles],
        "opset": package.reference.opset,
        "graphs": {"reference": package.reference.hash, "model": package.model.hash},
        "used_precisions": sorted(package.used),
        "source": _source_facts(package),
        "calibration": _calibration_facts(package),
        "engine": engine and engine_facts(engine, tf32=config.plan.float_default == "tf32"),
        "target": {
            "backend": config.target.backend,
            "compute_capabilities": list(config.target.compute_capabilities),
            **config.target.options.to_json(),
            # Where they lie here says nothing elsewhere, and nobody shall load code from where a manifest says.
            "plugins": [],
            "plugin_libraries": [asdict(PluginLibrary.of_file(path)) for path in config.target.options.plugins],
        },
        "device": device and device_entry(device),
        "tolerance": package.tolerance.to_json() if package.tolerance else None,
        "measured": measured_facts(package.proof),
        "accuracy": package.accuracy and package.accuracy.to_json(),
        "search": package.search,
        "versions": versions(),
        "recipe": package.recipe and package.recipe.to_json(),
        "command": reproduce_command(config),
    }


def device_entry(device: DeviceFacts) -> dict[str, Any]:
    """A GPU as the manifest holds it."""
    return {"name": device.name, "compute_capability": device.compute_capability, "sm_count": device.sm_count}


def measured_facts(proof: Proof) -> dict[str, Any]:
    """The worst figures over the outputs of the last comparison; infinite ones as text, which JSON lacks."""
    if not proof.reports:
        return {}
    report = proof.reports[-1]
    measures = [output.pooled for output in report.outputs if output.pooled is not None]
    facts: dict[str, Any] = {"runner": report.candidate.runner, "stage": report.candidate.stage}
    if measures:
        facts |= {
            "sqnr_db": _finite(min(m.sqnr_db for m in measures)),
            "cosine": _finite(min(m.cosine for m in measures)),
            "max_abs_over_std": _finite(max(m.max_abs_over_std for m in measures)),
            "max_abs": _finite(max(m.max_abs for m in measures)),
        }
    if notes := proof.all_notes:
        facts["notes"] = list(notes)
    return facts


def reproduce_command(config: ConversionConfig) -> str:
    """The command line that makes the artifact again; for a model from Python, the call."""
    if config.origin is None:
        return "trtforge.convert(...) from Python"
    return shlex.join(["trtforge", "convert", str(config.origin), "--only", config.name])


def _calibration_facts(package: Package) -> dict[str, Any] | None:
    found = package.quantization
    if found is None:
        return None
    made = found.ranges.made_from
    return {
        "existing": found.placement.existing,
        "tensors": len(found.placement.tensors),
        "weights": len(found.placement.weights),
        "skipped": {skipped.node: skipped.reason for skipped in found.placement.skipped},
        "method": made.method,
        "samples": made.samples,
        "data": made.data,
        "provider": made.provider,
    }


def _source_facts(package: Package) -> dict[str, Any]:
    source, loaded = package.config.source, package.loaded
    facts: dict[str, Any] = {"hash": loaded.source_hash, "checkpoint_sha256": loaded.checkpoint_hash}
    if source.network:
        facts |= {"network": source.network, "network_kwargs": json.loads(json.dumps(dict(source.network_kwargs)))}
    if source.factory:
        facts |= {"factory": source.factory, "kwargs": json.loads(json.dumps(dict(source.kwargs), default=str))}
    for kind in ("checkpoint", "onnx", "exported_program"):
        path: Path | None = getattr(source, kind)
        if path is not None:
            facts[kind] = str(path)
    return facts


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
